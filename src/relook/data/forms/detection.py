"""Detection annotations, as COCO and Visual Genome publish them, as questions whose answers the boxes give.

COCO: one object of a file {"images": [{id, file_name, width, height}], "annotations": [{image_id, category_id,
bbox: [x, y, width, height]}], "categories": [{id, name}]}. For each image and category: how many are there, with all
their boxes. Where an annotation has a `question` and an `answer` of its own, that is the question.

Visual Genome: a list of images, each with its `regions` ({x, y, width, height, phrase}), `objects` ({x, y, w, h,
names}) or `qas` ({question, answer, a_objects, q_objects: [{x, y, w, h}]}). For each region, and each object whose name
no other in the image has: where it is, in words; a question keeps its own words, and its objects' boxes where it has
any. `image_data.json` beside the file tells folders and sizes.

No sentence here needs a model: counts and places follow from the boxes. Boxes become x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.forms.annotated import (
    AROUND,
    HOW_MANY,
    Found,
    Reading,
    Region,
    around,
    numbers,
    page_questions,
    shaped,
    turned,
)
from relook.data.items import Question
from relook.data.reader import Record, read_members, read_records
from relook.errors import UserError

WHERE = 'Where in the image is this: "{name}"? Answer with a place such as "top left".'
VG_LISTS = ("regions", "objects", "qas")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def read_coco(path: Path, reading: Reading) -> Iterator[Found]:
    """Questions of a COCO file. Boxes are held as numbers, some 30 bytes each, since COCO does not sort them by image.

    Kinds of an image that are annotated as a crowd have no count, and so no question. Annotations with a text (among
    their keys, or the attributes that CVAT writes) ask for it.
    """
    names = {_number(r.value, "id", r.where): str(r.value.get("name", "")) for r in read_members(path, "categories")}
    counted: dict[int, dict[int, array[float]]] = {}  # image -> category -> its boxes
    made: Counter[tuple[int, int]] = Counter()  # boxes around something else
    crowds: set[tuple[int, int]] = set()
    said: dict[int, list[Region]] = {}  # image -> annotations with a text
    asked: dict[int, list[Record]] = {}  # image -> annotations with a question of their own
    for record in read_members(path, "annotations"):
        value, where = record.value, record.where
        image = _number(value, "image_id", where)
        if "question" in value:
            asked.setdefault(image, []).append(record)
            continue
        category = _number(value, "category_id", where)
        if category not in names:
            raise UserError(f"{where}: category_id {category} is not among the {len(names)} categories")
        if value.get("iscrowd"):
            crowds.add((image, category))
        with shaped(where, "COCO"):
            x1, y1, x2, y2, is_made = _coco_box(value, where)
        attributes = value.get("attributes")
        text = reading.attribute({**value, **attributes} if isinstance(attributes, dict) else value, "text")
        if text or reading.ask:
            said.setdefault(image, []).append(Region(names[category], (x1, y1, x2, y2), text, is_made))
            continue
        made[image, category] += is_made
        boxes = counted.setdefault(image, {}).setdefault(category, array("d"))
        boxes.extend((x1, y1, x2 - x1, y2 - y1))
    for record in read_members(path, "images"):
        image, where = _number(record.value, "id", record.where), record.where
        name = record.value.get("file_name")
        head = {"image": reading.image(path, name) if isinstance(name, str) else name} | _sides(record.value)
        named = {region.label for region in said.get(image, ())}
        for category, sides in counted.pop(image, {}).items():
            if names[category] in named:  # some have a text, so their number is not that of the kind
                said[image] += [Region(names[category], box) for box in _boxes(sides)]
            elif (image, category) not in crowds:
                found, kind = _boxes(sides), names[category]
                question = _question(head | {"field": kind}, HOW_MANY.format(label=kind), str(len(found)), found, where)
                yield replace(question, notes=(AROUND,) * made[image, category])
        for own in asked.pop(image, ()):
            found = _boxes(_wide(own.value.get("bbox"), own.where))
            yield _question(head, own.value["question"], own.value.get("answer"), found, own.where)
        if regions := said.pop(image, ()):
            size = Question.from_dict(head | {"question": "-", "answer": "-"}, where).size
            yield from page_questions(str(head["image"]), size, regions, where, reading)
    if lost := sorted({*counted, *asked, *said}):
        raise UserError(f"{path}: annotations of {len(lost)} images that 'images' does not list (first: id {lost[0]})")


def _coco_box(value: Mapping[str, Any], where: str) -> tuple[float, float, float, float, bool]:
    """x1, y1, x2, y2 of an annotation, and whether they are around a turned box or an outline."""
    attributes, outline = value.get("attributes"), value.get("segmentation")
    if not value.get("bbox") and isinstance(outline, list) and outline:
        points = [numbers(part[i : i + 2], where) for part in outline for i in range(0, len(part), 2)]
        return (*around(points), True)  # type: ignore[return-value]
    x, y, width, height = _wide(value.get("bbox"), where)
    angle = attributes.get("rotation") if isinstance(attributes, dict) else None
    if angle:
        corners = turned((x, y, x + width, y + height), float(angle), (x + width / 2, y + height / 2))
        return (*around(corners), True)  # type: ignore[return-value]
    return x, y, x + width, y + height, False


def read_visual_genome(path: Path, reading: Reading) -> Iterator[Question]:
    """Questions of a Visual Genome file of regions, of objects or of question-answer pairs."""
    beside = path.parent / "image_data.json"
    known = {}
    if beside.is_file():
        for record in read_records(beside):
            known[record.value.get("image_id", record.value.get("id"))] = record.value
    for record in read_records(path):
        where = record.where
        entries = next((record.value[key] for key in VG_LISTS if key in record.value), None)
        if not isinstance(entries, list):
            raise UserError(f"{where}: none of {', '.join(VG_LISTS)} is a list; expected a file of Visual Genome")
        for entry in entries:
            if not isinstance(entry, Mapping):
                raise UserError(f"{where}: an entry is {str(entry)[:60]!r}; expected an object")
        for entry in _named_once(entries) if "objects" in record.value else entries:
            yield _entry(entry, record.value, known, where)


def _named_once(objects: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Objects whose name says which one is meant, in the form of regions."""
    names = [str(next(iter(each.get("names") or ()), "")).strip() for each in objects]
    for name, each in zip(names, objects, strict=True):
        if name and names.count(name) == 1:
            yield {**each, "phrase": name, "width": each.get("w"), "height": each.get("h")}


def _entry(
    entry: Mapping[str, Any], image: Mapping[str, Any], known: Mapping[Any, Mapping[str, Any]], where: str
) -> Question:
    number = entry.get("image_id", image.get("image_id", image.get("id")))
    data = known.get(number, {})
    head = {"image": _vg_path(number, data), "field": "vg"} | _sides(data)
    if "phrase" in entry:
        box = _boxes(_wide([entry.get(key) for key in ("x", "y", "width", "height")], where))
        size = Question.from_dict(head | {"question": "-", "answer": "-"}, where).size
        if size is None:
            raise UserError(
                f"{where}: the size of image {number} is not known, so neither is where in it a region is; "
                "put image_data.json of Visual Genome beside the file"
            )
        return _question(head, WHERE.format(name=str(entry["phrase"]).strip()), place_of(box[0], size), box, where)
    objects = [*(entry.get("a_objects") or ()), *(entry.get("q_objects") or ())]
    boxes = [box for each in objects for box in _boxes(_wide([each.get(key) for key in ("x", "y", "w", "h")], where))]
    return _question(head, entry.get("question"), entry.get("answer"), boxes, where)


def _question(head: Mapping[str, Any], text: Any, answer: Any, boxes: list[list[float]], where: str) -> Question:
    return Question.from_dict({**head, "question": text, "answer": answer, "bboxs": boxes}, where)


def place_of(box: Sequence[float], size: tuple[int, int]) -> str:
    """Where the middle of a box (x1, y1, x2, y2 pixels) lies in an image of `size`, in thirds.

    >>> place_of((0, 0, 20, 20), (100, 100)), place_of((40, 40, 60, 60), (100, 100))
    ('top left', 'middle centre')
    """
    x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    return f"{ROWS[min(max(int(y * 3), 0), 2)]} {COLUMNS[min(max(int(x * 3), 0), 2)]}"


def _vg_path(number: Any, data: Mapping[str, Any]) -> str:
    """`VG_100K_2/1.jpg` of the address in image_data.json; without it the first folder, where remapping looks on."""
    url = str(data.get("url", ""))
    return "/".join(url.split("/")[-2:]) if url.count("/") >= 2 else f"VG_100K/{number}.jpg"


def _sides(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in ("width", "height") if key in data}


def _wide(value: Any, where: str) -> list[float]:
    """[x, y, width, height] checked: four finite numbers."""
    numbers: list[Any] = value if isinstance(value, list) and len(value) == 4 else [None]
    if not all(isinstance(v, int | float) and abs(v) < 1e9 for v in numbers):
        raise UserError(f"{where}: box {value!r}; expected [x, y, width, height] in pixels")
    return [float(v) for v in numbers]


def _boxes(values: Sequence[float]) -> list[list[float]]:
    """Boxes x1, y1, x2, y2 of numbers that are x, y, width, height one after another."""
    quads = (values[i : i + 4] for i in range(0, len(values), 4))
    return [[x, y, x + width, y + height] for x, y, width, height in quads]


def _number(data: Mapping[str, Any], key: str, where: str) -> int:
    value = data.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: {key!r} is {value!r}; expected a whole number")
    return value
