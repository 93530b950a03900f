"""Looking into checkpoints and writing them in another layout, without running them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from relook.errors import UserError
from relook.io import replacing_folder

from .configuration import VPTQwen2VLConfig
from .loading import check_free, load_model, read_config, resolve, stored_keys, weight_files
from .modeling import VPTQwen2VLForConditionalGeneration
from .published import save_published

PARTS = {  # prefix of a parameter's name -> the part it belongs to
    "model.visual.": "ViT",
    "model.language_model.embed_tokens.": "token embeddings",
    "model.language_model.": "language model",
    "lm_head.": "lm_head",
    "encoders.": "encoder",
    "projectors.": "projector",
}


def count_parameters(config: VPTQwen2VLConfig) -> dict[str, int]:
    """Parameters by part, counted on the meta device.

    A tied lm_head counts as stored apart, as in the published files.
    """
    with torch.device("meta"):
        model = VPTQwen2VLForConditionalGeneration(config)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix, part = next((p, t) for p, t in PARTS.items() if name.startswith(p))
        if prefix in ("encoders.", "projectors."):
            part = f"{name.split('.')[1]} {part}"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def inspect(name_or_path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, without loading its weights: parts, parameters, dtypes, looks, token ids, provenance."""
    folder = resolve(name_or_path)
    config = read_config(folder)
    keys = stored_keys(folder)
    ids = {look: i for look in config.reencodings if (i := config.reencode_ids(look)) is not None}
    return {
        "model": str(name_or_path),
        "layout": "published" if (config.provenance or {}).get("layout") == "published" else "relook",
        "looks": config.looks,
        "parameters": count_parameters(config),
        "stored_tensors": len(keys),
        "dtypes": sorted({dtype.replace("torch.", "") for _, dtype, _ in keys.values()}),
        "token_ids": {look: {"pad": i.pad, "start": i.start, "action": i.action} for look, i in ids.items()},
        "num_inner_forward_run": config.num_inner_forward_run,
        "position_mode": config.position_mode,
        "domain": config.domain,
        "provenance": config.provenance,
    }


def convert(
    source: str | Path, target: str | Path, to: str = "relook", encoder_config: dict[str, Any] | None = None
) -> Path:
    """Write `source` anew in the "relook" layout (self-describing) or the "published" one (flat 4.45 config, `.bin`).

    The folder appears whole or not at all. The published code reads only `.bin`, so that is what "published" writes.
    """
    if to not in ("relook", "published"):
        raise UserError(f"--to {to!r} is not a layout; use relook or published")
    check_free(target)
    folder = resolve(source)
    config = read_config(folder, encoder_config)
    model = load_model(folder, dtype=_stored_dtype(folder), device="cpu", encoder_config=encoder_config)
    with replacing_folder(target) as out:
        out.mkdir()
        for path in folder.iterdir():  # tokenizer, processor, card: as they are
            if path.is_file() and path not in weight_files(folder) and not path.name.endswith(".index.json"):
                shutil.copy2(path, out / path.name)
        if to == "relook":
            model.save_pretrained(out)
        else:
            save_published(model, config, out)
    return Path(target)


def _stored_dtype(folder: Path) -> torch.dtype:
    short = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {dtype for _, dtype, _ in stored_keys(folder).values()}
    names = {short.get(k, k.replace("torch.", "")) for k in kinds}
    return getattr(torch, names.pop()) if len(names) == 1 else torch.float32
