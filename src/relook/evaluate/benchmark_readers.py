"""Benchmarks in the layouts in which they are published, read as questions: one function a layout.

Image paths come out as published (or as images in memory, where a file holds them); `tasks` places them. Multiple
choice: the accepted answers are the letter and then the option's text (`metrics.choice`).
"""

from __future__ import annotations

import base64
import csv
import json
import re
import string
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.forms.table import stored_image
from relook.data.images import split_ref
from relook.data.items import Item, Question
from relook.data.reader import parquet_rows, read_records
from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, LOOKS

BY_LETTER = "Answer with the option's letter from the given choices directly."
_OPTION = re.compile(r"^\(([A-Z])\)\s*(.+?)\s*$", re.MULTILINE)
_ROWS_AT_ONCE = 8  # rows of Parquet that hold images of some megabytes


def viscot(path: Path) -> Iterator[Question]:
    """Visual-CoT's benchmark files; sizes are left to the image files."""
    from relook.data.forms import read

    for found in read(path, "viscot"):
        assert isinstance(found, Question)
        yield replace(found, size=None, slack=(0, 0), field=None)


def viscot_again(path: Path) -> Iterator[Question]:
    """The same, with the published sentence that asks for a re-encoding: as the paper's action splits ask."""
    for question in viscot(path):
        yield replace(question, text=f"{question.text} {LOOKS['clip'].trigger}")


def published(path: Path) -> Iterator[Question]:
    """An evaluation split of rp-yu/VPT_Datasets: the first message is the question, the last the answer.

    The sentence that asks for a look stays in the question. Boxes are the crops that the annotated look shows.
    """
    for record in read_records(path):
        where = record.where
        item = Item.from_dict(record.value, where)
        images = [ref for ref in item.images["images"] if isinstance(ref, str)]
        if len(item.messages) < 2 or not images:
            raise UserError(f"{where}: expected a question, an answer and an image")
        text = item.messages[0].content.replace(LOOKS["region"].placeholder, "").strip()
        answer = item.messages[-1].content.removeprefix(ANSWER_PREFIX).strip()
        crops = [box for _, box in map(split_ref, images[1:]) if box is not None]
        line = {"image": split_ref(images[0])[0], "question": text, "answer": answer}
        yield replace(Question.from_dict(line, where), boxes=tuple(crops))


def pope(path: Path) -> Iterator[Question]:
    """POPE's questions about COCO's images of 2014: {"question_id", "image", "text", "label"} a line.

    The field is the file's kind: `coco_pope_random.json` gives "random".
    """
    kind = path.stem.removeprefix("coco_pope_")
    for record in read_records(path):
        where, data = record.where, record.value
        line = {"image": f"coco/val2014/{_text(data, 'image', where)}", "question": _text(data, "text", where)}
        yield Question.from_dict({**line, "answer": _text(data, "label", where), "field": kind}, where)


def vstar(path: Path) -> Iterator[Question]:
    """V*Bench: {"image", "text" (with its options), "category", "label", "question_id"} a line of test_questions.jsonl.

    Boxes are those of the JSON file beside an image ("bbox": x, y, width, height in pixels), where it is there.
    """
    for record in read_records(path):
        where, data = record.where, record.value
        image, text, label = (_text(data, key, where) for key in ("image", "text", "label"))
        options = dict(_OPTION.findall(text))
        accepted = _letter_and_words(label, options, where)
        boxes = tuple(_boxes_beside((path.parent / image).with_suffix(".json")))
        yield Question(image, text, accepted, boxes, field=data.get("category"), where=where)


def _boxes_beside(path: Path) -> Iterator[tuple[int, int, int, int]]:
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["bbox"]
        for x, y, width, height in found if isinstance(found[0], list) else [found]:
            yield int(x), int(y), int(x + width), int(y + height)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: holds no 'bbox' of x, y, width, height ({error}); get the file again") from None


def hr_bench(path: Path) -> Iterator[Question]:
    """HR-Bench, as TSV or Parquet: index, question, answer (a letter), category, A to D, cycle_category, image
    (base64).

    Every question is there four times, its options turned (`cycle_category`): the mean over all is that over cycles.
    """
    for number, row in enumerate(_table(path), start=1):
        where = f"{path}: row {number}"
        options = {key: str(row[key]) for key in string.ascii_uppercase[:8] if row.get(key) not in (None, "")}
        lines = "\n".join(f"{key}. {text}" for key, text in options.items())
        text = f"{_text(row, 'question', where)}\n{lines}\nAnswer the option letter directly."
        accepted = _letter_and_words(_text(row, "answer", where), options, where)
        yield Question(_decoded(row.get("image"), where), text, accepted, field=row.get("category"), where=where)


def cv_bench(path: Path) -> Iterator[Question]:
    """CV-Bench, test_2d and test_3d as JSON lines beside `img/`, or as Parquet with the images: "prompt" asks the
    question with its choices, "answer" is "(A)". The field is the source, by which its accuracy is weighed."""
    rows = _table(path) if path.suffix == ".parquet" else (record.value for record in read_records(path))
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        choices = [str(choice) for choice in row.get("choices") or ()]
        options = dict(zip(string.ascii_uppercase, choices, strict=False))
        accepted = _letter_and_words(_text(row, "answer", where), options, where)
        text = f"{_text(row, 'prompt', where)}\n{BY_LETTER}"
        image = row.get("image")
        if isinstance(image, Mapping) and image.get("bytes"):
            image = stored_image(image, where)
        else:
            image = f"img/{_text(row, 'filename', where).removeprefix('img/')}"
        yield Question(image, text, accepted, field=_text(row, "source", where), where=where)


def _letter_and_words(answer: str, options: Mapping[str, str], where: str) -> tuple[str, ...]:
    letter = answer.strip().strip("().").upper()
    if len(letter) != 1 or (options and letter not in options):
        raise UserError(f"{where}: the answer is {answer!r}; expected the letter of an option ({', '.join(options)})")
    return (letter, options[letter]) if letter in options else (letter,)


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} is {str(value)[:60]!r}; expected text")
    return value.strip()


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a TSV file with a heading, or of Parquet, a few at a time."""
    if path.suffix == ".tsv":
        csv.field_size_limit(sys.maxsize)  # an image is one field
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")
    else:
        yield from parquet_rows(path, _ROWS_AT_ONCE)


def _decoded(value: Any, where: str) -> Any:
    try:
        data = base64.b64decode(value, validate=True)
    except (TypeError, ValueError):  # binascii.Error is one
        raise UserError(f"{where}: 'image' is no base64; expected an image file in base64") from None
    return stored_image({"bytes": data}, where)
