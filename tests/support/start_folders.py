"""Checkpoints to start training from: tiny random Qwen2-VL, DINOv2 and SAM as on the hub, and models with looks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel

from relook.model.start import Start, open_start
from support.qwen2vl_folder import plain_qwen2_vl
from support.tiny_model import DINO, SAM


def parts(folder: Path) -> dict[str, str]:
    """Write Qwen2-VL, DINOv2 and SAM; returns their folders by the keys of a recipe's `model:`."""
    plain_qwen2_vl(folder / "base")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**DINO)).eval().save_pretrained(folder / "dino")
    SamModel(SamConfig(vision_config=SAM)).eval().save_pretrained(folder / "sam")
    return {"start": str(folder / "base"), "detection": str(folder / "dino"), "seg": str(folder / "sam")}


def start(folder: Path, made: dict[str, str], looks: tuple[str, ...]) -> str:
    """Write a model with `looks` and random weights, as alignment leaves it, from the folders of `parts`."""
    model, processor = open_start(Start(**{key: made[key] for key in ("start", "detection", "seg")}, looks=list(looks)))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
