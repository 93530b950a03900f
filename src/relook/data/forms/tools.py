"""What annotation tools write as JSON: Label Studio, LabelMe, VIA.

Label Studio (JSON, JSON-MIN): tasks {"data": {"image": ...}, "annotations": [{"result": [...]}]}. Boxes are x, y,
width, height in percent of the image, turned clockwise about their upper left corner; results of one `id` (a box, its
label, its transcription) are one region. Where `data` has a question, what was said of the whole image is its answer.
https://labelstud.io/guide/export

LabelMe: a file an image {"shapes": [{"label", "points", "shape_type", "description"}], "imagePath", "imageWidth"};
a rectangle is two opposite corners, a circle its center and a point on it. https://github.com/wkentaro/labelme

VIA 1 to 2: {"name.jpg12345": {"filename", "regions": [{"shape_attributes": {"name": "rect", "x", "y", "width",
"height"}, "region_attributes": {...}}]}}, alone or as `_via_img_metadata` of a project.
https://www.robots.ox.ac.uk/~vgg/software/via/
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from relook.data.forms.annotated import (
    AROUND,
    Found,
    Reading,
    Region,
    around,
    ellipse,
    json_object,
    json_pages,
    numbers,
    object_list,
    page_questions,
    shaped,
    turned,
)
from relook.data.items import COLUMNS, LeftOut, Question, column
from relook.data.reader import Record, read_records
from relook.errors import UserError

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file
SAID = ("text", "choices", "number", "rating", "datetime", "taxonomy")  # values of results that are answers


# -- Label Studio


def is_label_studio(data: Mapping[str, Any]) -> bool:
    """Whether a record is a task, or a line of JSON-MIN (some of its lists hold boxes with the image's size)."""
    if isinstance(data.get("data"), Mapping):
        return "annotations" in data or "completions" in data
    return any(map(_is_boxes, data.values()))


def read_label_studio(path: Path, reading: Reading) -> Iterator[Found]:
    """Questions of an export of Label Studio."""
    for record in read_records(path):
        value, where = record.value, record.where
        own = {name: given for name, given in value.items() if not _is_boxes(given)}
        data = value["data"] if isinstance(value.get("data"), Mapping) else own
        try:
            with shaped(where, "Label Studio"):
                results = _results(value, where) if "data" in value else _min_results(value, where, reading)
                yield from _task(data, results, path, where, reading)
        except LeftOut as error:
            yield error


def _results(task: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The results of the annotation that counts: the one marked as ground truth, else the first not cancelled."""
    all_of_them = object_list(task.get("annotations", task.get("completions")), "annotations", where)
    done = [each for each in all_of_them if not each.get("was_cancelled") and each.get("result")]
    if not done:
        raise LeftOut(where, "form", "the task is not annotated")
    return object_list(max(done, key=lambda each: bool(each.get("ground_truth")))["result"], "result", where)


def _min_results(line: Mapping[str, Any], where: str, reading: Reading) -> list[dict[str, Any]]:
    """The results of a line of JSON-MIN: boxes in the same place are one region, and lists of texts go with them.

    A list of one text is that text here.
    """
    results: list[dict[str, Any]] = []
    places: dict[str, None] = {}
    for group in filter(_is_boxes, line.values()):
        met: Counter[str] = Counter()
        for box in group:
            place = repr([(key, box[key]) for key in sorted(_PLACE & {*box})])
            met[place] += 1
            places[key := f"{place} {met[place]}"] = None
            results.append({**box, "id": key, "value": box})
    given = reading.columns.get("text", reading.columns.get("answer", "transcription"))
    for name, value in line.items():
        texts = [value] if isinstance(value, str) and name == given else value
        if name in (given, "text", "ocr") and isinstance(texts, list) and not _is_boxes(texts):
            if len(texts) == len(places):
                results += [{"id": key, "value": {"text": text}} for key, text in zip(places, texts, strict=True)]
            elif name == given and places:
                why = f"{len(texts)} texts {name!r} for {len(places)} regions, and for which is not said; export JSON"
                raise LeftOut(where, "form", why)
        elif name not in COLUMNS["question"] and isinstance(value, Mapping) and "choices" in value:
            results.append({"from_name": name, "value": value})
    return results


def _is_boxes(value: Any) -> bool:
    """Whether a value of JSON-MIN is the regions of a control."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "original_width" in value[0]


def _task(
    data: Mapping[str, Any], results: list[dict[str, Any]], path: Path, where: str, reading: Reading
) -> Iterator[Found]:
    parts: dict[Any, dict[str, Any]] = {}
    for number, result in enumerate(results):
        value = result.get("value")
        if isinstance(value, Mapping):
            kept = {key: result[key] for key in _PLACED if key in result}
            part = parts.setdefault(result.get("id", number), {})
            part |= {**value, **kept}
            part.setdefault("from_name", result.get("from_name"))
    loose = {str(part["from_name"]): _said(part) for part in parts.values() if not _PLACES & {*part}}
    pages: dict[str, list[dict[str, Any]]] = {}
    for part in parts.values():
        if _PLACES & {*part}:
            pages.setdefault(_image(data, part, where, reading), []).append(part)
    pages = pages or {_image(data, {}, where, reading): []}
    asked = column(data, "question", reading.columns) if _asks(data, reading) else None
    if asked is not None and len(pages) > 1:
        raise LeftOut(where, "form", f"a question about regions of {len(pages)} images; which to look at is not said")
    for ref, shapes in pages.items():
        image = reading.image(path, *_names(ref))
        size = _size(shapes[0]) if shapes else None
        regions = [region for shape in shapes for region in _regions(shape, where)]
        if asked is None:
            regions += [Region(name, None, text) for name, text in loose.items() if text]
            yield from page_questions(image, size, regions, where, reading)
            continue
        line = {"image": image, "question": asked, "answer": _answer(data, loose, where, reading)}
        line |= {} if size is None else {"width": size[0], "height": size[1]}
        line["bboxs"] = [list(box) for box in dict.fromkeys(tuple(r.box) for r in regions if r.box is not None)]
        notes = (AROUND,) * sum(region.around for region in regions)
        yield replace(Question.from_dict(line, where), notes=notes)


_PLACED = ("original_width", "original_height", "image_rotation", "to_name", "item_index", "type")
_PLACES = {"x", "points", "rle"}
_PLACE = {"x", "y", "width", "height", "rotation", "radiusX", "radiusY", "points", "item_index"}


def _asks(data: Mapping[str, Any], reading: Reading) -> bool:
    return "question" in reading.columns or any(name in data for name in ("question", "query", "prompt"))


def _image(data: Mapping[str, Any], part: Mapping[str, Any], where: str, reading: Reading) -> str:
    """The image that a result is of, as the task names it."""
    named = str(reading.columns.get("image") or part.get("to_name"))
    value = data.get(named) if named in data else column(data, "image", {})
    if value is None:
        paths = [text for text in data.values() if isinstance(text, str) and re.search(r"\.\w{3,4}(\?|$)", text)]
        value = paths[0] if len(paths) == 1 else None
    if isinstance(value, list) and value:
        value = value[int(part.get("item_index") or 0)] if len(value) > 1 else value[0]
    if not isinstance(value, str):
        raise LeftOut(where, "form", f"which of {', '.join(data)} is the image is not clear; say --columns image=NAME")
    return value


def _names(ref: str) -> list[str]:
    """The names by which an image of Label Studio may lie here: local files, uploads (whose names get a prefix)."""
    if "/local-files/?d=" in ref:
        names = [ref.partition("?d=")[2]]
    else:
        name = ref.rpartition("/")[2]
        names = [ref.removeprefix("/data/").lstrip("/"), name, _UPLOAD.sub("", name)] if "/" in ref else [ref]
    return [*names, *map(unquote, names)]


def _size(part: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = part.get("original_width"), part.get("original_height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _regions(part: Mapping[str, Any], where: str) -> Iterator[Region]:
    """The region of merged results, once for each of its labels; percent become pixels."""
    size, kind = _size(part), part.get("type")
    if size is None or part.get("image_rotation") or "rle" in part:
        seen = "is of a turned image" if part.get("image_rotation") else "has no box"
        raise LeftOut(where, "form", f"a region of Label Studio ({kind}) {seen}; expected boxes, polygons or ellipses")
    wide, high = size[0] / 100, size[1] / 100
    angle, is_box = float(part.get("rotation") or 0), not {"points", "radiusX"} & {*part}
    if "points" in part:
        box = around([(x * wide, y * high) for x, y in (numbers(point, where) for point in part["points"])])
    else:
        names = ("x", "y", "width", "height") if is_box else ("x", "y", "radiusX", "radiusY")
        x, y, width, height = numbers([part.get(name) for name in names], where)
        box = [x * wide, y * high, (x + width) * wide, (y + height) * high]
        if not is_box:
            box = ellipse(x * wide, y * high, width * wide, height * high, angle)
        elif angle:
            box = around(turned(box, angle, box[:2]))
    rounded = [round(value, 6) for value in box]
    labels = next((value for key, value in part.items() if key.endswith("labels") and value), [""])
    yield from (Region(label, rounded, _said(part), bool(angle) or not is_box) for label in labels)


def _said(part: Mapping[str, Any]) -> str:
    """What a result says: a transcription, a choice, a number, the last of a path of a taxonomy; "" for none."""
    value = next((part[key] for key in SAID if part.get(key) is not None), "")
    values = [each[-1] if isinstance(each, list) else each for each in (value if isinstance(value, list) else [value])]
    return " ".join(" ".join(map(str, values)).split())


def _answer(data: Mapping[str, Any], loose: Mapping[str, str], where: str, reading: Reading) -> Any:
    """The answer to a task's question: what was said of the whole image, else what the task brought."""
    names = [reading.columns["answer"]] if "answer" in reading.columns else [n for n in COLUMNS["answer"] if n in loose]
    names = names or list(loose)
    if (len(loose) > 1 and names[0] not in {**data, **loose}) or len(names) > 1:
        raise LeftOut(
            where, "form", f"which of {', '.join(loose)} is the answer is not said; say --columns answer=NAME"
        )
    return loose[names[0]] if names and names[0] in loose else column(data, "answer", reading.columns)


# -- LabelMe


def _labelme_page(record: Record, file: Path, reading: Reading) -> Iterator[Found]:
    """The questions of an image."""
    value, where = record.value, record.where
    name = str(value.get("imagePath") or f"{file.stem}.jpg").replace("\\", "/")
    size = (value.get("imageWidth"), value.get("imageHeight"))
    regions = [_shape(shape, where, reading) for shape in object_list(value["shapes"], "shapes", where)]
    yield from page_questions(reading.image(file, name, name.rpartition("/")[2]), size, regions, where, reading)


read_labelme = json_pages("shapes", "LabelMe", _labelme_page)


def _shape(shape: Mapping[str, Any], where: str, reading: Reading) -> Region:
    kind = shape.get("shape_type") or "polygon"
    points = [numbers(point, where) for point in shape.get("points") or ()]
    if kind == "circle" and len(points) == 2:
        (x, y), (px, py) = points
        radius = ((px - x) ** 2 + (py - y) ** 2) ** 0.5
        points = [[x - radius, y - radius], [x + radius, y + radius]]
    if len(points) < 2:
        raise UserError(f"{where}: a {kind} of {len(points)} points has no box; remove it")
    flags = shape.get("flags")
    told = flags.items() if isinstance(flags, dict) else ()
    text = {**{name: flag for name, flag in told if not isinstance(flag, bool)}, **shape}
    label = str(shape.get(reading.columns.get("label", "label")) or "")
    return Region(label, around(points), reading.attribute(text, "text"), kind != "rectangle")


# -- VIA


def is_via(data: Mapping[str, Any]) -> bool:
    first = next(iter(data.values()), None)
    return "_via_img_metadata" in data or (isinstance(first, Mapping) and {"filename", "regions"} <= {*first})


def read_via(path: Path, reading: Reading) -> Iterator[Found]:
    """Questions of a project or of exported annotations of VIA."""
    whole = json_object(path).value
    entries = whole.get("_via_img_metadata", whole)
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        where = f"{path}: {key}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("filename"), str):
            raise UserError(f"{where}: expected an object with 'filename' and 'regions'")
        with shaped(where, "VIA"):
            given = entry.get("regions") or []
            shapes = object_list(list(given.values()) if isinstance(given, dict) else given, "regions", where)
            regions = [_via_region(shape, where, reading) for shape in shapes]
            name = entry["filename"]
            yield from page_questions(reading.image(path, name, name.rpartition("/")[2]), None, regions, where, reading)


def _via_region(region: Mapping[str, Any], where: str, reading: Reading) -> Region:
    shape, attributes = region.get("shape_attributes") or {}, region.get("region_attributes") or {}
    label, text = reading.attribute(attributes, "label"), reading.attribute(attributes, "text")
    kind = shape.get("name")
    if kind == "rect":
        x, y, width, height = numbers([shape.get(key) for key in ("x", "y", "width", "height")], where)
        return Region(label, [x, y, x + width, y + height], text)
    if kind in ("circle", "ellipse"):
        radii = ("r", "r") if kind == "circle" else ("rx", "ry")
        x, y, wide, high = numbers([shape.get(key) for key in ("cx", "cy", *radii)], where)
        return Region(label, ellipse(x, y, wide, high, 57.29578 * float(shape.get("theta") or 0)), text, True)
    xs, ys = (numbers(shape.get(f"all_points_{axis}") or [], where) for axis in "xy")
    if len(xs) < 2 or len(xs) != len(ys):
        raise UserError(f"{where}: a region of the shape {kind!r} has no box; expected rect, circle, ellipse, polygon")
    return Region(label, around(list(zip(xs, ys, strict=True))), text, True)
