"""Reading accuracy of the vision encoder of receipts-tiny on receipts held out of its training.

    python zoo/tools/receipts_tower.py zoo/recipes/receipts-tower
    python zoo/tools/receipts_tower.py runs/receipts-tower/final --heads runs/receipts-tower/stages/02-sharpen

The encoder's auxiliary heads (`zoo.objectives.lines`) are evaluated; they lie in the model's folder, or in that of the
stage that trained them. Two measures: lines sampled from the validation receipts, shown as region looks show them with
a small margin, and their decoded text compared with the printed text without spaces; and, in the first look of every
receipt, whether the highest-scoring token of a field lies in that field, or one row off.

Intervals are 95 % bootstrap intervals over lines and over receipts. The same folder gives the same figures on the same
machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from relook.errors import UserError
from relook.evaluate.statistics import bootstrap
from relook.model.loading import load_model
from relook.processing.processor import VPTQwen2VLProcessor
from relook.train.checkpoints import read_heads
from relook.train.objective import Setup
from relook.train.recipe import Stage
from zoo.objectives.lines import LineHeads, Lines, error_rate, pool_rows, spell
from zoo.objectives.pieces import Sheet, clamp, lines_in, seen_at
from zoo.scans import Scan, read_scans
from zoo.worlds import make_world

AROUND = 6  # margin around a line in pixels

Figures = list[tuple[str, float]]  # (which receipt, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the tower")
    parser.add_argument("--heads", type=Path, help="folder with heads.safetensors; the model's unless given")
    parser.add_argument("--scans", default="../shared/data/receipts", help="receipts, see zoo.scans")
    parser.add_argument("--lines", type=int, default=600)
    parser.add_argument("--seed", type=int, default=5, help="of the lines drawn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader, heads = read_by(options.model, options.heads or options.model)
    scans = read_scans(options.scans, "val")
    if not scans:
        raise UserError(f"{options.scans} holds no receipts to read; give --scans FOLDER.")
    print(f"{options.model}: {options.lines} lines of {len(scans)} receipts, seed {options.seed}")
    figures = {**lines_read(reader, heads, scans, options.lines, options.seed), **fields_found(reader, heads, scans)}
    for name, values in figures.items():
        mean = bootstrap([value for _, value in values], clusters=[scan for scan, _ in values])
        print(f"{name:44} {100 * mean.mean:5.1f} % ({100 * mean.low:.1f}-{100 * mean.high:.1f})  n = {len(values)}")


def read_by(folder: Path, heads: Path) -> tuple[Lines, LineHeads]:
    """Build the objective that trained the encoder, and the encoder with its heads."""
    if not (heads / "heads.safetensors").is_file():
        raise UserError(f"{heads} holds no heads.safetensors; give --heads, the folder of the stage that taught it.")
    model = load_model(folder, dtype=torch.float32).eval()
    stage, source = Stage(name="read", objective="lines", samples=1), make_world("receipts", 0)
    processor = VPTQwen2VLProcessor.from_pretrained(folder)
    reader = Lines(Setup(stage, model.config, processor, 0, source, heads=read_heads(heads)))
    trained: Any = reader.wrap(model)
    return reader, trained


def tokens_of(trained: LineHeads, pixels: dict[str, Any]) -> torch.Tensor:
    """Return (tokens, width) of one image."""
    images = {key: pixels[key] for key in ("pixel_values", "image_grid_thw")}
    return trained.model.encode("image", **images)[0]


@torch.no_grad()
def lines_read(reader: Lines, trained: LineHeads, scans: list[Scan], number: int, seed: int) -> dict[str, Figures]:
    """Return per line the edit distance relative to its length and whether it is exact; the same for numeric lines."""
    random = np.random.default_rng(seed)
    errors, digits = [], []
    while len(errors) < number:
        place = int(random.integers(len(scans)))
        scan = scans[place]
        box, text = scan.lines[int(random.integers(len(scan.lines)))]
        window = clamp((box[0] - AROUND, box[1] - AROUND, box[2] + AROUND, box[3] + AROUND), scan.image.size)
        pixels, grid = reader.encode(scan.image.crop(window), seen_at(window, 1.0))
        found = lines_in([(box, text)], window, grid, reader.classes)
        if not found:
            continue  # no character of the encoder's alphabet
        rows, slots, letters = found[0]
        seen = trained.heads["slots"](tokens_of(trained, pixels)).view(grid[0], -1, len(reader.classes) + 1)
        errors.append((str(place), error_rate(spell(pool_rows(seen[rows, slots])), letters.tolist())))
        bare = text.replace(" ", "")
        digits.append(2 * sum(c.isdigit() for c in bare) >= len(bare))
    some = [error for error, mostly in zip(errors, digits, strict=True) if mostly]
    return {
        "character error rate, mean over lines": errors,
        "whole lines right": [(scan, float(error == 0)) for scan, error in errors],
        "lines that are mostly digits, right": [(scan, float(error == 0)) for scan, error in some],
    }


@torch.no_grad()
def fields_found(reader: Lines, trained: LineHeads, scans: list[Scan]) -> dict[str, Figures]:
    """Return per receipt and field whether the best token of the first look lies in the field, or one row off."""
    found: dict[str, Figures] = {}
    for place, scan in enumerate(scans):
        sheet = Sheet.of_scan(scan)
        pixels = reader.processor.encode_images([reader.processor.view(sheet.image.convert("RGB"), "first")], "image")
        rows, columns = (int(v) // 2 for v in pixels["image_grid_thw"][0, 1:])
        scores = trained.heads["field"](tokens_of(trained, pixels))
        truth = reader.field_truth(sheet, (0, 0, *sheet.image.size), (rows, columns)).view(rows, columns, -1) > 0.5
        for field in sheet.fields:
            here = truth[..., reader.fields[field]].float()
            near = F.max_pool2d(here[None], (3, 1), stride=1, padding=(1, 0))[0]
            best = int(scores[:, reader.fields[field]].argmax())
            found.setdefault(f"first look: best token in the {field}", []).append(
                (str(place), float(near.flatten()[best]))
            )
    return dict(sorted(found.items()))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
