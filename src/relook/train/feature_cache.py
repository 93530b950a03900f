"""Features of a frozen vision encoder, kept in memory and on disk: each image is encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from relook.io import replacing_file
from relook.model.encoders import view_features
from relook.train.recipe import Stage

BOUND = 2**30  # bytes of features in memory


class FeatureCache:
    """In place of `get_image_features`, as long as the vision encoder is frozen: features by a hash of the pixels.

    Each image is encoded by itself, so that its features do not depend on the others in the batch, nor on what is in
    the cache: whatever is kept, a run has the same weights to the bit.

    Args:
        base: the base model, with its encoder `visual`.
        images: how many are kept; None for as many as `bound` bytes hold. The one used longest ago goes first.
        folder: where features are kept on disk, too, without bound; by the encoder's weights.
    """

    def __init__(self, base: Any, images: int | None = None, bound: int = BOUND, folder: str | Path | None = None):
        self.base, self.encode, self.visual = base, base.get_image_features, base.visual
        self.images, self.bound = images, bound
        self.found: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        self.folder = None if folder is None else Path(folder) / _digest(self.visual)

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
        key = key_hash.hexdigest()
        if key not in self.found:
            self._keep(key, self._read(key, pixels, grid))
        self.found.move_to_end(key)
        features = self.found[key]
        while len(self.found) > 1 and self._full():
            self.bytes -= self.found.popitem(last=False)[1].nbytes
        return features.to(pixels.device)

    def _full(self) -> bool:
        return self.bytes > self.bound if self.images is None else len(self.found) > self.images

    def _keep(self, key: str, features: Tensor) -> None:
        self.found[key] = features
        self.bytes += features.nbytes

    def _read(self, key: str, pixels: Tensor, grid: Tensor) -> Tensor:
        """From the disk, or else from the encoder."""
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        if path is not None and path.is_file():
            try:
                return load_file(path)["features"]
            except (SafetensorError, KeyError, OSError):
                pass  # damaged: made again
        with torch.no_grad():
            output = self.encode(pixels, grid[None], return_dict=True)
        features = view_features(self.base, output)[0].detach().cpu().contiguous()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing_file(path) as aside:
                save_file({"features": features}, aside)
        return features


def feature_cache(
    base: Any, stage: Stage, samples: int, items: Any, sharded: bool = False
) -> Callable[..., Any] | None:
    """The encoder of a stage: a `FeatureCache` as `remember` says; by default where a frozen one sees items again.

    One that is frozen and sees each item once is run as it is, but without what a backward pass would need: under
    `checkpointing`, transformers has inputs that ask for gradients, and the whole encoder would run again for nothing.

    Args:
        samples: of the stage.
        items: of the stage (`SampledItems`); None for a synthetic dataset, whose pages do not come again.
        sharded: whether weights are in pieces, which no single process can encode with.
    """
    frozen = not any(parameter.requires_grad for parameter in base.visual.parameters())
    again = items is not None and samples > len(items)
    if stage.remember == 0 or (stage.remember is None and not (frozen and again and not sharded)):
        return torch.no_grad()(base.get_image_features) if frozen and not sharded else None
    return FeatureCache(base, stage.remember, folder=stage.cache)


def _digest(encoder: torch.nn.Module) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, weight in encoder.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
