"""A vision tower that rests looks at an image once: what it made of it is kept for the next example that shows it.

Most of a step of a small model is its frozen tower, and the examples of a page (or the epochs of a set) show it the
same first look again and again. Images are told apart by their pixels. Each is encoded by itself, so that what it gives
does not depend on the others in the batch, nor on what is remembered already.

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
def remembering(model: Any, images: int) -> Iterator[None]:
    """Within, the features of the last `images` images are kept, as long as the vision tower does not learn."""
    if images <= 0:
        yield
        return
    with image_encoder(Memory(model.model, images)):
        yield


class Memory:
    """Stands in for `get_image_features`; forgets the least recently used image first."""

    def __init__(self, base: Any, images: int) -> None:
        self.afresh, self.visual, self.images = base.get_image_features, base.visual, images
        self.found: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        if any(p.requires_grad for p in self.visual.parameters()):
            return self.afresh(pixel_values, image_grid_thw, **kwargs)
        parts = pixel_values.split(image_grid_thw.prod(-1).tolist())
        features = tuple(self.one(part, grid) for part, grid in zip(parts, image_grid_thw, strict=True))
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def one(self, pixels: Tensor, grid: Tensor) -> Tensor:
        """(patches, p), (3,) -> (tokens, d)"""
        reduced = torch.is_autocast_enabled(pixels.device.type)  # training may be, validation is not: not the same
        told = hashlib.blake2b(repr((grid.tolist(), reduced)).encode(), digest_size=16)
        told.update(pixels.detach().float().cpu().contiguous().numpy().data)
        key = told.digest()
        if key not in self.found:
            with torch.no_grad():
                self.found[key] = self.afresh(pixels, grid[None], return_dict=True).pooler_output[0]
        self.found.move_to_end(key)
        if len(self.found) > self.images:
            self.found.popitem(last=False)
        return self.found[key]
