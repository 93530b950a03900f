"""Feature caching of a frozen vision encoder: an image is encoded once, and its features serve the next examples.

Most of a step of a small model is its frozen encoder, and the examples of a page (or the epochs of a set) show it the
same first look again and again. Images are identified by a hash of their pixels. Each is encoded by itself, so that its
features do not depend on the others in the batch, nor on what is in the cache.

It takes the place of Qwen2-VL's `get_image_features` (`relook.model.modeling.image_encoder`).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from relook.model.modeling import image_encoder


@contextmanager
def cached_features(model: Any, images: int) -> Iterator[None]:
    """Within, the features of the last `images` images are kept, as long as the vision encoder does not learn."""
    if images <= 0:
        yield
        return
    with image_encoder(FeatureCache(model.model, images)):
        yield


class FeatureCache:
    """In place of `get_image_features`: a least-recently-used cache of `images` images."""

    def __init__(self, base: Any, images: int) -> None:
        self.encode, self.visual, self.images = base.get_image_features, base.visual, images
        self.found: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        if any(p.requires_grad for p in self.visual.parameters()):
            return self.encode(pixel_values, image_grid_thw, **kwargs)
        parts = pixel_values.split(image_grid_thw.prod(-1).tolist())
        features = tuple(self._features(part, grid) for part, grid in zip(parts, image_grid_thw, strict=True))
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def _features(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """(patches, p), (3,) -> (tokens, d)"""
        reduced = torch.is_autocast_enabled(pixels.device.type)  # training may be, validation is not: not the same
        key_hash = hashlib.blake2b(repr((grid.tolist(), reduced)).encode(), digest_size=16)
        key_hash.update(pixels.detach().float().cpu().contiguous().numpy().data)
        key = key_hash.digest()
        if key not in self.found:
            with torch.no_grad():
                self.found[key] = self.encode(pixels, grid[None], return_dict=True).pooler_output[0]
        self.found.move_to_end(key)
        if len(self.found) > self.images:
            self.found.popitem(last=False)
        return self.found[key]
