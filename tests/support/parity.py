"""The published implementation's recorded outputs, and functions that run our model on the same inputs.

`tests/fixtures/parity` holds `clip` in full and part of `dino` (a clone is limited to 12 MB); with `../shared/parity`
all four models are covered.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from relook.model.loading import load_model
from support import SHARED, TESTS

ROOTS = [p for p in (SHARED / "parity", TESTS / "fixtures" / "parity") if p.is_dir()]


def folder(model: str) -> Path:
    """The most complete folder of a fixture model."""
    return next(root / model for root in ROOTS if (root / model).is_dir())


MODELS = sorted({p.parent.name for root in ROOTS for p in root.glob("*/model.safetensors")})


def recorded(pattern: str) -> list[Path]:
    """All recorded files matching a pattern such as "out_*", over all available models."""
    return [p for model in MODELS for p in sorted(folder(model).glob(f"{pattern}.safetensors"))]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load one recorded file; the stored 64-pixel SAM images are upsampled to the original 1024."""
    values = load_file(path)
    for key in [k for k in values if k.endswith("seg_images_64")]:
        small = values.pop(key)
        values[key.removesuffix("_64")] = small.repeat_interleave(16, -1).repeat_interleave(16, -2)
    return values


@cache
def encoder_configs(model: str) -> dict[str, Any]:
    return json.loads((folder(model) / "encoder_config.json").read_text())


def fresh(model: str) -> Any:
    """Load the fixture model with embeddings and vision encoders frozen, as in the published code."""
    loaded = load_model(folder(model), dtype="float32", device="cpu", encoder_config=encoder_configs(model))
    loaded.config.input_grads = "published"
    return loaded


def set_mode(model: Any, runs: int = 2, mask: int = 0, positions: str = "mrope") -> Any:
    """Apply the settings of one recorded run; masks were applied with ratio 1, and only in training mode."""
    config = model.config
    config.num_inner_forward_run, config.para_mask_id, config.para_mask_ratio = runs, mask, 1
    config.position_mode = positions
    return model


PREFIXES = {  # published parameter name -> ours
    "model.": "model.language_model.",
    "clip_projector.": "projectors.clip.",
    "detection_projector.": "projectors.detection.",
    "seg_projector.": "projectors.seg.",
    "lm_head.": "lm_head.",
}


def our_name(published: str) -> str:
    prefix = next(p for p in PREFIXES if published.startswith(p))
    return PREFIXES[prefix] + published.removeprefix(prefix)
