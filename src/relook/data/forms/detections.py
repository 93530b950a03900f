"""Boxes as detection tools export them: Pascal VOC and CVAT (XML), YOLO (text).

Pascal VOC: a file an image <annotation><filename/><size><width/><height/></size><object><name/><bndbox><xmin/> ...;
coordinates count from 1 and include the last pixel. http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/

CVAT for images 1.1: <annotations><image name width height><box label xtl ytl xbr ybr rotation><attribute name="text">.
https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/

YOLO (Ultralytics): data.yaml with `names` and a folder of images a split; a text file an image in `labels/`, a line
a box: class, then center x, center y, width, height, or the corners of an outline, as fractions of the image.
https://docs.ultralytics.com/datasets/detect/
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from relook.boxes import read_box
from relook.data.forms.annotated import (
    Found,
    Reading,
    Region,
    annotation_files,
    around,
    ellipse,
    numbers,
    page_questions,
    shaped,
    turned,
)
from relook.data.images import PICTURES, file_size
from relook.data.items import LeftOut
from relook.errors import UserError
from relook.io import read_yaml

Element = ElementTree.Element


def root_tag(path: Path) -> str:
    """The name of the outermost element of an XML file; "" where it is none."""
    try:
        return next((element.tag for _, element in ElementTree.iterparse(path, ["start"])), "")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise _broken(path, error) from None


def _elements(path: Path, tag: str) -> Iterator[Element]:
    """The elements of that name, one at a time."""
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == tag:
                yield element
                element.clear()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> UserError:
    if not isinstance(error, ElementTree.ParseError):  # an encoding that the parser does not have
        return UserError(f"{path}:1: XML that cannot be read ({error}); save it as UTF-8, and say so in its first line")
    return UserError(f"{path}:{error.position[0]}: broken XML ({str(error).partition(':')[0]}); export it again")


# -- Pascal VOC


def read_voc(path: Path, reading: Reading) -> Iterator[Found]:
    """Questions of a file of Pascal VOC, or of a folder of them."""
    for file in annotation_files(path, ".xml"):
        for page in _elements(file, "annotation"):
            name = page.findtext("filename") or f"{file.stem}.jpg"
            with shaped(f"{file}:1", "Pascal VOC"):
                sides = [int(page.findtext(f"size/{side}") or 0) for side in ("width", "height")]
                regions = [_object(each, f"{file}:1", reading) for each in page.iter("object")]
            yield from page_questions(reading.image(file, name), sides, regions, f"{file}:1", reading)


def _object(entry: Element, where: str, reading: Reading) -> Region:
    texts = {child.tag: child.text or "" for child in entry} | _attributes(entry)
    label = texts.get(reading.columns.get("label", "name"), "")
    text = next((texts[name] for name in (reading.columns.get("answer", "text"), "transcription") if name in texts), "")
    box, turned_box = entry.find("bndbox"), entry.find("robndbox")
    if box is not None:
        x1, y1, x2, y2 = numbers([box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")], where)
        return Region(label, [max(x1 - 1, 0), max(y1 - 1, 0), x2, y2], text)
    if turned_box is None:
        raise UserError(f"{where}: the object {label!r} has no bndbox; expected xmin, ymin, xmax, ymax")
    x, y, width, height, angle = numbers([turned_box.findtext(key) for key in ("cx", "cy", "w", "h", "angle")], where)
    corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return Region(label, around(turned(corners, 57.29578 * angle, (x, y))), text, True)


def _attributes(entry: Element) -> dict[str, str]:
    """The <attribute>s of an object: name and value as elements (VOC of CVAT), or as attribute and text (CVAT)."""
    found = {}
    for each in entry.iter("attribute"):
        name, value = each.get("name") or each.findtext("name"), each.findtext("value") or each.text
        found[str(name)] = (value or "").strip()
    return found


# -- CVAT


def read_cvat(path: Path, reading: Reading) -> Iterator[Found]:
    """Questions of a CVAT for images file."""
    empty = True
    for page in _elements(path, "image"):
        empty = False
        name = str(page.get("name"))
        where = f"{path}: image {name}"
        with shaped(where, "CVAT"):
            size = [int(page.get(side) or 0) for side in ("width", "height")]
            kinds = [shape for shape in page if shape.get("label") is not None]
            regions = [region for shape in kinds for region in _shape(shape, where, reading)]
        image = reading.image(path, name, name.rpartition("/")[2])
        yield from page_questions(image, size, regions, where, reading)
    if empty:
        raise UserError(f"{path}: holds no <image>; export the task as 'CVAT for images 1.1' (tracks are of videos)")


def _shape(shape: Element, where: str, reading: Reading) -> Iterator[Region]:
    """The region of a shape; of a tag (the whole image), one for each of its attributes."""
    attributes, label = _attributes(shape), str(shape.get("label"))
    text, angle = reading.attribute(attributes, "text"), float(shape.get("rotation") or 0)
    if shape.tag == "tag":
        yield from (Region(name, None, value) for name, value in attributes.items() if value)
        return
    if shape.tag == "box":
        box = numbers([shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")], where)
    elif shape.tag == "ellipse":
        x, y, wide, high = numbers([shape.get(key) for key in ("cx", "cy", "rx", "ry")], where)
        box = ellipse(x, y, wide, high, angle)
    elif shape.get("points"):
        box = around([numbers(point.split(","), where) for point in str(shape.get("points")).split(";")])
    else:
        raise UserError(f"{where}: a <{shape.tag}> has no box; expected box, polygon, polyline, points or ellipse")
    center = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    box = around(turned(box, angle, center)) if angle and shape.tag == "box" else box
    yield Region(label, box, text, bool(angle) or shape.tag != "box")


# -- YOLO


def read_yolo(path: Path, reading: Reading) -> Iterator[Found]:
    """Questions of a set of YOLO: its data.yaml, or the folder that holds it or `classes.txt`."""
    names, images, is_pose = _yolo_set(path, reading.split or "train")
    for image in images:
        labels = _labels_of(image)
        if labels is None:
            continue  # an image without objects
        size, where = file_size(str(image)), f"{labels}:1"
        if size is None:
            yield LeftOut(where, "form", f"no image at {image}, whose size the fractions need")
            continue
        lines = [line.split() for line in _lines(labels)]
        regions = [_yolo_box(line, names, size, is_pose, f"{labels}:{n}") for n, line in enumerate(lines, 1) if line]
        yield from page_questions(reading.image(labels, str(image.absolute())), size, regions, where, reading)


def _yolo_set(path: Path, split: str) -> tuple[dict[int, str], list[Path], bool]:
    """The names of the classes, the images of a split, and whether boxes are followed by the key points of a pose."""
    folder = path if path.is_dir() else path.parent
    file = next(iter(sorted(folder.glob("*.yaml"))), None) if path.is_dir() else path
    if file is None or file.name == "classes.txt":
        names = {number: line.strip() for number, line in enumerate(_lines(folder / "classes.txt")) if line.strip()}
        return names, _images(folder / "images", folder), False
    raw: Any = read_yaml(file)
    names, given = raw.get("names"), raw.get(split)
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not given:
        splits = ", ".join(key for key in ("train", "val", "test") if raw.get(key))
        raise UserError(f"{file}: has no 'names' or no split {split!r}; its splits: {splits or 'none'}")
    images = []
    for part in map(str, given if isinstance(given, list) else [given]):
        base = folder / str(raw.get("path") or "")
        tried = [base / part, folder / part, folder / part.removeprefix("../")]
        tried += [] if isinstance(given, list) else [folder / "images" / split]
        place = next((each for each in tried if each.exists()), None)
        if place is None:
            raise UserError(f"{file}: there is no {tried[0]}; put the images of the split {split!r} there")
        images += _images(place, folder)
    return names, images, "kpt_shape" in raw


def _images(place: Path, folder: Path) -> list[Path]:
    """The images in a folder, or that a list names."""
    if place.is_file():
        return [folder / line.strip() for line in _lines(place) if line.strip()]
    return [file for file in sorted(place.rglob("*")) if file.suffix.lower() in PICTURES]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8") from None


def _labels_of(image: Path) -> Path | None:
    """The text file of an image: in `labels/` where the image is in `images/`, or beside it."""
    beside = image.with_suffix(".txt")
    swapped = re.sub(r"(.*/)images/", r"\1labels/", beside.absolute().as_posix())
    return next((file for file in (Path(swapped), beside) if file.is_file()), None)


def _yolo_box(words: list[str], names: dict[int, str], size: tuple[int, int], is_pose: bool, where: str) -> Region:
    kind, *rest = numbers(words, where)
    if kind not in names:
        raise UserError(f"{where}: class {kind:g} is not among the {len(names)} names (0, 1, ...)")
    rest = rest[:4] if is_pose else rest
    if any(not 0 <= value <= 1.001 for value in rest) or len(rest) < 4 or (len(rest) > 5 and len(rest) % 2):
        seen = " ".join(words)[:60]
        raise UserError(f"{where}: {seen!r}; expected class, center x, center y, width, height, in fractions 0-1")
    if len(rest) > 5:
        corners = around([rest[i : i + 2] for i in range(0, len(rest), 2)])
    else:
        x, y, width, height = rest[:4]
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return Region(names[int(kind)], read_box(corners, size, "0-1"), "", len(rest) > 5)
