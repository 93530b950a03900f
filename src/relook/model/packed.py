"""Several conversations in one row of a batch: where each one lies, what it may attend to, where its positions begin.

There is no padding between the conversations of a packed row, and none depends on the others: attention is
block-diagonal and causal, and positions start anew with each.
Legend for shapes: B rows, L columns of the batch, n conversations, S columns of one segment.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from relook.errors import UserError


class Packed:
    """Which conversation each column of a batch belongs to.

    Args:
        numbers: (B, L) int64: the conversation's number in its row, from the left; -1 for padding. Example: a row of
            conversations of 3 and 2 tokens and one column of padding is [0, 0, 0, 1, 1, -1].
        attention: the language model's attention implementation, which decides how conversations are separated: by a
            boolean mask (sdpa), an additive one (eager), or positions that start anew, from which kernels for sequences
            of varying length find the conversations (flash attention: a batch of one row, no cache).

    Raises:
        UserError: a conversation is not contiguous, or this attention cannot separate conversations.
    """

    def __init__(self, numbers: Tensor, attention: str) -> None:
        self.numbers, self.attention = numbers, attention
        self.varlen = "flash" in attention
        if not self.varlen and attention not in ("sdpa", "eager"):
            raise UserError(
                f"packed conversations under attention {attention!r}; expected sdpa, eager or flash_attention_2"
            )
        if self.varlen and (len(numbers) > 1 or bool((numbers < 0).any())):
            raise UserError(
                f"packed conversations under {attention} must lie in one row without padding, got {len(numbers)} rows; "
                "set pack to more than all tokens of a batch"
            )
        self._index: dict[tuple[int, int], int] = {}
        self._pieces: list[tuple[int, slice]] = []  # row and columns of every conversation, row-major
        for row, line in enumerate(numbers.tolist()):
            end = 0
            for number, group in groupby(line):
                begin, end = end, end + len(list(group))
                if (row, number) in self._index:
                    raise UserError("conversation_ids do not lie in one piece each; expected e.g. [0, 0, 0, 1, 1, -1]")
                if number >= 0:
                    self._index[row, number] = len(self._pieces)
                    self._pieces.append((row, slice(begin, end)))

    def index(self, row: int, number: int) -> int:
        """Place in the batch, row-major, of conversation `number` of `row`."""
        return self._index[row, number]

    def unpack(self, x: Tensor, filler: int = 0) -> Tensor:
        """(B, L) -> (n, longest): a row for each conversation, row-major, padded on the right."""
        return pad_sequence([x[row, columns] for row, columns in self._pieces], batch_first=True, padding_value=filler)

    def repack(self, x: Tensor) -> Tensor:
        """(..., n, longest) -> (..., B, L), zero (False) in padding: the inverse of `unpack`."""
        out = x.new_zeros(*x.shape[:-2], *self.numbers.shape)
        for number, (row, columns) in enumerate(self._pieces):
            out[..., row, columns] = x[..., number, : columns.stop - columns.start]
        return out

    def inputs(
        self, position_ids: Tensor, dtype: torch.dtype, columns: Tensor, real: Tensor, keys: Tensor, keys_real: Tensor
    ) -> dict[str, Any]:
        """The language model's inputs that separate conversations, in a forward over some columns of the batch.

        Args:
            position_ids: (3, B, S), of those columns.
            dtype: of the embeddings.
            columns, real: (B, S): the columns that run, and which of them are tokens.
            keys, keys_real: (B, T): the columns they could attend to, themselves (the last S) included.

        Returns:
            attention_mask and position_ids.
        """
        if self.varlen:  # the text positions, in front of the three, are what the kernels read
            places = self.unpack(torch.ones_like(self.numbers)).cumsum(1) - 1
            text = self.repack(places).gather(1, columns)
            return {"attention_mask": None, "position_ids": torch.cat([text[None], position_ids])}
        ours, theirs = self.numbers.gather(1, columns), self.numbers.gather(1, keys)
        allowed = (ours[:, :, None] == theirs[:, None]) & (keys[:, None] <= columns[:, :, None])
        allowed &= real[:, :, None] & keys_real[:, None]
        own = torch.arange(columns.shape[1], device=keys.device) + keys.shape[1] - columns.shape[1]
        allowed |= own[:, None] == torch.arange(keys.shape[1], device=keys.device)  # padding sees itself, against NaNs
        if self.attention == "eager":
            none = torch.zeros((), dtype=dtype, device=keys.device)
            allowed = torch.where(allowed, none, torch.finfo(dtype).min)
        return {"attention_mask": allowed[:, None], "position_ids": position_ids}

    def full_inputs(self, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """`inputs` for all columns at once."""
        columns = torch.arange(self.numbers.shape[1], device=self.numbers.device).expand_as(self.numbers)
        real = self.numbers >= 0
        return self.inputs(position_ids, dtype, columns, real, columns, real)
