"""Keys and values of several conversations side by side, each growing at its own pace.

`KVRows` is a batch of rows over one key/value cache, with a mask of which columns are tokens of which row. A row can be
extracted with its own tokens, the others selected, and rows merged into a batch again. What a row attends to does not
depend on the other rows: padding stays in the cache but is always masked.

Worked example, two rows (. is padding). Row a holds 3 tokens, row b holds 5:

    merge([a, b])      a a a . .        forward, one token each    a a a . . a      extract(0)    a a a a
                       b b b b b        ----------------------->   b b b b b b      --------->
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Pair = tuple[Tensor, Tensor]  # keys and values of one layer, each (B, heads, T, head_dim)


class KVRows:
    """A cache of B rows and T columns.

    Args:
        layers: one (keys, values) per decoder layer, each (B, heads, T, head_dim); empty before the first forward.
        mask: (B, T) bool, True where the column is a token of the row.
    """

    def __init__(self, layers: Sequence[Pair], mask: Tensor):
        self.layers = list(layers)
        self.mask = mask

    @classmethod
    def empty(cls, rows: int = 1, device: torch.device | str = "cpu") -> KVRows:
        """`rows` rows without tokens."""
        return cls([], torch.zeros(rows, 0, dtype=torch.bool, device=device))

    def __len__(self) -> int:
        """Number of rows B."""
        return self.mask.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.mask.sum(1).tolist()

    def forward(self, model: Any, embeds: Tensor, position_ids: Tensor, real: Tensor) -> Tensor:
        """Run new tokens through the language model; the rows grow by them.

        Args:
            model: has `decode(inputs_embeds, attention_mask, position_ids, past_key_values) -> (B, L, d)`.
            embeds: (B, L, d) input embeddings, padded on the right.
            position_ids: (3, B, L).
            real: (B, L) bool, True where the place is a token.

        Returns:
            (B, L, d) final normed hidden states (meaningless where `real` is False).
        """
        self.mask = torch.cat([self.mask, real], dim=1)
        cache = _as_cache(self.layers)
        hidden = model.decode(
            inputs_embeds=embeds, attention_mask=self.mask.long(), position_ids=position_ids, past_key_values=cache
        )
        self.layers = [(keys, values) for keys, values, *_ in cache]
        return hidden

    def copy(self) -> KVRows:
        """The same rows, to grow independently. Nothing is copied: a forward never writes into existing tensors."""
        return KVRows(self.layers, self.mask)

    def select_rows(self, rows: Sequence[int]) -> KVRows:
        """The given rows, columns as they are (no copy where all rows stay in place)."""
        if list(rows) == list(range(len(self))):
            return self
        index = torch.tensor(list(rows), dtype=torch.long, device=self.mask.device)
        return KVRows(
            [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers],
            self.mask.index_select(0, index),
        )

    def extract(self, row: int) -> KVRows:
        """One row on its own, without its padding: a cache with B = 1 whose mask is all True."""
        if len(self) == 1 and bool(self.mask.all()):
            return self
        columns = self.mask[row].nonzero().flatten()
        one = slice(row, row + 1)
        return KVRows(
            [(k[one, :, columns], v[one, :, columns]) for k, v in self.layers],
            torch.ones(1, len(columns), dtype=torch.bool, device=self.mask.device),
        )

    def head(self, length: int) -> KVRows:
        """The first `length` columns; the rows themselves where they have no more."""
        if length >= self.mask.shape[1]:
            return self
        return KVRows([(k[:, :, :length], v[:, :, :length]) for k, v in self.layers], self.mask[:, :length])

    @classmethod
    def merge(cls, parts: Sequence[KVRows]) -> KVRows:
        """Caches side by side in one batch, in order: padding columns dropped, shorter rows padded on the right."""
        if len(parts) == 1:
            return parts[0]
        singles = [part.extract(row) for part in parts for row in range(len(part))]
        width = max(part.mask.shape[1] for part in singles)
        mask = torch.cat([_pad(part.mask, width, dim=1) for part in singles])
        deep = next((part.layers for part in singles if part.layers), [])
        nothing = [(k[:1, :, :0], v[:1, :, :0]) for k, v in deep]  # of a row without tokens
        rows = [part.layers or nothing for part in singles]
        join = lambda tensors: torch.cat([_pad(x, width, dim=2) for x in tensors])  # noqa: E731
        layers = [tuple(join([row[n][i] for row in rows]) for i in (0, 1)) for n in range(len(deep))]
        return cls(layers, mask)  # type: ignore[arg-type]  # a pair each


def _as_cache(layers: Sequence[Pair]) -> DynamicCache:
    """A DynamicCache over existing tensors, without the copy its constructor would make."""
    cache = DynamicCache()
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _pad(x: Tensor, width: int, dim: int) -> Tensor:
    """x with zeros (False) after its end along `dim`, up to `width`."""
    shape = list(x.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim=dim) if shape[dim] else x
