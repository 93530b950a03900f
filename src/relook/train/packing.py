"""Several conversations in one row of a batch, so that next to nothing of it is padding.

`join_packed` takes the rows that `collator.join_rows` takes and gives the same batch with fewer, fuller rows, and
`conversation_ids`, by which the model keeps them apart (`model.packed`): loss and gradients are those of the unpacked
batch. Knows lengths and tensors; not looks, not models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from relook.data.collator import IGNORED, TEXT_KEYS, Row, join_rows

if TYPE_CHECKING:
    import torch


def fill(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which conversations share a row: each goes into the first row with room for it (first fit, longest first).

    Within a row they keep their order. One longer than `limit` has a row of its own.

    >>> fill([3, 6, 2, 5], limit=8)
    [[1, 2], [0, 3]]
    """
    rows: list[tuple[int, list[int]]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((i for i, (used, _) in enumerate(rows) if used + lengths[number] <= limit), None)
        if at is None:
            rows.append((lengths[number], [number]))
        else:
            rows[at] = (rows[at][0] + lengths[number], [*rows[at][1], number])
    return [sorted(members) for _, members in rows]


def join_packed(rows: Sequence[Row], pad_id: int, limit: int) -> dict[str, torch.Tensor]:
    """Encoded rows as one batch whose rows hold up to `limit` tokens of several conversations each.

    Besides what `join_rows` gives: `conversation_ids` (B, L) int64, the number of each column's conversation in its
    row, -1 for padding. The first token of a conversation is not learnt: what stands before it is another one's end.
    """
    import torch

    packed, numbers = [], []
    for members in fill([len(row["input_ids"]) for row in rows], limit):
        whole = [rows[i] for i in members]
        joined: dict[str, object] = {"input_ids": [token for row in whole for token in row["input_ids"]]}
        if all("labels" in row for row in rows):
            joined["labels"] = [label for row in whole for label in [IGNORED, *row["labels"][1:]]]
        for key in dict.fromkeys(key for row in whole for key in row if key not in TEXT_KEYS):
            parts = [torch.as_tensor(row[key]) for row in whole if row.get(key) is not None and len(row[key])]
            if parts:
                joined[key] = torch.cat(parts)
        packed.append(joined)
        numbers.append([n for n, row in enumerate(whole) for _ in row["input_ids"]])
    batch = join_rows(packed, pad_id)
    length = batch["input_ids"].shape[1]
    batch["conversation_ids"] = torch.tensor([row + [-1] * (length - len(row)) for row in numbers])
    return batch
