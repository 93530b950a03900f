"""Vision encoders: the extra ones, stock transformers models, one row each; and the images of a forward through all.

A row says which class encodes, how its output becomes the feature F of the projector and what a checkpoint of the
published format leaves to the hub. The base model's own ViT (look "clip") needs no row: it is already there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from .decoder import widen
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


# -- the images of one forward ----------------------------------------------------------------------------------------

_IMAGE_ENCODER: ContextVar[Callable[..., Any] | None] = ContextVar("image_encoder", default=None)


@contextmanager
def image_encoder(encode: Callable[..., Any]) -> Iterator[None]:
    """Within, `encode` takes the place of the base model's `get_image_features` (for example, a cache around it).

    Args:
        encode: (pixel_values (patches, p), image_grid_thw (k, 3), return_dict=True) -> an output with `pooler_output`,
            one (n, d) tensor per image (wider where it holds all that `view_features` gives).
    """
    token = _IMAGE_ENCODER.set(encode)
    try:
        yield
    finally:
        _IMAGE_ENCODER.reset(token)


def image_features(model: Any, pixel_values: Tensor, image_grid_thw: Tensor) -> Any:
    """The output of the base model's own vision encoder; see `image_encoder`."""
    encode = _IMAGE_ENCODER.get() or model.model.get_image_features
    return encode(pixel_values, image_grid_thw, return_dict=True)


def view_features(model: Any, output: Any) -> list[Tensor]:
    """The features (n, (1 + k) d) of each image of an output: the final ones and, behind them, k inner ones.

    Which these are is a base's own (`bases.Base.view_features`). An output that lacks the inner ones has them already.
    """
    final, *inner = model.config.base.view_features
    layers = [layer for name in inner for layer in getattr(output, name, None) or ()]
    images = list(getattr(output, final))
    return [torch.cat(parts, dim=-1) for parts in zip(images, *layers, strict=True)] if layers else images


def encode_images(model: Any, base: dict[str, Any], looks: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoders' outputs for the base model's images and videos, and the features of every look's images.

    A clip look at an image that is also a first look or a crop takes that one's features: one encoder run.

    Args:
        model: a `LookAgainMixin`.
        base: images and videos under the names of `forward`. looks: look -> its images under the names of `encode`.
    """
    outputs: dict[str, Any] = dict(base["mm_encoder_outputs"] or {})
    features: dict[str, list[Tensor]] = {}
    pixels, grids = base["pixel_values"], base["image_grid_thw"]
    own = pixels is not None and outputs.get("image") is None
    if own:
        outputs["image"] = image_features(model, pixels, grids)
    if outputs.get("video") is None and base["pixel_values_videos"] is not None:
        video = (base["pixel_values_videos"], base["video_grid_thw"])
        outputs["video"] = model.model.get_video_features(*video, return_dict=True)
    if own and "clip" in looks:
        clips, sizes = looks["clip"]["pixel_values"], looks["clip"]["image_grid_thw"]
        same = same_images(clips, sizes, pixels, grids)
        others = [i for i, at in enumerate(same) if at is None]
        rest: Iterator[Tensor] = iter(())
        if others:
            parts = clips.split(sizes.prod(-1).tolist())
            clips = torch.cat([parts[i] for i in others])
            rest = iter(model.encode("clip", pixel_values=clips, image_grid_thw=sizes[others]))
        own_features = view_features(model, outputs["image"])
        features["clip"] = [next(rest) if at is None else own_features[at] for at in same]
    features |= {look: model.encode(look, **tensors) for look, tensors in looks.items() if look not in features}
    return outputs, features


def same_images(pixels: Tensor, grids: Tensor, others: Tensor, other_grids: Tensor) -> list[int | None]:
    """For each image, the first of the others with the same pixels, None where there is none.

    Args:
        pixels, others: (patches, p), image after image; grids, other_grids: (k, 3) their patches as t, h, w.
    """
    ours, theirs = (
        list(zip(x.split(g.prod(-1).tolist()), g.tolist(), strict=True))
        for x, g in ((pixels, grids), (others, other_grids))
    )
    return [
        next((i for i, (other, size) in enumerate(theirs) if size == grid and torch.equal(image, other)), None)
        for image, grid in ours
    ]


def merge_base_images(model: Any, input_ids: Any, embeds: Tensor, outputs: dict[str, Any]) -> Tensor:
    """First looks and crops (and videos) into the embeddings, exactly as the base model does."""
    width = embeds.shape[-1]
    for index, kind in enumerate(("image", "video")):
        if outputs.get(kind) is not None:
            values = torch.cat(view_features(model, outputs[kind]), dim=0).to(embeds)
            seen = {f"{kind}_features": values[:, :width]}
            mask = model.model.get_placeholder_mask(input_ids, embeds[..., :width], **seen)[index]
            embeds = widen(embeds, values.shape[-1])
            embeds = embeds.masked_scatter(mask[..., :1].expand_as(embeds), values)
    return embeds
