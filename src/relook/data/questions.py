"""Questions with answers and boxes: the raw material of items and of evaluation tasks.

One JSON object a line (or an array of them): `{"image", "question", "answer", "bboxs", "width", "height", "field"}`,
the last three optional; `answer` may be a list of accepted answers. Boxes are x1, y1, x2, y2 in pixels of the
upright original, x2 and y2 exclusive. A page of a synthetic world yields the same type with the image in memory.
This module knows that format. It refuses to know looks and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relook.data.items import ImageRef, place_image
from relook.data.records import read_records
from relook.errors import UserError
from relook.regions import Box, upright

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap the sides


@dataclass(frozen=True)
class Question:
    """One question about one image.

    `answers` are all accepted, the first is the one to learn; `boxes` say where the answer stands (may be empty);
    `size` is (width, height) of the upright image where the source tells it, and `slack` how far each side may be off
    (0, 0: it is exact); `field` groups scores ("date", "total").
    """

    image: ImageRef
    text: str
    answers: tuple[str, ...]
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None
    field: str | None = None
    where: str = ""
    slack: tuple[int, int] = (0, 0)

    @property
    def answer(self) -> str:
        return self.answers[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "question") -> Question:
        """The typed question of one JSON object; `where` ("file:line") opens every error."""
        image = data.get("image")
        if not isinstance(image, str) or not image:
            raise UserError(f"{where}: 'image' is {image!r}; expected the path of an image")
        text = data.get("question")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: 'question' is {text!r}; expected text")
        answer = data.get("answer", data.get("answers"))
        answers = [answer] if isinstance(answer, str) else answer
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"{where}: 'answer' is {answer!r}; expected text, or a list of accepted texts")
        field = data.get("field", data.get("dataset"))
        name = None if field is None else str(field)
        return cls(image, text, tuple(answers), _boxes(data.get("bboxs"), where), _size(data, where), name, where)


def read_questions(path: str | Path, image_root: str | Path | None = None) -> Iterator[Question]:
    """The questions of a file, lazily; image paths placed below `image_root`, or below the file's folder."""
    for question in read_unplaced(path):
        yield placed(
            question, image_root if image_root is not None else Path(path).parent, strict=image_root is not None
        )


def read_unplaced(path: str | Path) -> Iterator[Question]:
    """The questions of a file, lazily, with image paths as written."""
    for record in read_records(path):
        yield Question.from_dict(record.value, record.where(path))


def placed(question: Question, root: str | Path, *, strict: bool = False) -> Question:
    """The same question with its image path below `root`; errors name file and line."""
    try:
        image = place_image(question.image, root, strict=strict)
    except UserError as error:
        raise UserError(f"{question.where}: {error}") from None
    return replace(question, image=image)


def from_page(page: Any, index: int, where: str = "") -> Question:
    """Question `index` of a page of a synthetic world (`.image`, `.qas` with question, answer, boxes, field)."""
    qa = page.qas[index]
    boxes = tuple(_box(box, where) for box in qa.boxes)
    return Question(page.image, qa.question, (qa.answer,), boxes, page.image.size, getattr(qa, "field", None), where)


def image_size(question: Question) -> tuple[int, int]:
    """(width, height) of the upright image: as the source says, else from the file's header (EXIF turns applied)."""
    if question.size is not None:
        return question.size
    if not isinstance(question.image, str):
        return upright(question.image).size
    size = file_size(question.image, question.where)
    if size is None:
        raise UserError(f"{question.where}: no image at {question.image}; check the path, or give the image root")
    return size


def file_size(path: str, where: str) -> tuple[int, int] | None:
    """(width, height) of an image file once upright, from its header; None where there is no such file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _SIDEWAYS
    except FileNotFoundError:
        return None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{where}: {path} is not a readable image ({error})") from None
    return (height, width) if turned else (width, height)


def _size(data: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    sides = data.get("width"), data.get("height")
    if sides == (None, None):
        return None
    width, height = (side if isinstance(side, int) and not isinstance(side, bool) and side > 0 else 0 for side in sides)
    if not width or not height:
        raise UserError(f"{where}: width and height are {sides[0]!r} and {sides[1]!r}; expected positive whole numbers")
    return width, height


def _boxes(value: Any, where: str) -> tuple[Box, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError(f"{where}: 'bboxs' is {value!r}; expected a list of [x1, y1, x2, y2] in pixels")
    return tuple(_box(box, where) for box in value)


def _box(value: Any, where: str) -> Box:
    """A box in whole pixels, rounded outwards so that it still covers what a fractional one covered."""
    numbers = isinstance(value, list | tuple) and len(value) == 4
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in value):
        raise UserError(f"{where}: box {value!r}; expected [x1, y1, x2, y2] in pixels")
    x1, y1, x2, y2 = value
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
