"""Items to encoded rows, and rows to one batch for the model's `forward`: padding, packing, length grouping.

`processor.encode_item` makes one row (ids, labels, pixels). A sample that cannot be read, or is longer than the cutoff,
is a `SkippedSample` in its place. Rows are joined without regard to looks: whatever vision
tensors they carry are joined under their names, so any mix of looks in a batch, and rows with none, is handled alike.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relook.data.dataset import Found, SampledItems, ValidationSplit
from relook.data.images import file_size, upright_size
from relook.data.items import Item
from relook.data.reader import Record, Unreadable
from relook.errors import RelookError, UserError
from relook.views import existing_ref, open_image

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a position that is not learnt
TEXT_KEYS = ("input_ids", "labels", "prompt_ids")  # what a row carries besides vision tensors
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that is left out of training.

    Attributes:
        example: its number; -1 for a record that has no place among the samples because it cannot be read.
        reason: "too long", "broken" or "unread".
        where: the place of its record, "file:line".
        what: what was wrong.
    """

    example: int
    reason: str
    where: str
    what: str

    @classmethod
    def too_long(cls, index: int, where: str, row: Row, cutoff: int | None) -> SkippedSample | None:
        """The sample as skipped where its row is longer than the cutoff, else None."""
        length = len(row["input_ids"])
        if cutoff is None or length <= cutoff:
            return None
        return cls(index, "too long", where, f"{length} tokens, over the cutoff of {cutoff}")


def pack_up(skipped: Sequence[SkippedSample]) -> str:
    """As text, to travel in a batch from the process that made it to the one that learns from it; "" for none."""
    return json.dumps([asdict(one) for one in skipped]) if skipped else ""


class EncodedDataset(Sequence[Any]):
    """A map-style dataset of encoded rows, as `Trainer` takes it: `dataset[i]` depends on the seed and `i` alone.

    Args:
        items: where the samples come from; `validation` holds the rows of those that are held out.
        processor: has `encode_item`.
        max_length: cutoff in tokens; a longer sample is skipped, never cut (a cut through an image's pads would leave
            pixels without a place).
        group: batches in a window within which samples are sorted by length and cut into batches that are alike in
            length (see `group_by_length`); 0 for none. `batch` is their size.
        samples: its length; the first epoch's unless given.
    """

    def __init__(
        self,
        items: SampledItems | ValidationSplit,
        processor: Any,
        max_length: int | None = None,
        group: int = 0,
        batch: int = 1,
        samples: int | None = None,
    ) -> None:
        self.items, self.processor, self.max_length = items, processor, max_length
        self.group, self.batch, self.samples = group, batch, samples
        self._window: tuple[int, list[Found]] = (-1, [])
        if isinstance(items, SampledItems):
            self.validation = EncodedDataset(items.validation, processor, max_length)

    def __len__(self) -> int:
        return len(self.items) if self.samples is None else self.samples

    def __getitem__(self, index: Any) -> Any:
        return self.encode(*self._record(index), index)

    def _record(self, index: int) -> Found:
        size = self.group * self.batch
        if not size:
            return self.items.record(index)
        window, at = divmod(index, size)
        if self._window[0] != window:
            found = [self.items.record(position) for position in range(window * size, (window + 1) * size)]
            draw = np.random.default_rng([self.items.seed, 2, window])
            order = group_by_length([self._length(*one) for one in found], self.batch, draw)
            self._window = window, [found[i] for i in order]
        return self._window[1][at]

    def _length(self, source: int, record: Record | Unreadable) -> int:
        try:
            return item_length(self.processor, self.items.item(source, record))
        except UserError:
            return 0  # it will be skipped, and reported, when it is asked for

    def encode(self, source: int, record: Record | Unreadable, index: int) -> dict[str, Any] | SkippedSample:
        """A record as sample `index`: what `processor.encode_item` gives, or why it is skipped."""
        where = record.where
        try:
            row = dict(self.processor.encode_item(opened(self.items.item(source, record)).to_dict()))
        except UserError as error:
            return SkippedSample(index, "broken", where, str(error).removeprefix(f"{where}: "))
        return SkippedSample.too_long(index, where, row, self.max_length) or row


def opened(item: Item) -> Item:
    """The item with its image files opened, each once: an image, its crop and its second look are one file."""
    files: dict[str, Any] = {}

    def shown(ref: Any) -> Any:
        if not isinstance(ref, str):
            return ref
        name, box = existing_ref(ref)
        if name not in files:
            files[name] = open_image(name)
        return files[name] if box is None else (files[name], box)

    return item.map_images(shown)


# -- batches


@dataclass
class Collator:
    """Callable from a list of samples to a batch.

    A sample may be an `Item`, an item as a published JSON object, or an encoded row; skipped ones are left out.

    Args:
        processor: has `encode_item(item, labels=True, image_root=)` and `tokenizer.pad_token_id`.
        max_length: cutoff in tokens; longer samples are left out with a warning, never cut (see `EncodedDataset`).
        image_root: folder of relative image paths.
        pad_to_multiple_of: round the padded length up to a multiple of this.
        pack: most tokens of a row that holds several conversations (see `join_packed`); 0: a row each.

    Returns:
        B rows, L the longest: `input_ids`, `attention_mask`, `labels` (B, L) int64, padded on the right; and each
        vision tensor of the rows joined along its first axis in row order (`pixel_values` (patches, dim),
        `image_grid_thw` (images, 3), `clip_*`, `detection_images`, `seg_images`).
    """

    processor: Any
    max_length: int | None = None
    image_root: str | Path | None = None
    pad_to_multiple_of: int | None = None
    pack: int = 0

    def __call__(self, samples: Sequence[Item | Row | SkippedSample]) -> dict[str, torch.Tensor]:
        encoded = [self.encode(sample) for sample in samples]
        rows = [row for row in encoded if not isinstance(row, SkippedSample)]
        pad = self.processor.tokenizer.pad_token_id
        if not rows:
            first = encoded[0]
            if not any(isinstance(sample, SkippedSample) for sample in samples) and isinstance(first, SkippedSample):
                raise RelookError(
                    f"all {len(samples)} items of a batch are too long (the first, {first.where}: {first.what}); "
                    "raise the cutoff or let images be smaller"
                )
            rows = [{"input_ids": [pad] * 2, "labels": [IGNORED] * 2}]  # nothing to learn: steps stay in step
        return join_packed(rows, pad, self.pack) if self.pack else join_rows(rows, pad, self.pad_to_multiple_of)

    def encode(self, sample: Item | Row | SkippedSample) -> Row | SkippedSample:
        """One row: what `encode_item` gives, or the row itself where it is encoded already; or why it is left out."""
        if isinstance(sample, SkippedSample):
            return sample
        data = sample.to_dict() if isinstance(sample, Item) else sample
        row = data
        if "input_ids" not in data:
            row = self.processor.encode_item(data, labels=True, image_root=self.image_root)
        over = SkippedSample.too_long(-1, _name(data), row, self.max_length)
        if over is not None:
            logger.warning("left out: %s: %s", over.where, over.what)
        return over or row


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
    return batch | _vision(rows)


def _vision(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The vision tensors of rows, each joined along its first axis; what is no sequence (a name) is left out."""
    import torch

    parts: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in TEXT_KEYS and value is not None and not isinstance(value, str | int | float) and len(value):
                parts.setdefault(key, []).append(torch.as_tensor(value))
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


def _padded(values: Any, length: int, filler: int) -> list[int]:
    values = [int(value) for value in values]
    return values + [filler] * (length - len(values))


def _name(data: Row) -> str:
    """An item in a message: its first image and the end of its question."""
    images = [ref for key, refs in data.items() if key.endswith("images") and isinstance(refs, list) for ref in refs]
    text = next((turn["content"] for turn in data.get("messages", ()) if turn["role"] == "user"), "")
    return f"{images[0] if images else 'no image'}, {text[:80]!r}"


# -- packing


def fill(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which conversations share a row: each goes into the first row with room for it (first fit, longest first).

    Within a row they keep their order. One longer than `limit` has a row of its own.

    >>> fill([3, 6, 2, 5], limit=8)
    [[1, 2], [0, 3]]
    """
    rows: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (row for row in rows if sum(lengths[i] for i in row) + lengths[number] <= limit)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(number)
    return [sorted(row) for row in rows]


def join_packed(rows: Sequence[Row], pad_id: int, limit: int) -> dict[str, torch.Tensor]:
    """Encoded rows as one batch of fewer rows, each with up to `limit` tokens of several conversations.

    Besides what `join_rows` gives: `conversation_ids` (B, L) int64, the number of each column's conversation in its
    row, -1 for padding. By them the model keeps conversations apart (`model.packed`): loss and gradients are those of
    the unpacked batch. The first token of a conversation is not learnt: before it stands the end of another.
    """
    import torch

    packed, numbers = [], []
    for members in fill([len(row["input_ids"]) for row in rows], limit):
        whole = [rows[i] for i in members]
        joined: dict[str, Any] = {"input_ids": [token for row in whole for token in row["input_ids"]]}
        if all("labels" in row for row in rows):
            joined["labels"] = [label for row in whole for label in [IGNORED, *row["labels"][1:]]]
        packed.append(joined | _vision(whole))
        numbers.append([n for n, row in enumerate(whole) for _ in row["input_ids"]])
    batch = join_rows(packed, pad_id)
    length = batch["input_ids"].shape[1]
    batch["conversation_ids"] = torch.tensor([_padded(row, length, -1) for row in numbers])
    return batch


# -- length grouping


def group_by_length(lengths: Sequence[int], batch: int, random: np.random.Generator) -> list[int]:
    """An order of the samples of a window of whole batches: batches alike in length, in random order.

    What a batch holds stays random, and less of it is padding. Ties are broken at random.
    Example: lengths 9 1 8 2 in batches of 2 give 1 3 2 0 or 2 0 1 3.
    """
    tied = random.permutation(len(lengths))
    order = tied[np.argsort(np.asarray(lengths)[tied], kind="stable")]
    return random.permutation(order.reshape(-1, batch)).flatten().tolist()


def item_length(processor: Any, item: Item) -> int:
    """Tokens of an item as `processor.encode_item` will make it; of images on disk only the headers are read.

    (A PNG whose EXIF block, behind its pixels, says that it lies on its side is taken for upright.)
    """
    from relook.processing.turns import image_stages
    from relook.processing.vocabulary import KINDS

    messages = [{"role": turn.role, "content": turn.content} for turn in item.messages]
    pads: list[int] = []
    for kind, spec in KINDS.items():
        refs = item.images.get(spec.item_key, ())
        stages = image_stages(messages) if kind == "image" else ["reencode"] * len(refs)
        pads += [_pads(processor, ref, stage, kind) for ref, stage in zip(refs, stages, strict=False)]
    ids, _ = processor.conversation_ids(messages, {kind: repeat(1) for kind in KINDS})
    return len(ids) + sum(pads) - len(pads)  # pads are tokens whatever stands beside them


def _pads(processor: Any, ref: Any, stage: str, kind: str) -> int:
    from relook.processing.pixels import is_vit, vit_size

    if not is_vit(kind):
        return processor.pad_count(kind)
    width, height = vit_size(processor.image_processor, processor.view_of(stage).target(_size(ref), processor.min_side))
    return width * height // processor.min_side**2


@lru_cache(64)  # an item shows a file and its crops
def _header_size(path: str) -> tuple[int, int] | None:
    return file_size(path, header_only=True)


def _size(ref: Any) -> tuple[int, int]:
    """(width, height) of an image entry once upright, its crop taken."""
    if isinstance(ref, str | Path):
        name, box = existing_ref(str(ref))
        size = _header_size(name)
        if size is None:
            raise UserError(f"{name}: is not there; give the path of an image")
    elif isinstance(ref, tuple):
        size, box = _size(ref[0]), tuple(ref[1])
    else:
        size, box = upright_size(ref, header_only=True), None
    if box is None:
        return size
    left, top, right, bottom = box
    return max(1, min(size[0], right) - max(0, left)), max(1, min(size[1], bottom) - max(0, top))
