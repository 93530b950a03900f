"""One record of a source to one item of a stage: read, placed, and, when it is drawn, opened.

Knows forms of records and files of images; not orders, not what is learnt.
"""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.builder import build_item
from relook.data.hub import COLUMNS
from relook.data.items import IMAGE_KEYS, Item, split_ref
from relook.data.options import BuildOptions
from relook.data.questions import Question, placed
from relook.data.stream import Row, folder_of
from relook.errors import UserError
from relook.train.recipe import Data, ItemSource
from relook.views import open_image


def opened(item: Item) -> Item:
    """The item with its image files opened, each once: a page, its crop and its second look are one file.

    Raises:
        UserError: an image is missing or broken; names it.
    """
    files: dict[str, Any] = {}

    def shown(ref: Any) -> Any:
        if not isinstance(ref, str):
            return ref
        name, box = split_ref(ref)
        if box is not None and not os.path.exists(name) and os.path.exists(ref):  # a file that is really called so
            name, box = ref, None
        if name not in files:
            files[name] = open_image(name)
        return files[name] if box is None else (files[name], box)

    return replace(item, images={key: tuple(shown(ref) for ref in refs) for key, refs in item.images.items()})


def build_options(data: Data, processor: Any = None) -> BuildOptions:
    """How questions become items: on the grid, with the margin and in the order that the model is going to see.

    Without a processor (a start that is not here) as the published models were trained.
    """
    if processor is None:
        return BuildOptions(no_box="direct", free_choice=data.free_choice)
    return BuildOptions(
        no_box="direct",
        grid=processor.grid_size,
        margin=processor.region_margin,
        free_choice=data.free_choice or processor.free_choice,
        question_first=processor.question_first,
    )


def made(row: Row, source: ItemSource, options: BuildOptions) -> Item:
    """The item of a record: a published item as it is; a question by the source's look, built by `options`.

    Images are placed below the source's `image_root` (which they may not leave) or the folder of its file; those that a
    dataset holds as bytes stay in memory.
    """
    root = source.image_root if source.image_root is not None else folder_of(Path(row.file))
    strict = source.image_root is not None
    if "messages" in row.value:
        lists = {key: [_picture(ref, row.where) for ref in row.value.get(key) or ()] for key in IMAGE_KEYS}
        try:
            item = Item.from_dict({**row.value, **lists}, row.where).under(root, strict=strict)
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(row.where) else f"{row.where}: {text}") from None
        return item
    question = placed(_question(row, source), root, strict=strict)
    item_or_none = build_item(question, replace(options, look=source.look))
    assert item_or_none is not None  # no_box="direct" skips nothing
    return item_or_none


def _question(row: Row, source: ItemSource) -> Question:
    """The question of a record with columns image, question, answer and perhaps boxes, under any of their names."""
    found: dict[str, Any] = {}
    for ours, names in COLUMNS.items():
        wanted = (source.columns[ours],) if ours in source.columns else names
        name = next((name for name in wanted if row.value.get(name) is not None), None)
        if name is None and ours != "bboxs":
            raise UserError(f"{row.where}: has no {ours!r} among {', '.join(row.value)}; name it under columns:")
        found[ours] = None if name is None else row.value[name]
    picture = _picture(found["image"], row.where)
    boxes = found["bboxs"]
    if boxes and not isinstance(boxes[0], list):
        boxes = [boxes]
    in_file = isinstance(picture, str)
    sides = {side: row.value[side] for side in ("width", "height") if row.value.get(side) is not None}
    line = {**found, **sides, "bboxs": boxes, "image": picture if in_file else "-"}
    question = Question.from_dict(line, row.where)
    return question if in_file else Question(picture, question.text, question.answers, question.boxes, where=row.where)


def _picture(ref: Any, where: str) -> Any:
    """An image entry as items hold it; the bytes of a dataset's image column as a picture that is not decoded yet."""
    if not isinstance(ref, dict) or not {"bytes", "path"} & set(ref):
        return ref
    if ref.get("bytes") is None:
        return ref.get("path")
    from PIL import Image

    try:
        return Image.open(io.BytesIO(ref["bytes"]))
    except OSError:
        raise UserError(f"{where}: its image cannot be read") from None
