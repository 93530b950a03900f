"""Input formats: a row for each form of file, from which questions and items are read.

`FORMATS` is the table: how a file is recognized, and the function that reads it. A `Source` is a file or folder opened
by its row, as every command opens it: it gives the same typed objects from every form, one at a time: a `Question`
(from which items of any look can be built), or an `Item` where the source holds whole conversations.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from relook.boxes import parse_units
from relook.data.dialect import BoxFit
from relook.data.forms.annotated import Reading, shaped
from relook.data.forms.chat import llava_conversation, pope_question, swift_record, viscot_question
from relook.data.forms.detection import VG_LISTS, read_coco, read_visual_genome
from relook.data.forms.detections import read_cvat, read_voc, read_yolo
from relook.data.forms.documents import read_cord, read_docvqa, read_funsd
from relook.data.forms.recognize import LIST, Keys, first_record, folder_samples, some_record
from relook.data.forms.table import class_names, has_corners, read_hub, row_question, several_images, stored_image
from relook.data.forms.tools import is_label_studio, is_via, read_label_studio, read_labelme, read_via
from relook.data.items import COLUMNS, IMAGE_KEYS, Item, LeftOut, Question, item_question
from relook.data.published import fetch
from relook.data.reader import Record, Unreadable, folder_of, parquet_files, readable, scan
from relook.data.records import Records, holds_items, is_saved_dataset, records, saved_columns
from relook.data.settings import stored_settings
from relook.errors import UserError

logger = logging.getLogger(__name__)

Found = Question | Item


@dataclass(frozen=True)
class Format:
    """One form of file.

    Attributes:
        what: the form in a few words, for people.
        recognizes: whether a file's first record (or the keys of its one object) is of this form; asked in the order
            of the table.
        parse: makes one question or item of a record (its place, how it is read), where the file is a list of them.
        read: yields those of a file or folder, where it is not; what cannot be used is a `LeftOut` in its place.
        folder: whether a folder of such files is a set.
        asks: whether its regions become questions, for which `--ask` is a template.
    """

    name: str
    what: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[dict[str, Any], str, Reading], Found] | None = None
    read: Callable[[Path, Reading], Iterator[Found | LeftOut]] | None = None
    folder: bool = False
    asks: bool = False


def _parsed(parse: Callable[[dict[str, Any], str], Found]) -> Callable[[dict[str, Any], str, Reading], Found]:
    return lambda data, where, reading: parse(_renamed(data, reading.columns, where), where)


def _renamed(data: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The record with its own keys also under the names that they are given."""
    if lacking := [theirs for theirs in columns.values() if theirs not in data]:
        raise UserError(f"{where}: has no {lacking[0]!r}, which columns names, among its keys ({', '.join(data)})")
    return {**data, **{ours: data[theirs] for ours, theirs in columns.items()}}


def record_thing(data: dict[str, Any], where: str, reading: Reading) -> Found:
    """The item of a published record; of another one the question, or an item where it shows several images."""
    if "messages" in data:
        objects = data.get("objects")
        is_swift = isinstance(objects, Mapping) and bool({"ref", "bbox"} & {*objects})
        return swift_record(data, where) if is_swift else stored_item(data, where)
    return several_images(data, reading.columns, where) or row_question(data, reading.columns, where)


def stored_item(data: dict[str, Any], where: str) -> Item:
    """The item of a record, whose images may be those of an undecoded column."""
    lists = {key: data[key] for key in IMAGE_KEYS if isinstance(data.get(key), list)}
    if any(isinstance(ref, dict) for refs in lists.values() for ref in refs):  # an image column of a dataset
        data = data | {key: [stored_image(ref, where) for ref in refs] for key, refs in lists.items()}
    return Item.from_dict(data, where)


def _is_viscot(data: Mapping[str, Any]) -> bool:
    images = data.get("image")
    return isinstance(images, list) and len(images) == 2 and "###" in str(images[1])


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: any(key in data for key in keys)


def _lists(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a list of objects has one of these names: of a whole file it is `LIST`, not read."""
    return lambda data: any(data.get(key) is LIST or _of_objects(data.get(key)) for key in keys)


def _of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _all(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: {*keys} <= {*data}


def _is_coco(data: Mapping[str, Any]) -> bool:
    return "annotations" in data or data.get("images") is LIST


def _is_question(data: Mapping[str, Any]) -> bool:
    """Whether a record has a question, whatever else it has; a text with its label only beside a box."""
    boxed = _has(*COLUMNS["bboxs"])(data) or has_corners(data)
    return _has("question", "query", "prompt")(data) or (boxed and _all("text", "label")(data))


# fmt: off
_ROWS = (
    Format("swift", '{"messages", "objects": {"ref", "bbox"}} of ms-swift', _all("messages", "objects"),
           _parsed(swift_record)),
    Format("items", '{"messages", "images", ...}', _has("messages"), record_thing),
    Format("viscot", '{"image": [path, path###[box]], "conversations"}', _is_viscot, _parsed(viscot_question)),
    Format("llava", '{"image", "conversations"}', _has("conversations"), _parsed(llava_conversation)),
    Format("label-studio", "Label Studio's JSON or JSON-MIN", is_label_studio, read=read_label_studio, asks=True),
    Format("questions", '{"image", "question", "answer", "bboxs"}, CSV, TSV', _is_question, record_thing),
    Format("labelme", '{"shapes", "imagePath"}: a file or a folder of LabelMe', _lists("shapes"), read=read_labelme,
           folder=True, asks=True),
    Format("funsd", '{"form": [{"box", "text", "linking"}]}: a file or a folder', _lists("form"), read=read_funsd,
           folder=True, asks=True),
    Format("cord", '{"valid_line": [{"words", "category"}]}: a file or a folder', _lists("valid_line"), read=read_cord,
           folder=True, asks=True),
    Format("docvqa", '{"data": [{"question", "image", "answers"}]}', _lists("data"), read=read_docvqa),
    Format("via", '{NAME: {"filename", "regions"}}: a project or annotations of VIA', is_via, read=read_via, asks=True),
    Format("coco", '{"images", "annotations", "categories"}', _is_coco, read=read_coco, asks=True),
    Format("vg", '{"regions"}, {"objects"} or {"qas"}', _has(*VG_LISTS), read=read_visual_genome),
    Format("voc", "XML of Pascal VOC: a file or a folder", _has("<annotation>"), read=read_voc, folder=True, asks=True),
    Format("cvat", "XML of CVAT for images", _has("<annotations>"), read=read_cvat, asks=True),
    Format("yolo", "YOLO's data.yaml, or its folder", _has("names", "classes.txt"), read=read_yolo, folder=True,
           asks=True),
    Format("pope", '{"image", "text", "label"}', _all("text", "label"), _parsed(pope_question)),
    Format("hub", "a dataset with an image column: hub id, folder, parquet", lambda data: False),
)
# fmt: on
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
COUNTED = ("label-studio", "yolo")  # forms whose boxes are shares of the image


class Source:
    """A source as every command reads it: its form, its records from front to back or by number, and their things.

    Args:
        source: a file, a folder of annotations or a dataset (see `table.read_hub`), or the name of a published set,
            which is then downloaded.
        format: a row of `FORMATS`; recognized unless given.
        image_root: the folder that paths of images hold from; that of the file unless given.
        columns, ask, split: see `annotated.Reading`.
        units: dialect of all boxes ("0-1000 xywh", see `relook.boxes`); None: as the form has it.

    Raises:
        UserError: no such file, an unknown form, or an option that its form does not have.
    """

    def __init__(
        self,
        source: str | Path,
        format: str | None = None,
        *,
        image_root: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        ask: str | None = None,
        split: str | None = None,
        units: str | None = None,
    ) -> None:
        self.units, self.fit = units, BoxFit(said=parse_units(units or "pixels") and units is not None)
        if format is not None and format not in FORMATS:
            raise UserError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
        self.source = fetch(source)
        self.path = Path(self.source)
        self.form = FORMATS[format or recognize(self.source, columns)]
        name = self.form.name
        if split and name not in ("hub", "yolo") and not is_saved_dataset(self.path):
            raise UserError(f"{self.path}: read as {name}, which has no split; only datasets have")
        if units and self.form.read is not None and (name in COUNTED or parse_units(units)[1] != "xyxy"):
            raise UserError(
                f"{self.path}: read as {name}, which says itself what a box's numbers are; leave out --units"
            )
        known = [*COLUMNS, *(("label", "text") if self.form.asks else ())]
        if self.form.parse in (None, record_thing) and (other := [ours for ours in columns or {} if ours not in known]):
            raise UserError(f"{self.path}: --columns {other[0]}=...: read as {name}, which has {', '.join(known)}")
        if ask and not self.form.asks:
            raise UserError(f"{self.path}: read as {name}, whose questions are its own; leave out --ask")
        self.reading = Reading(Path(image_root or folder_of(self.path)), dict(columns or {}), ask, split)

    @property
    def streams(self) -> bool:
        """Whether it is a list of records that can be read one at a time, and again by number."""
        here = is_saved_dataset(self.path) or bool(parquet_files(self.path))
        return self.form.parse is not None or (self.form.name == "hub" and here)

    def scan(self) -> Iterator[Record | Unreadable]:
        """The records, from front to back; `thing` says what they hold."""
        if self.form.parse is None:
            return self._made()
        return iter(self.records()) if is_saved_dataset(self.path) else scan(self.path)

    def records(self, held: int = 0) -> Records:
        """The records by number; of a form that is no list of records, all its questions are held in memory."""
        if self.streams:
            return records(self.path, self.reading.split or "train", held)
        return Records(list(self._made()))

    def settings(self) -> dict[str, Any]:
        """How its items were built, as the first of them stores it; {} for other forms."""
        return stored_settings(self.scan()) if self.form.parse is not None else {}

    def _made(self) -> Iterator[Record]:
        if self.form.read is None:
            found: Iterator[Any] = read_hub(self.source, self.reading.split or "train", self.reading.columns)
        else:
            found = self.form.read(self.path, self.reading)
        for thing in found:
            where = thing.where
            line = where.rpartition(":")[2].partition(",")[0]
            yield Record({"item": thing}, str(self.path), int(line) if line.isdigit() else 0, place=where)

    def thing(self, record: Record) -> Found:
        """The question or item of a record, its images with paths as written.

        Raises:
            LeftOut: it is of the form and cannot be used.
            UserError: it is not of the form.
        """
        given = record.value.get("item")
        if isinstance(given, LeftOut):
            raise given
        if isinstance(given, Question | Item):
            return self.stated(given)
        parse, value = self.form.parse or record_thing, record.value
        for name, labels in self._labels.items():
            if isinstance(value.get(name), int) and 0 <= value[name] < len(labels):
                value = {**value, name: labels[value[name]]}
        with shaped(record.where, self.form.name):
            return self.stated(parse(value, record.where, self.reading))

    def stated(self, thing: Found) -> Found:
        """The thing with its boxes in the units that are stated."""
        return thing if self.units is None or isinstance(thing, Item) else thing.counted_in(self.units)

    def things(self) -> Iterator[Found]:
        """What all records hold; those that cannot be used are left out, and how many is logged."""
        lost: list[LeftOut] = []
        for record in map(readable, self.scan()):
            try:
                yield self.thing(record)
            except LeftOut as error:
                lost.append(error)
        if lost:
            _say_once(f"{self.path}: {len(lost)} records left out, the first: {lost[0]}")

    @cached_property
    def _labels(self) -> dict[str, list[str]]:
        """Columns of a dataset that hold class labels, and the names of the classes."""
        return class_names(self.path, self.reading.split or "train") if self.form.name == "hub" else {}


def read(source: str | Path, format: str | None = None, **reading: Any) -> Iterator[Found]:
    """The questions and items of a source, one at a time; images with paths as written. Arguments: see `Source`.

    Raises:
        UserError: no such file, an unknown form, or a record that is not of it or cannot be used; with file and line.
    """
    opened = Source(source, format, **reading)
    return map(opened.thing, map(readable, opened.scan()))


def read_questions(path: str | Path, image_root: str | Path | None = None, **reading: Any) -> Iterator[Question]:
    """The questions of a source of any form (of items: those they were built from), lazily.

    Image paths are placed below `image_root`, or the file's folder. Records that cannot be used are left out, and
    how many is logged.
    """
    opened = Source(path, image_root=image_root, **reading)
    root = folder_of(opened.path) if image_root is None else image_root
    for found in opened.things():
        thing = found.under(root, strict=image_root is not None)
        question = item_question(thing) if isinstance(thing, Item) else thing
        if question is None:
            raise UserError(f"{thing.where}: an item without a question about one image; expected one to ask")
        yield question.in_pixels(opened.fit)
    opened.fit.refuse(path)


@cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def recognize(source: str | Path, columns: Mapping[str, str] | None = None) -> str:
    """The form of a source, from its first record or the files in a folder (a megabyte of a file at most is read)."""
    path = Path(source)
    if path.is_dir() and not is_saved_dataset(path) and not parquet_files(path):
        for file in folder_samples(path):
            found = _row(first_record(file, lambda seen: _row(seen) is not None), {})
            if found is not None and found.folder:
                return found.name
    if is_saved_dataset(path):
        return "items" if "messages" in saved_columns(path) else "hub"
    if is_dataset(source):
        return "hub"
    if parquet_files(path):
        return "items"
    first = first_record(path, lambda seen: _row(seen, columns) is not None)
    found = _row(first, columns)
    if found is not None and found.parse is not None and isinstance(first, Keys):
        found = _row(some_record(path), columns)  # lines, of which the first is broken?
        if found is None:
            raise UserError(
                f"{path}: is one JSON object over several lines; put each object on a line of its own, or all in [ ]"
            )
    if found is not None:
        return found.name
    if not first:
        return "items"  # an empty file: who reads it says so
    keys = ", ".join(list(first)[:12])
    raise UserError(
        f"{path}: not of a known form (its first record has {keys}); name its columns with --columns question=NAME, "
        f"or give one of the forms: {'; '.join(f'{row.name} {row.what}' for row in FORMATS.values())}"
    )


def _row(first: Mapping[str, Any], columns: Mapping[str, str] | None = None) -> Format | None:
    named = {**first, **{ours: first[theirs] for ours, theirs in (columns or {}).items() if theirs in first}}
    return next((row for row in FORMATS.values() if row.recognizes(named)), None)


def is_dataset(source: str | Path) -> bool:
    """Whether a source is a dataset: a folder, a Parquet file, or text that looks like a hub id and is no file.

    Parquet of items, as `relook data convert` writes it, is none.
    """
    path = Path(source)
    if path.exists() or isinstance(source, Path):
        return (path.is_dir() or path.suffix == ".parquet") and not holds_items(path)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None and not path.suffix.startswith(".json")
