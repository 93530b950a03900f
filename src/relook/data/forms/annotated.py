"""From annotated regions to questions: what the readers of annotation tools' files share.

A page is an image with regions, each with a label and often a text. Regions with a text become a question for each
label that can be told from the others ("What is the total?", or the template of `--ask`), regions without one a
question for each label how many there are.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook.data.items import LeftOut, Question
from relook.data.reader import Record, open_input, parse_record, readable
from relook.errors import UserError

HOW_MANY = 'How many objects of the kind "{label}" are in the image? Answer with a number.'
WHAT_IS = "What is the {label}?"
AROUND = "rotated boxes or outlines, the box around them taken"
NAMES = {  # of attributes: ours, and the names that people give them
    "label": ("label", "class", "name", "type", "category", "key", "field"),
    "text": ("text", "transcription", "value", "utf8_string", "ocr", "description"),
}
_SPELT = re.compile(r"_|(?<=\w\w)\.(?=\w\w)")  # what stands for a space in a label without one
PLACES = ("", "images", "image", "JPEGImages", "../images", "../image", "../JPEGImages")

Found = Question | LeftOut


@dataclass(frozen=True)
class Reading:
    """What a form is not told by the file itself.

    Attributes:
        root: folder that the paths of images hold from.
        columns: our names (of columns, keys or attributes) to those of the file, where they are not the usual ones.
        ask: the question about a region, with {label} in it.
        split: of a set that holds several.
    """

    root: Path = Path()
    columns: Mapping[str, str] = field(default_factory=dict)
    ask: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.ask is not None and "{label}" not in self.ask:
            raise UserError(f'--ask {self.ask!r}: expected a question with {{label}} in it: "{WHAT_IS}"')

    def attribute(self, data: Mapping[str, Any], ours: str) -> str:
        """What attributes hold under a name of ours, as text; the only one may have any name. "" for none."""
        given = self.columns.get(ours) or (self.columns.get("answer") if ours == "text" else None)
        names = (given,) if given else NAMES[ours]
        value = next((data[name] for name in names if data.get(name)), None)
        if value is None and ours == "label" and not given and len(data) == 1 and not {*data} & {*NAMES["text"]}:
            (value,) = data.values()
        if isinstance(value, Mapping):  # the boxes that are checked: {"dog": true}
            value = ", ".join(str(key) for key, checked in value.items() if checked)
        return "" if value is None else " ".join(str(value).split())

    def image(self, file: Path, *names: str) -> str:
        """The path, from the root, of an image that a file calls by one of these names; the first where none is there.

        Looked for below the root, beside the file, and in the folders in which tools put images.
        """
        names = tuple(name.replace("\\", "/") for name in names)
        for name in names:
            for folder in (self.root, *(file.parent / place for place in PLACES)):
                if (there := folder / name).is_file():
                    return os.path.relpath(there, self.root).replace(os.sep, "/")
        return names[0]


@dataclass(frozen=True)
class Region:
    """A region: its label, its box (x1, y1, x2, y2 in pixels; None for the whole page), the text in it ("" for none).

    `around`: whether the box is the one around something that is no upright box.
    """

    label: str
    box: Sequence[float] | None
    text: str = ""
    around: bool = False


def page_questions(
    image: str, size: Sequence[Any] | None, regions: Sequence[Region], where: str, reading: Reading
) -> Iterator[Found]:
    """The questions of a page: for each label the text of its regions, or how many there are.

    Args:
        size: width and height, where they are whole numbers; else those of the file hold.
    """
    known = size is not None and all(isinstance(side, int) and side for side in size)
    head = {"image": image} | (dict(zip(("width", "height"), size or (), strict=True)) if known else {})
    groups: dict[str, list[Region]] = {}
    for region in regions:
        groups.setdefault(region.label, []).append(region)
    for label, group in groups.items():
        name = " ".join((label if " " in label.strip() else _SPELT.sub(" ", label)).split())
        texts = list(dict.fromkeys(region.text for region in group if region.text))
        if not name:
            yield LeftOut(where, "form", f"{len(group)} regions of {image} have no label")
            continue
        if not texts and reading.ask is None:
            asked, answer = HOW_MANY.format(label=name), str(len(group))
        else:
            asked, answer = (reading.ask or WHAT_IS).replace("{label}", name), texts[0] if texts else ""
            group = [region for region in group if region.text]
        if len(texts) > 1 or not answer or (texts and len(group) < len(groups[label])):
            seen = "have no text" if not texts else "say different things" if len(texts) > 1 else "not all have a text"
            why = f"{len(groups[label])} regions of {image} are called {label!r} and {seen}"
            yield LeftOut(where, "form", f"{why}, so {asked!r} has no answer")
            continue
        boxes = [list(region.box) for region in group if region.box is not None]
        line = {**head, "question": asked, "answer": answer, "bboxs": boxes, "field": label}
        yield replace(Question.from_dict(line, where), notes=(AROUND,) * sum(region.around for region in group))


# -- geometry


def around(points: Sequence[Sequence[float]]) -> list[float]:
    """The least box x1, y1, x2, y2 around points (x, y)."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    return [min(xs), min(ys), max(xs), max(ys)]


def turned(box: Sequence[float], degrees: float, center: Sequence[float]) -> list[list[float]]:
    """The corners of a box x1, y1, x2, y2 after a clockwise turn about a point."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    offsets = [(x - center[0], y - center[1]) for x in (box[0], box[2]) for y in (box[1], box[3])]
    return [[round(center[0] + x * cos - y * sin, 6), round(center[1] + x * sin + y * cos, 6)] for x, y in offsets]


def ellipse(x: float, y: float, wide: float, high: float, degrees: float = 0) -> list[float]:
    """The box around an ellipse of these radii about (x, y), after a clockwise turn."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across, down = math.hypot(wide * cos, high * sin), math.hypot(wide * sin, high * cos)
    return [round(value, 6) for value in (x - across, y - down, x + across, y + down)]


def numbers(values: Sequence[Any], where: str) -> list[float]:
    """The numbers of these values. Raises UserError where one is none."""
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{where}: {list(values)} are no numbers; expected coordinates")
    return found


# -- files


def annotation_files(path: Path, suffix: str) -> list[Path]:
    """The file itself, or all of that kind in a folder, in order."""
    return sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]


def is_list(path: Path) -> bool:
    """Whether a JSON file holds a list, as items that were written beside annotations do."""
    with open_input(path) as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def json_object(path: Path) -> Record:
    """The one object of a JSON file. Raises UserError for another thing, with file and line."""
    with open_input(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    return readable(parse_record(path, data, 1, 0, len(data)))


def json_pages(
    key: str, tool: str, page: Callable[[Record, Path, Reading], Iterator[Found]]
) -> Callable[[Path, Reading], Iterator[Found]]:
    """A reader of a file an image, or of a folder of them, each with one object that has this key."""

    def read(path: Path, reading: Reading) -> Iterator[Found]:
        for file in annotation_files(path, ".json"):
            if path.is_dir() and is_list(file):
                yield LeftOut(f"{file}:1", "form", f"holds a list; expected the {key!r} of {tool}")
                continue
            record = json_object(file)
            if key not in record.value:
                seen = ", ".join(list(record.value)[:12])
                yield LeftOut(record.where, "form", f"has {seen}; expected the {key!r} of {tool}")
                continue
            with shaped(record.where, tool):
                yield from page(record, file, reading)

    return read


@contextmanager
def shaped(where: str, tool: str) -> Iterator[None]:
    """A context in which values of another shape than a tool writes are an error with their place."""
    try:
        yield
    except UserError:  # which is a ValueError
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        seen = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: not as {tool} writes it ({seen}); export it again, or remove the entry") from error


def object_list(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    """A list of objects, checked."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError(f"{where}: {key!r} is {json.dumps(value, default=str)[:60]}; expected a list of objects")
    return value
