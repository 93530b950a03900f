"""Reader of scanned receipts with annotated lines, used in training beside the synthetic receipts.

A folder such as `../shared/data/receipts` holds `train.jsonl` (image, width, height, fields, lines of box and text) and
`train_qa.jsonl` (question, answer, bboxs, field). The scans are not part of the project; without the folder a recipe
prints a notice and trains on synthetic pages alone.

Boxes are (x1, y1, x2, y2) in pixels of the scan, x2 and y2 exclusive.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.worlds.base import QA, Box

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Scan:
    """One receipt: image file, lines as (box, upper-case text), and questions."""

    path: Path
    lines: list[tuple[Box, str]]
    qas: list[QA] = field(default_factory=list)
    _image: Image.Image | None = None

    @property
    def image(self) -> Image.Image:
        """The grayscale scan, cached after the first access."""
        from PIL import Image

        if self._image is None:
            with Image.open(self.path) as opened:
                self._image = opened.convert("L")
        return self._image


def read_scans(folder: str | Path | None, split: str = "train", part: tuple[int, int] | None = None) -> list[Scan]:
    """Read the receipts of a split; prints a notice and returns an empty list if `folder` does not exist.

    Args:
        part: first and last + 1 of the receipts to keep, counted in the file's order; all of them unless given.
    """
    if folder is None:
        return []
    if not (Path(folder) / f"{split}.jsonl").is_file():
        print(f"no scans at {folder} ({split}.jsonl): synthetic pages only", file=sys.stderr)
        return []
    folder = Path(folder)
    scans: dict[str, Scan] = {}
    for record in _records(folder / f"{split}.jsonl"):
        lines = [(_box(line["box"]), str(line["text"]).upper()) for line in record["lines"]]
        scans[record["image"]] = Scan(folder / record["image"], lines)
    for record in _records(folder / f"{split}_qa.jsonl"):
        boxes = tuple(_box(box) for box in record["bboxs"])
        scans[record["image"]].qas.append(QA(record["question"], record["answer"], boxes, record["field"]))
    return list(scans.values())[slice(*part) if part else slice(None)]


def _box(values: list[int]) -> Box:
    x1, y1, x2, y2 = (int(v) for v in values[:4])
    return x1, y1, x2, y2


def _records(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
