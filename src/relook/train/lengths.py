"""How many tokens an item will be, without reading a pixel, and batches of items that are alike in length.

Rows of a batch are padded to its longest; where lengths differ much, most of a batch can be padding. Within windows of
several batches, items are sorted by length and cut into batches, which are then shuffled: what a batch holds is random
still, but alike in length. Knows headers of images and the processor's rules of size; not orders of items as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relook.data.items import Item, split_ref
from relook.data.questions import file_size
from relook.errors import UserError
from relook.processing.pixels import is_vit, vit_size
from relook.processing.turns import image_stages
from relook.processing.vocabulary import KINDS

EXIF_ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)


def item_length(processor: Any, item: Item) -> int:
    """Tokens of an item as `processor.encode_item` will make it; of images on disk only the headers are read.

    Raises:
        UserError: an image is missing or unreadable.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in item.messages]
    counts = {}
    for kind, spec in KINDS.items():
        refs = item.images.get(spec.item_key, ())
        stages = image_stages(messages) if kind == "image" else ["reencode"] * len(refs)
        counts[kind] = iter([_pads(processor, ref, stage, kind) for ref, stage in zip(refs, stages, strict=False)])
    expanded = [{**turn, "content": processor.expand(turn["content"], counts)} for turn in messages]
    return len(processor.prompt_ids(expanded))


def _pads(processor: Any, ref: Any, stage: str, kind: str) -> int:
    if not is_vit(kind):
        return processor.pad_count(kind)
    views = {"first": processor.first_look, "crop": processor.second_look}
    view = views.get(stage) or processor.reencode_look or processor.first_look
    width, height = vit_size(processor.image_processor, view.target(_size(ref), processor.min_side))
    return width * height // processor.min_side**2


def _size(ref: Any) -> tuple[int, int]:
    """(width, height) of an image entry once upright, its crop taken."""
    if isinstance(ref, str | Path):
        name, box = split_ref(str(ref))
        size = file_size(name, "item")
        if size is None and box is not None:  # a file that is really called like a crop
            size, box = file_size(str(ref), "item"), None
        if size is None:
            raise UserError(f"{name}: no such file; give the path of an image")
    elif isinstance(ref, tuple):
        size, box = _size(ref[0]), tuple(ref[1])
    else:
        sideways = ref.getexif().get(EXIF_ORIENTATION, 1) in SIDEWAYS
        return (ref.height, ref.width) if sideways else (ref.width, ref.height)
    if box is None:
        return size
    left, top, right, bottom = box
    return max(1, min(size[0], right) - max(0, left)), max(1, min(size[1], bottom) - max(0, top))


def alike(lengths: Sequence[int], batch: int, random: np.random.Generator) -> list[int]:
    """An order of the items of a window of whole batches: batches alike in length, in random order.

    Ties are broken at random. Example: lengths 9 1 8 2 in batches of 2 give 1 3 2 0 or 2 0 1 3.
    """
    tied = random.permutation(len(lengths))
    order = tied[np.argsort(np.asarray(lengths)[tied], kind="stable")]
    return random.permutation(order.reshape(-1, batch)).flatten().tolist()
