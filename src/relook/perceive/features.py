"""View features: each distinct view of a conversation goes through its vision encoder once.

A view is an image, or a box of it, under the settings of a stage. `ENCODER_OF` says which looks share an encoder: first
looks, region crops and `clip` looks all use the model's own ViT, so a `clip` look at the view of the first look needs
no further encoder run. Encoding is deferred until the loop has collected the views of all its rows: one call serves
them. An image is known by a digest of its pixels, so several conversations can share features (`SharedFeatures`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from relook.regions import Box

# look -> its encoder, by the name under which the processor and the model encode for it
ENCODER_OF = {"image": "image", "region": "image", "clip": "image", "detection": "detection", "seg": "seg"}
ENCODER_BATCH = 16  # images per call of an encoder: bounds memory (a SAM image is 1024 x 1024)


@dataclass(eq=False)
class ViewFeatures:
    """One view through one encoder.

    Attributes:
        key: which view it is; equal for equal pixels under equal settings.
        encoder: "image" (the model's own ViT), "detection" or "seg".
        tensors: what `model.encode` takes, for this one image; empty where it is kept for later.
        grid: (t, h, w) patches of the ViT, None for the other encoders.
        features: raw features, None until encoded: (n, (1 + k) d) of the ViT, (256, c) DINOv2, (c, 64, 64) SAM.
    """

    key: Hashable
    encoder: str
    tensors: dict[str, Tensor]
    grid: tuple[int, int, int] | None
    features: Tensor | None = None

    @property
    def patches(self) -> int:
        """Patches that went through the encoder: t*h*w of the ViT, 256 of DINOv2 (16 x 16), 4096 of SAM (64 x 64)."""
        if self.grid is not None:
            return self.grid[0] * self.grid[1] * self.grid[2]
        if self.features is None:
            return 0
        return self.features.shape[0] if self.features.ndim == 2 else self.features.shape[-2] * self.features.shape[-1]

    def token_grid(self, tokens: int, merge: int) -> tuple[int, int]:
        """(height, width) in which `tokens` image tokens of this view lie: the ViT's merged grid, else a square.

        Example: a ViT grid of (1, 22, 36) merged 2 x 2 lies in (11, 18); 256 tokens of DINOv2 in (16, 16).
        """
        if self.grid is not None:
            t, h, w = self.grid
            return t * h // merge, w // merge
        side = round(tokens**0.5)
        return (side, side) if side * side == tokens else (1, tokens)


class SharedFeatures(Protocol):
    """Encoded views that outlive a conversation (`prefix.Memory`)."""

    def view(self, key: Hashable) -> ViewFeatures | None: ...


@dataclass
class FeatureCache:
    """The view features of one conversation, by view, on top of those that it shares with others."""

    processor: Any
    shared: SharedFeatures | None = None
    entries: dict[Hashable, ViewFeatures] = field(default_factory=dict)
    digests: dict[int, tuple[Image.Image, bytes]] = field(default_factory=dict)  # by id, with the image that has it

    def copy(self) -> FeatureCache:
        """The same entries, to grow independently."""
        return FeatureCache(self.processor, self.shared, dict(self.entries), dict(self.digests))

    def lookup(
        self, look: str, whole: Image.Image, stage: str, box: Box | None = None
    ) -> tuple[ViewFeatures, Image.Image]:
        """The features of a view (encoded later, or already), and the view itself as an image.

        Args:
            look: "image" for a first look or a look of the table.
            whole: the image, upright, original pixels.
            stage: "first", "crop" or "reencode": which of the processor's views to use.
            box: (x1, y1, x2, y2) pixels of `whole`, exclusive; None, or a box of all of it: the whole image.
        """
        if box == (0, 0, *whole.size):
            box = None
        part = whole if box is None else whole.crop(box)
        encoder = ENCODER_OF[look]
        seen_as = self.processor.view(part, stage, encoder)
        if id(whole) not in self.digests:
            self.digests[id(whole)] = whole, digest(whole)
        key = (encoder, self.digests[id(whole)][1], box, self.processor.view_of(stage))
        if key not in self.entries:
            self.entries[key] = (self.shared and self.shared.view(key)) or self._view(key, seen_as)
        return self.entries[key], seen_as.copy() if seen_as is whole else seen_as

    def _view(self, key: Hashable, image: Image.Image) -> ViewFeatures:
        """A view that is not encoded yet; its key begins with the encoder."""
        encoder = key[0]  # type: ignore[index]
        tensors = self.processor.encode_images([image], encoder)
        grids = tensors.get("image_grid_thw")
        return ViewFeatures(key, encoder, tensors, None if grids is None else tuple(grids[0].tolist()))


def digest(image: Image.Image) -> bytes:
    """16 bytes that tell an image's size and pixels from any other's."""
    image = image.convert("RGBA") if image.mode == "P" else image  # a palette is not among the pixels
    data = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.blake2b(data, digest_size=16).digest()


def encode(model: Any, views: Sequence[ViewFeatures]) -> None:
    """Fill in the features of the views that have none yet, one call per encoder and at most ENCODER_BATCH images."""
    wanted: dict[str, dict[int, ViewFeatures]] = {}
    for view in views:
        if view.features is None:
            wanted.setdefault(view.encoder, {})[id(view)] = view
    for encoder, by_id in wanted.items():
        todo = list(by_id.values())
        for begin in range(0, len(todo), ENCODER_BATCH):
            batch = todo[begin : begin + ENCODER_BATCH]
            tensors = {name: _to(torch.cat([s.tensors[name] for s in batch]), model) for name in batch[0].tensors}
            for view, features in zip(batch, model.encode(encoder, **tensors), strict=True):
                view.features = features


def _to(x: Tensor, model: Any) -> Tensor:
    """Onto the model's device, floats in its dtype."""
    return x.to(model.device, model.dtype if x.is_floating_point() else x.dtype)
