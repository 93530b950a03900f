"""How many tokens an item will be, without reading a pixel, and batches of items that are alike in length.

Rows of a batch are padded to its longest; where lengths differ much, most of a batch can be padding. Within windows of
several batches, items are sorted by length and cut into batches, which are then shuffled: what a batch holds is random
still, but alike in length. Knows headers of images and the processor's rules of size; not orders of items as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from relook.data.items import Item, split_ref
from relook.errors import UserError
from relook.processing.pixels import is_vit, vit_size
from relook.processing.turns import image_stages
from relook.processing.vocabulary import KINDS

EXIF_ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)


def item_length(processor: Any, item: Item) -> int:
    """Tokens of an item as `processor.encode_item` will make it; of images on disk only the headers are read.

    (A PNG that says only behind its pixels that it lies on its side is taken for upright.)

    Raises:
        UserError: an image is missing or unreadable.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in item.messages]
    pads: list[int] = []
    for kind, spec in KINDS.items():
        refs = item.images.get(spec.item_key, ())
        stages = image_stages(messages) if kind == "image" else ["reencode"] * len(refs)
        pads += [_pads(processor, ref, stage, kind) for ref, stage in zip(refs, stages, strict=False)]
    ones = {kind: repeat(1) for kind in KINDS}
    single = [{**turn, "content": processor.expand(turn["content"], ones)} for turn in messages]
    return len(processor.prompt_ids(single)) + sum(pads) - len(pads)  # pads are tokens whatever stands beside them


def _pads(processor: Any, ref: Any, stage: str, kind: str) -> int:
    if not is_vit(kind):
        return processor.pad_count(kind)
    views = {"first": processor.first_look, "crop": processor.second_look}
    view = views.get(stage) or processor.reencode_look or processor.first_look
    width, height = vit_size(processor.image_processor, view.target(_size(ref), processor.min_side))
    return width * height // processor.min_side**2


def _size(ref: Any) -> tuple[int, int]:
    """(width, height) of an image entry once upright, its crop taken."""
    box = None
    if isinstance(ref, str | Path):
        name, box = split_ref(str(ref))
        if box is not None and not os.path.exists(name) and os.path.exists(ref):  # a file that is really called so
            name, box = str(ref), None
        size = _file_size(name)
    elif isinstance(ref, tuple):
        size, box = _size(ref[0]), tuple(ref[1])
    else:
        size = _upright_size(ref)
    if box is None:
        return size
    left, top, right, bottom = box
    return max(1, min(size[0], right) - max(0, left)), max(1, min(size[1], bottom) - max(0, top))


@lru_cache(64)  # an item shows a file and its crops
def _file_size(path: str) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _upright_size(image)
    except OSError as error:  # Pillow's own for what is no image is one, too
        raise UserError(f"{path}: is not there, or no image ({error}); give the path of an image") from None


def _upright_size(image: Any) -> tuple[int, int]:
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would read all pixels to look behind them
        return image.size
    sideways = image.getexif().get(EXIF_ORIENTATION, 1) in SIDEWAYS
    return (image.height, image.width) if sideways else image.size


def alike(lengths: Sequence[int], batch: int, random: np.random.Generator) -> list[int]:
    """An order of the items of a window of whole batches: batches alike in length, in random order.

    Ties are broken at random. Example: lengths 9 1 8 2 in batches of 2 give 1 3 2 0 or 2 0 1 3.
    """
    tied = random.permutation(len(lengths))
    order = tied[np.argsort(np.asarray(lengths)[tied], kind="stable")]
    return random.permutation(order.reshape(-1, batch)).flatten().tolist()
