"""The language model over embeddings, and what moves these: one place splits them into what each layer takes.

Legend for shapes: B rows, L columns of the batch, S columns of one segment, N tokens of one image, d the language
model's width, k layers after which the decoder adds inner features of a view (0 in most bases).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x (B, L, d) at columns (B, S) -> (B, S, d)."""
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put_columns(x: Tensor, row: int, columns: Tensor, values: Tensor) -> Tensor:
    """x (B, L, d) with x[row, columns] replaced by values (N, d); a new tensor, so gradients reach both."""
    rows, width = torch.full_like(columns, row), max(x.shape[-1], values.shape[-1])
    x, values = widen(x, width), widen(values, width)
    return x.index_put((rows, columns), values.to(x.dtype))


def widen(x: Tensor, width: int) -> Tensor:
    """x (..., d) with zeros behind, up to (..., width): tokens without inner features among others with them."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def run_decoder(model: Any, inputs_embeds: Tensor, **inputs: Any) -> Any:
    """The language model over embeddings (B, L, d), or (B, L, (1 + k) d) with what it adds after its first k layers.

    These inner features of a view (Qwen3-VL's deepstack) lie behind the embedding of each image token, zeros behind
    that of any other: so whatever moves, pads, caches or masks embeddings does it to both.
    """
    inner = inputs_embeds[..., (width := model.config.text_config.hidden_size) :]
    if inner.shape[-1]:
        every = torch.ones(inner.shape[:2], dtype=torch.bool, device=inner.device)
        inputs |= {"visual_pos_masks": every, "deepstack_visual_embeds": inner.flatten(0, 1).split(width, dim=-1)}
        inputs_embeds = inputs_embeds[..., :width]
    return model.model.language_model(inputs_embeds=inputs_embeds, **inputs)
