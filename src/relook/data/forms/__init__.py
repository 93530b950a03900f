"""Input formats: a row for each form of file, from which questions and items are read.

`FORMATS` is the table: how a file is recognized, and the function that reads it. `read` yields the same typed objects
from every form, one at a time: a `Question` (from which items of any look can be built), or an `Item` where the source
holds whole conversations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.data.forms.chat import llava_conversation, pope_question, viscot_question
from relook.data.forms.detection import VG_LISTS, read_coco, read_visual_genome
from relook.data.forms.table import read_hub
from relook.data.items import Item, Question
from relook.data.published import fetch
from relook.data.reader import open_input, parquet_files, read_records
from relook.data.records import holds_items
from relook.errors import UserError

PEEK = 1 << 20  # bytes read to recognize a file

Found = Question | Item


@dataclass(frozen=True)
class Format:
    """One form of file.

    Attributes:
        what: the form in a few words, for people.
        read: yields the questions and items of a file.
        recognizes: whether a file's first record is of this form (asked in the order of the table).
    """

    name: str
    what: str
    read: Callable[[Path], Iterator[Found]]
    recognizes: Callable[[dict[str, Any]], bool]


def _each(parse: Callable[[dict[str, Any], str], Found]) -> Callable[[Path], Iterator[Found]]:
    """A reader of a list of records, of which `parse` makes one question or item each."""
    return lambda path: (parse(record.value, record.where) for record in read_records(path))


def _is_viscot(data: dict[str, Any]) -> bool:
    images = data.get("image")
    return isinstance(images, list) and len(images) == 2 and "###" in str(images[1])


def _has(*keys: str) -> Callable[[dict[str, Any]], bool]:
    return lambda data: any(key in data for key in keys)


# fmt: off
_ROWS = (
    Format("items", '{"messages", "images", ...}', _each(Item.from_dict), _has("messages")),
    Format("viscot", '{"image": [path, path###[box]], "conversations"}', _each(viscot_question), _is_viscot),
    Format("llava", '{"image", "conversations"}', _each(llava_conversation), _has("conversations")),
    Format("coco", '{"images", "annotations", "categories"}', read_coco, _has("annotations")),
    Format("vg", '{"regions"}, {"objects"} or {"qas"}', read_visual_genome, _has(*VG_LISTS)),
    Format("pope", '{"image", "text", "label"}', _each(pope_question), lambda data: {"text", "label"} <= {*data}),
    Format("questions", '{"image", "question", "answer", "bboxs"}', _each(Question.from_dict), _has("question")),
    Format("hub", "a dataset with an image column: hub id, folder, parquet", read_hub, lambda data: False),
)
# fmt: on
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}


def read(
    source: str | Path,
    format: str | None = None,
    *,
    image_folder: str | Path | None = None,
    split: str | None = None,
    columns: dict[str, str] | None = None,
) -> Iterator[Found]:
    """The questions and items of a source, one at a time; images with paths as written.

    Args:
        source: a file, a dataset (see `table.read_hub`), or the name of a published set, which is then downloaded.
        format: a row of `FORMATS`; recognized from the file unless given.
        image_folder: the items file of a build; images of datasets are written beside it, into `NAME_images`. Without
            it they stay in memory.
        split ("train" unless given), columns: of a dataset, and of nothing else.

    Raises:
        UserError: no such file, an unknown form, or a record that is not of it; with file and line.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    path = fetch(source)
    name = format or recognize(path)
    if name == "hub":
        beside = None if image_folder is None else Path(image_folder)
        folder = None if beside is None else beside.with_name(f"{beside.stem}_images")
        return read_hub(path, split or "train", columns, folder)
    if split or columns:
        raise UserError(f"{path}: read as {name}, which has no {'split' if split else 'columns'}; only datasets have")
    return FORMATS[name].read(Path(path))


def recognize(source: str | Path) -> str:
    """The form of a source, from its first record (a megabyte at most is read)."""
    if is_dataset(source):
        return "hub"
    path = Path(source)
    if parquet_files(path):
        return "items"
    first = _first_record(path)
    for row in FORMATS.values():
        if row.recognizes(first):
            return row.name
    raise UserError(
        f"{path}: not of a known form (its first record has {', '.join(first) or 'nothing'}); "
        f"known: {'; '.join(f'{row.name} {row.what}' for row in FORMATS.values())}"
    )


def is_dataset(source: str | Path) -> bool:
    """Whether a source is a dataset: a folder, a Parquet file, or what looks like a hub id and is no file.

    Parquet of items, as `relook data convert` writes it, is none.
    """
    path = Path(source)
    if path.exists():
        return (path.is_dir() or path.suffix == ".parquet") and not holds_items(path)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not path.suffix.startswith(".json")


def _first_record(path: Path) -> dict[str, Any]:
    with open_input(path) as file:
        head = file.read(PEEK)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        line, newline, _ = text.partition(b"\n")
        if newline or len(head) < PEEK:
            try:
                return dict(json.loads(line))
            except ValueError:
                pass
        if b'"annotations"' in head or b'"images"' in head:
            return {"annotations": None}  # one object over many lines, or one line longer than this: COCO's form
    return next((record.value for record in read_records(path)), {})
