"""From questions with boxes to training items: the turns in which the model asks for a look are made here.

    {"image": "a.jpg", "question": "Who?", "answer": "ACME", "bboxs": [[100, 120, 300, 240]]}

becomes, for look="region", an image of 640 x 400 and 8 x 8 cells of 80 x 50 pixels (the box lies in x 1..3, y 2..4):

    user       <image>\\nWho? Identify the region that can help you answer the question, and then answer the question.
    assistant  <|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>
    user       <image>                                   images: a.jpg, a.jpg_80,100,320,250
    assistant  ACME

No crop needs to exist: it is written as a suffix and cut from the original when the item is encoded. A box edge on
the image's border belongs to the last cell, so `<|x_8|>` never arises. This module refuses to know token ids and
pixel values.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from relook.data.items import ImageRef, Item, Message, write_items
from relook.data.questions import Question, file_size, image_size, placed, read_unplaced
from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, LOOKS, look_turn, parse_calls, write_call
from relook.regions import GRID, Box, Cells, box_to_cells, cells_to_box, join_crop_suffix, widen

DIRECT = "none"  # the look of an item that answers at once
BoxRule = Literal["each", "union"]
NoBoxRule = Literal["skip", "direct", "error"]


@dataclass(frozen=True)
class BuildOptions:
    """How items are made.

    look: a row of the look table, or "none" for direct answers.
    grid: cells per side (8 in the published models).
    margin: cells by which the *crop* is widened on each side; the tokens always name the cells of the box itself.
    free_choice: leave out the sentence that asks for the look, so that the model learns to decide.
    answer_prefix: open the answer after a look with the published "Now answer the question.\\n".
    question_first: write the question before the image, for models that were trained so (a processor's setting).
    boxes: "each" box is a region of its own (boxes in the same cells are one), or their "union" is one region.
    no_box: what to do with a question without a usable box under look="region": "skip" it (counted), make it a
        "direct" answer, or stop with an "error".
    """

    look: str = "region"
    grid: int = GRID
    margin: int = 0
    free_choice: bool = False
    answer_prefix: bool = False
    question_first: bool = False
    boxes: BoxRule = "each"
    no_box: NoBoxRule = "skip"

    def __post_init__(self) -> None:
        _one_of("look", self.look, [*LOOKS, DIRECT])
        _one_of("boxes", self.boxes, ["each", "union"])
        _one_of("no_box", self.no_box, ["skip", "direct", "error"])
        if self.grid < 1 or not 0 <= self.margin < self.grid:
            raise UserError(
                f"grid {self.grid} with margin {self.margin}; expected a grid of 1 or more and 0 <= margin < grid"
            )


@dataclass
class BuildReport:
    """What a build did: items written, and every question or box that did not come out as given, with examples."""

    items: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, where: str) -> None:
        self.counts[what] += 1
        if len(self.examples.setdefault(what, [])) < 5:
            self.examples[what].append(where)

    def to_dict(self) -> dict[str, Any]:
        return {"items": self.items, "counts": dict(self.counts), "examples": self.examples}

    def __str__(self) -> str:
        notes = [f"{n} {what} (first: {self.examples[what][0]})" for what, n in sorted(self.counts.items())]
        return "\n".join([f"{self.items} items", *notes])


def build(
    src: str | Path, dst: str | Path, *, image_root: str | Path | None = None, limit: int | None = None, **options: Any
) -> BuildReport:
    """Build the items of a question file into `dst` (`.json`: an array, else JSON lines), written aside, then renamed.

    Image paths stay as written where `image_root` is given (read the items with the same root); otherwise they are
    rewritten so that they hold from the folder of `dst`. Where an image is at hand, its size is compared with the
    stated one, since boxes of a resized copy would name the wrong cells.

    Args:
        options: the fields of `BuildOptions`.

    Raises:
        UserError: unreadable source, wrong options, a line of the wrong form, sizes that disagree; with file and line.
    """
    unknown = sorted(set(options) - set(BuildOptions.__dataclass_fields__))
    if unknown:
        raise UserError(f"unknown build option {unknown[0]!r}; known: {', '.join(BuildOptions.__dataclass_fields__)}")
    if Path(src).resolve() == Path(dst).resolve():
        raise UserError(f"{dst} is the source itself; give another place for the items")
    settings, report = BuildOptions(**options), BuildReport()
    root = Path(image_root) if image_root is not None else Path(src).parent
    questions = _at_hand(read_unplaced(src), root, image_root is not None, report)
    if image_root is None:
        questions = _moved(questions, root, Path(dst).parent)
    items = islice(build_items(questions, settings, report), limit)
    write_items(dst, _some(items, src, report))
    return report


def build_items(
    questions: Iterable[Question], options: BuildOptions | None = None, report: BuildReport | None = None
) -> Iterator[Item]:
    """The items of questions, lazily; what was skipped, dropped or clamped is counted in `report`."""
    options, report = options or BuildOptions(), report if report is not None else BuildReport()
    for question in questions:
        item = build_item(question, options, report)
        if item is not None:
            report.items += 1
            yield item


def build_item(
    question: Question, options: BuildOptions | None = None, report: BuildReport | None = None
) -> Item | None:
    """The item of one question, or None where it is skipped (no usable box; see `BuildOptions.no_box`)."""
    options, report = options or BuildOptions(), report if report is not None else BuildReport()
    _refuse_marks(question)
    if options.look == DIRECT:
        return _direct(question, options)
    if LOOKS[options.look].reencodes:
        return _looking(question, options, write_call(options.look), {LOOKS[options.look].item_key: [question.image]})
    cells = region_cells(question, options, report)
    if not cells:
        if options.no_box == "error":
            raise UserError(f"{question.where}: no usable box; give one, or build with no_box='skip' or 'direct'")
        report.note("questions without a usable box", question.where)
        return _direct(question, options) if options.no_box == "direct" else None
    size = image_size(question)
    crops = [crop_ref(question.image, each, size, grid=options.grid, margin=options.margin) for each in cells]
    call = "".join(write_call("region", each, options.grid) for each in cells)
    return _looking(question, options, call, {"images": crops})


def region_cells(question: Question, options: BuildOptions, report: BuildReport) -> list[Cells]:
    """The regions to name: cells of each usable box in order without repeats, or of their union."""
    size = image_size(question) if question.boxes else (1, 1)
    boxes = [box for box in (_usable(box, size, question.where, report) for box in question.boxes) if box]
    if options.boxes == "union" and boxes:
        boxes = [union(boxes)]
    return list(dict.fromkeys(box_to_cells(box, size, options.grid) for box in boxes))


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box around all boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def crop_ref(image: ImageRef, cells: Cells, size: tuple[int, int], *, grid: int = GRID, margin: int = 0) -> ImageRef:
    """The crop of these cells as an item records it: a path with its box, or (image, box) where it is in memory.

    >>> crop_ref("wide.png", (1, 2, 3, 4), (640, 400))
    'wide.png_80,100,320,250'
    """
    box = cells_to_box(widen(cells, margin, grid), size, grid)
    return join_crop_suffix(image, box) if isinstance(image, str) else (image, box)


def _usable(box: Box, size: tuple[int, int], where: str, report: BuildReport) -> Box | None:
    """The part of the box inside the image, min and max in order; None where nothing is left. Changes are counted."""
    width, height = size
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    if (x1, y1, x2, y2) != box:
        report.note("boxes with min and max swapped, put in order", where)
    inside = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        report.note("boxes empty or outside the image, left out", where)
        return None
    if inside != (x1, y1, x2, y2):
        report.note("boxes cut at the image's border", where)
    return inside


def _direct(question: Question, options: BuildOptions) -> Item:
    turns = (_first_turn(question.text, options), Message("assistant", question.answer))
    return Item(turns, _image_lists(question, {}))


def _first_turn(text: str, options: BuildOptions) -> Message:
    lines = [LOOKS["region"].placeholder, text]
    return Message("user", "\n".join(reversed(lines) if options.question_first else lines))


def _looking(question: Question, options: BuildOptions, call: str, seen: dict[str, list[ImageRef]]) -> Item:
    """The four turns of an item with a look: question, call, what the look shows, answer."""
    trigger = "" if options.free_choice else f" {LOOKS[options.look].trigger}"
    prefix = ANSWER_PREFIX if options.answer_prefix else ""
    turns = (
        _first_turn(f"{question.text}{trigger}", options),
        Message("assistant", call),
        Message("user", look_turn(parse_calls(call, options.grid))),
        Message("assistant", f"{prefix}{question.answer}"),
    )
    return Item(turns, _image_lists(question, seen))


def _image_lists(question: Question, seen: dict[str, list[ImageRef]]) -> dict[str, tuple[ImageRef, ...]]:
    first: dict[str, list[ImageRef]] = {spec.item_key: [] for spec in LOOKS.values()} | {"images": [question.image]}
    return {key: tuple(first[key] + seen.get(key, [])) for key in first}


def _refuse_marks(question: Question) -> None:
    """A question or answer that holds a placeholder would shift every image after it."""
    for spec in LOOKS.values():
        if any(spec.placeholder in text for text in (question.text, question.answer)):
            raise UserError(f"{question.where}: {spec.placeholder!r} in the text would stand for an image; remove it")


def _at_hand(questions: Iterable[Question], root: Path, strict: bool, report: BuildReport) -> Iterator[Question]:
    """Questions with sizes, those of the files where they are at hand; a stated size that disagrees stops the build."""
    sizes: dict[str, tuple[int, int] | None] = {}
    for question in questions:
        path = placed(question, root, strict=strict).image
        if path not in sizes:
            sizes[path] = file_size(path, question.where)
            if sizes[path] is None:
                report.note("images not at hand, size as stated", f"{question.where}: {path}")
        real, stated = sizes[path], question.size
        if real is None and stated is None:
            raise UserError(
                f"{question.where}: no image at {path} and no width and height; give the images, or state the size"
            )
        if real and stated and real != stated:
            what = f"{path} is {real[0]} x {real[1]}, but width and height say {stated[0]} x {stated[1]}"
            raise UserError(f"{question.where}: {what}; boxes of another size would name the wrong cells")
        yield replace(question, size=real or stated)


def _moved(questions: Iterable[Question], source: Path, target: Path) -> Iterator[Question]:
    """Questions whose image paths, given from folder `source`, hold from folder `target`; absolute ones stay."""
    for question in questions:
        if os.path.isabs(question.image):
            yield question
        else:
            path = os.path.relpath(os.path.join(source, question.image), target)
            yield replace(question, image=Path(path).as_posix())


def _some(items: Iterator[Item], src: str | Path, report: BuildReport) -> Iterator[Item]:
    """The items, or an error where there is none: nobody wants an empty set written without a word."""
    yield from items
    if not report.items:
        why = "; ".join(f"{n} {what}" for what, n in report.counts.items()) or "the file is empty"
        raise UserError(f"{src}: no item came out ({why}); nothing was written")


def _one_of(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(known)}")
