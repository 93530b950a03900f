"""The extra vision encoders: stock transformers models, one row each.

A row says which class encodes, how its output becomes the feature F of the projector and what a checkpoint of the
published format leaves to the hub. The base model's own ViT (look "clip") needs no row: it is already there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from .projector import FeatureMap


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder.

    `features`: model output -> F, one row per image: (256, c) tokens for DINOv2, (c, 64, 64) a map for SAM.
    `input`: the keyword of `forward` that carries its images. `width`: config -> number of feature channels c.
    `feature_map`: how the projector makes F of them.
    `published`: config of the encoder the published checkpoints use, where it differs from the class's defaults.
    `legacy_key`: key of its config in a published `encoder_config.json`.
    """

    config_class: type
    model_class: type
    input: str
    features: Callable[[Any], Tensor]
    width: Callable[[Any], int]
    feature_map: FeatureMap
    published: dict[str, Any]
    legacy_key: str


ENCODERS: dict[str, EncoderSpec] = {
    # facebook/dinov2-large: 24 layers of 1024, patch 14, position table for 518 px (interpolated to 224); CLS dropped.
    "detection": EncoderSpec(
        config_class=Dinov2Config,
        model_class=Dinov2Model,
        input="detection_images",
        features=lambda out: out.last_hidden_state[:, 1:],
        width=lambda config: config.hidden_size,
        feature_map="linear",
        published=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14),
        legacy_key="dino",
    ),
    # facebook/sam-vit-large: the image encoder with its neck; global attention in layers 5, 11, 17, 23.
    "seg": EncoderSpec(
        config_class=SamVisionConfig,
        model_class=SamVisionEncoder,
        input="seg_images",
        features=lambda out: out.last_hidden_state,
        width=lambda config: config.output_channels,
        feature_map="conv",
        published=dict(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            mlp_dim=4096,
            global_attn_indexes=[5, 11, 17, 23],
        ),
        legacy_key="sam_vision",
    ),
}


def encoder_config(look: str, values: dict[str, Any] | None) -> Any:
    """The config object of `look`'s encoder from a dict; the published encoder's where `values` is None."""
    spec = ENCODERS[look]
    values = spec.published if values is None else values
    return spec.config_class(**{k: v for k, v in values.items() if k != "model_type"})


def build_encoder(look: str, values: dict[str, Any] | None, attn_implementation: str | None = None) -> nn.Module:
    """A randomly initialised encoder for `look` (weights come from a checkpoint)."""
    config = encoder_config(look, values)
    if attn_implementation in ("eager", "sdpa"):  # SAM has no other; DINOv2 follows for one predictable choice
        config._attn_implementation = attn_implementation
    return ENCODERS[look].model_class(config)
