"""Folders to start training from: a plain Qwen2-VL, a DINOv2 and a SAM as the hub holds them, and models with looks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel

from relook.model.start import new_model
from support.qwen2vl_folder import plain_qwen2_vl
from support.tiny_model import DINO, SAM


def parts(folder: Path) -> dict[str, str]:
    """Write base, DINOv2 and SAM; returns their folders as a recipe's `model:` names them."""
    plain_qwen2_vl(folder / "base")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**DINO)).eval().save_pretrained(folder / "dino")
    SamModel(SamConfig(vision_config=SAM)).eval().save_pretrained(folder / "sam")
    return {"start": str(folder / "base"), "detection": str(folder / "dino"), "seg": str(folder / "sam")}


def start(folder: Path, made: dict[str, str], looks: tuple[str, ...]) -> str:
    """A model with `looks` as alignment leaves it (random weights), from the parts of `parts`."""
    model, processor = new_model(made["start"], looks, made["detection"], made["seg"])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
