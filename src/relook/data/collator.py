"""Items to one batch for the model's `forward`: right padding, labels, and every look's pixels in row-major order.

Encoding one item (its ids, labels and pixels) is the processor's work; this module only joins rows. It refuses
to know looks: whatever vision tensors the rows carry are joined under their names, so any mix of looks in a batch, and
rows with none, go through the same lines.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from relook.data.items import Item
from relook.errors import RelookError, UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a position that is not learnt
TEXT_KEYS = ("input_ids", "labels", "prompt_ids")  # what a row carries besides vision tensors
Row = Mapping[str, Any]


@dataclass
class TooLong:
    """Items left out because they were longer than the cutoff: how many, and the longest seen (tokens)."""

    count: int = 0
    longest: int = 0


@dataclass
class Collator:
    """Callable from a list of items to a batch.

    A row may be an `Item`, an item as a published JSON object, or a row that `processor.encode_item` made before.

    Args:
        processor: has `encode_item(item, labels=True, image_root=)` and `tokenizer.pad_token_id`.
        max_length: cutoff in tokens; None for no cutoff. A cut through an image's pads would leave pixels without a
            place, so a longer item is never cut: it is left out with a warning (`too_long="drop"`) or stops the
            work (`"error"`).
        image_root: folder of relative image paths.
        pad_to_multiple_of: round the padded length up to a multiple of this.

    The batch (B rows, L the longest): `input_ids`, `attention_mask`, `labels` (B, L) int64, padded on the right;
    and each vision tensor of the rows joined along its first axis in row order (`pixel_values` (patches, dim),
    `image_grid_thw` (images, 3), `clip_*`, `detection_images`, `seg_images`).
    """

    processor: Any
    max_length: int | None = None
    too_long: Literal["drop", "error"] = "drop"
    image_root: str | Path | None = None
    pad_to_multiple_of: int | None = None
    left_out: TooLong = field(default_factory=TooLong)

    def __call__(self, items: Sequence[Item | Row]) -> dict[str, torch.Tensor]:
        rows = [row for row in (self._within(self.encode(item), item) for item in items) if row is not None]
        if not rows:
            raise RelookError(
                f"all {len(items)} items of a batch are longer than the cutoff of {self.max_length} tokens "
                f"(longest {self.left_out.longest}); raise the cutoff or let images be smaller"
            )
        return join_rows(rows, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of)

    def encode(self, item: Item | Row) -> Row:
        """One row: what `encode_item` gives, or the row itself where it is encoded already."""
        if isinstance(item, Item):
            item = item.to_dict()
        if "input_ids" in item:
            return item
        return self.processor.encode_item(item, labels=True, image_root=self.image_root)

    def _within(self, row: Row, item: Item | Row) -> Row | None:
        length = len(row["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return row
        message = f"an item has {length} tokens, over the cutoff of {self.max_length}: {_name(item)}"
        if self.too_long == "error":
            raise UserError(f"{message}; raise the cutoff or let images be smaller")
        self.left_out.count += 1
        self.left_out.longest = max(self.left_out.longest, length)
        logger.warning("%s; left out (%d so far)", message, self.left_out.count)
        return None


def join_rows(rows: Sequence[Row], pad_id: int, multiple: int | None = None) -> dict[str, torch.Tensor]:
    """Encoded rows as one batch, padded on the right (see `Collator` for shapes)."""
    import torch

    length = max(len(row["input_ids"]) for row in rows)
    if multiple:
        length = -(-length // multiple) * multiple
    batch = {
        "input_ids": torch.tensor([_padded(row["input_ids"], length, pad_id) for row in rows]),
        "attention_mask": torch.tensor([_padded([1] * len(row["input_ids"]), length, 0) for row in rows]),
    }
    if all("labels" in row for row in rows):
        batch["labels"] = torch.tensor([_padded(row["labels"], length, IGNORED) for row in rows])
    for key in dict.fromkeys(key for row in rows for key in row if key not in TEXT_KEYS):
        parts = [torch.as_tensor(row[key]) for row in rows if row.get(key) is not None and len(row[key])]
        if parts:
            batch[key] = torch.cat(parts)
    return batch


def _padded(values: Any, length: int, filler: int) -> list[int]:
    values = [int(value) for value in values]
    return values + [filler] * (length - len(values))


def _name(item: Item | Row) -> str:
    """An item in a message: its first image and the end of its question."""
    data = item.to_dict() if isinstance(item, Item) else item
    images = [ref for key, refs in data.items() if key.endswith("images") and isinstance(refs, list) for ref in refs]
    text = next((turn["content"] for turn in data.get("messages", ()) if turn["role"] == "user"), "")
    return f"{images[0] if images else 'no image'}, {text[:80]!r}"
