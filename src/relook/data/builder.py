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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from relook.data.items import ImageRef, Item, Message, split_ref, write_items
from relook.data.options import REENCODINGS, BuildOptions, draw
from relook.data.questions import Question, image_size
from relook.data.records import writing_records
from relook.data.sources import Found, placing, read
from relook.data.variants import DIRECT, variant
from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, LOOKS, look_turn, parse_calls, write_call
from relook.regions import (
    GRID,
    Box,
    Cells,
    box_to_cells,
    cells_to_box,
    clamp_box,
    covered,
    iou,
    join_crop_suffix,
    union,
    widen,
)

T = TypeVar("T")


@dataclass
class BuildReport:
    """What a build did: items written, and every question or box that did not come out as given, with examples."""

    items: int = 0
    val: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, where: str) -> None:
        self.counts[what] += 1
        if len(self.examples.setdefault(what, [])) < 5:
            self.examples[what].append(where)

    def to_dict(self) -> dict[str, Any]:
        return {"items": self.items, "val": self.val, "counts": dict(self.counts), "examples": self.examples}

    def __str__(self) -> str:
        notes = [f"{n} {what} (first: {self.examples[what][0]})" for what, n in sorted(self.counts.items())]
        parts = f" ({self.items - self.val} to train on, {self.val} to validate)" if self.val else ""
        return "\n".join([f"{self.items} items{parts}", *notes])


def build(
    src: str | Path,
    dst: str | Path,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    images: dict[str, Path] | None = None,
    limit: int | None = None,
    val: float = 0.0,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    **options: Any,
) -> BuildReport:
    """Build the items of a source into `dst` (`.json`: an array, else JSON lines), written aside, then renamed.

    Image paths stay as written where `image_root` is given (read the items with the same root); otherwise they are
    rewritten so that they hold from the folder of `dst`. Where an image is at hand, its size is compared with the
    stated one, since boxes of a resized copy would name the wrong cells.

    Args:
        format: a row of `sources.FORMATS`; seen from the file unless told.
        images: folders by dataset, in which images are looked up by name (see `images.ImageFinder`).
        val: share of the *images* whose items go to `val_path(dst)` instead; none is in both.
        split, columns: of a dataset (see `hub.read_hub`).
        options: the fields of `BuildOptions`.

    Raises:
        UserError: unreadable source, wrong options, a line of the wrong form, sizes that disagree; with file and line.
    """
    unknown = sorted(set(options) - set(BuildOptions.__dataclass_fields__))
    if unknown:
        raise UserError(f"unknown build option {unknown[0]!r}; known: {', '.join(BuildOptions.__dataclass_fields__)}")
    if Path(src).resolve() == Path(dst).resolve():
        raise UserError(f"{dst} is the source itself; give another place for the items")
    if not 0 <= val < 1:
        raise UserError(f"val is {val}; expected a share of the images, at least 0 and below 1")
    settings, report = BuildOptions(**options), BuildReport()
    place = placing(src, dst, image_root, images, report.note, format)
    found = read(src, format, image_folder=dst, split=split, columns=columns)
    made = (
        (thing, item)
        for thing in found
        if (placed := place(thing)) is not None
        for item in build_items([placed], settings, report)
    )
    pairs = _some(islice(made, limit), src, report)
    if val:
        _write_parts(pairs, Path(dst), val, settings.seed, report, src)
    else:
        write_items(dst, (item for _, item in pairs))
    return report


def val_path(dst: str | Path) -> Path:
    """Where the validation items of a build go: `items.json` -> `items.val.json`."""
    return Path(dst).with_suffix(f".val{Path(dst).suffix}")


def _write_parts(
    pairs: Iterable[tuple[Found, Item]], dst: Path, share: float, seed: int, report: BuildReport, src: str | Path
) -> None:
    """Both parts side by side. An image is drawn by the path that the source gives it, and by nothing else.

    So neither the order of the file nor the place of the target changes the parts, and an item of several images, some
    to train on and some to validate, can be in neither.
    """
    counts = {False: 0, True: 0}
    with writing_records(val_path(dst)) as held, writing_records(dst) as kept:
        for thing, item in pairs:
            sides = {draw(f"{seed}|{key}") < share for key in _drawn_by(thing)}
            if len(sides) > 1:
                report.items -= 1
                report.note("items with images of both parts, left out", thing.where)
                continue
            (side,) = sides
            counts[side] += 1
            (held if side else kept)(item.to_dict())
        if not all(counts.values()):
            raise UserError(
                f"{src}: a share of {share} leaves {counts[False]} items to train on and {counts[True]} to validate; "
                "give another share"
            )
    report.val = counts[True]


def _drawn_by(thing: Found) -> set[str]:
    """The image files of a thing, each by one name; its text where it has none."""
    refs = [thing.image] if isinstance(thing, Question) else [ref for refs in thing.images.values() for ref in refs]
    files = {os.path.normpath(split_ref(ref)[0]) for ref in refs if isinstance(ref, str)}
    return files or {thing.text if isinstance(thing, Question) else thing.messages[0].content}


def build_items(
    things: Iterable[Found], options: BuildOptions | None = None, report: BuildReport | None = None
) -> Iterator[Item]:
    """The items of questions, lazily; what was skipped, dropped or clamped is counted in `report`.

    Conversations that a source holds already as items are only changed where the options say so (`variants.variant`).
    """
    options, report = options or BuildOptions(), report if report is not None else BuildReport()
    for thing in things:
        if isinstance(thing, Item):
            item: Item | None = variant(thing, options.look, free_choice=options.free_choice)
        else:
            item = build_item(thing, options, report)
        if item is not None:
            report.items += 1
            yield item


def build_item(
    question: Question, options: BuildOptions | None = None, report: BuildReport | None = None
) -> Item | None:
    """The item of one question, or None where it is skipped (no usable box; see `BuildOptions.no_box`)."""
    options, report = options or BuildOptions(), report if report is not None else BuildReport()
    _refuse_marks(question)
    if not question.answer.strip():
        report.note("questions with an empty answer", question.where)
    look = options.look_of(question)
    if look == DIRECT:
        return _direct(question, options)
    if options.align:
        return _aligned(question, look)
    if LOOKS[look].reencodes:
        return _reencoding(question, options, look)
    cells = region_cells(question, options, report)
    if not cells:
        if options.no_box == "error":
            raise UserError(f"{question.where}: no usable box; give one, or build with no_box='skip' or 'direct'")
        report.note("questions without a usable box", question.where)
        if options.no_box in REENCODINGS:
            return _reencoding(question, options, options.no_box)
        return _direct(question, options) if options.no_box == "direct" else None
    size = image_size(question)
    if options.whole is not None and _almost_whole(question_boxes(question, options, None), size, options.whole):
        report.note("boxes of almost the whole image, answered directly", question.where)
        return _direct(question, options)
    crops = [crop_ref(question.image, each, size, grid=options.grid, margin=options.margin) for each in cells]
    call = "".join(write_call("region", each, options.grid) for each in cells)
    item = _looking(question, options, "region", call, {"images": crops})
    if question.slack == (0, 0):
        return item
    report.note("sizes worked out from boxes, crops may be some pixels off", question.where)
    return replace(item, extra=item.extra | {"estimated_size": list(size), "off_by": list(question.slack)})


def region_cells(question: Question, options: BuildOptions, report: BuildReport) -> list[Cells]:
    """The regions to name: cells of each usable box in order without repeats, or of their union, or merged."""
    boxes = question_boxes(question, options, report)
    if not boxes:
        return []
    size = image_size(question)
    cells = list(dict.fromkeys(box_to_cells(box, size, options.grid) for box in boxes))
    if question.slack != (0, 0):
        corners = [
            tuple(max(s + sign * off, 1) for s, off in zip(size, question.slack, strict=True)) for sign in (-1, 1)
        ]
        others = [(x[0], y[1]) for x in corners for y in corners]
        if any(box_to_cells(box, other, options.grid) not in cells for box in boxes for other in others):
            report.note("regions that an image of another possible size would move by a cell", question.where)
    return cells


def question_boxes(question: Question, options: BuildOptions, report: BuildReport | None) -> list[Box]:
    """The usable boxes in pixels, inside the image, joined as the options say; mends are counted in `report`."""
    if not question.boxes:
        return []
    size, note = image_size(question), (report or BuildReport()).note
    found = [_usable(box, size, question.where, options.outside, note) for box in question.boxes]
    boxes = [box for box in found if box is not None]
    if options.boxes == "union" and boxes:
        return [union(boxes)]
    return merged(boxes) if options.boxes == "merge" else boxes


def merged(boxes: Sequence[Box]) -> list[Box]:
    """The boxes with every group of overlapping ones as the smallest box around it, until none overlap.

    >>> merged([(0, 0, 4, 4), (3, 3, 8, 8), (10, 0, 12, 2)])
    [(0, 0, 8, 8), (10, 0, 12, 2)]
    """
    out: list[Box] = []
    for box in boxes:
        while touching := [other for other in out if iou(box, other) > 0]:
            box = union([box, *touching])  # which may touch others that neither touched before
            out = [other for other in out if other not in touching]
        out.append(box)
    return out


def _almost_whole(boxes: Sequence[Box], size: tuple[int, int], share: float) -> bool:
    return any(covered(box, (0, 0, *size)) >= share for box in boxes)


def crop_ref(image: ImageRef, cells: Cells, size: tuple[int, int], *, grid: int = GRID, margin: int = 0) -> ImageRef:
    """The crop of these cells as an item records it: a path with its box, or (image, box) where it is in memory.

    >>> crop_ref("wide.png", (1, 2, 3, 4), (640, 400))
    'wide.png_80,100,320,250'
    """
    box = cells_to_box(widen(cells, margin, grid), size, grid)
    return join_crop_suffix(image, box) if isinstance(image, str) else (image, box)


def _usable(box: Box, size: tuple[int, int], where: str, outside: str, note: Callable[[str, str], None]) -> Box | None:
    """The part of the box inside the image, min and max in order; None where nothing is left. Changes are counted."""
    width, height = size
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    if (x1, y1, x2, y2) != box:
        note("boxes with min and max swapped, put in order", where)
    inside = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        if outside == "clamp":
            note("boxes empty or outside the image, moved to its nearest pixel", where)
            return clamp_box((x1, y1, x2, y2), size)
        note("boxes empty or outside the image, left out", where)
        return None
    if inside != (x1, y1, x2, y2):
        note("boxes cut at the image's border", where)
    return inside


def _direct(question: Question, options: BuildOptions) -> Item:
    turns = (_first_turn(question.text, options), Message("assistant", question.answer))
    return Item(turns, _image_lists(question, {}))


def _first_turn(text: str, options: BuildOptions) -> Message:
    lines = [LOOKS["region"].placeholder, text]
    return Message("user", "\n".join(reversed(lines) if options.question_first else lines))


def _reencoding(question: Question, options: BuildOptions, look: str) -> Item:
    return _looking(question, options, look, write_call(look), {LOOKS[look].item_key: [question.image]})


def _aligned(question: Question, look: str) -> Item:
    """An alignment pair: the view that the projector must learn to show, and what is to be said of it."""
    spec = LOOKS[look]
    turns = (Message("user", f"{spec.placeholder}\n{question.text}"), Message("assistant", question.answer))
    lists = {key: () for key in _image_lists(question, {})}
    return Item(turns, lists | {spec.item_key: (question.image,)})


def _looking(question: Question, options: BuildOptions, look: str, call: str, seen: dict[str, list[ImageRef]]) -> Item:
    """The four turns of an item with a look: question, call, what the look shows, answer."""
    trigger = "" if options.free_choice else f" {LOOKS[look].trigger}"
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


def _some(items: Iterator[T], src: str | Path, report: BuildReport) -> Iterator[T]:
    """The items, or an error where there is none: nobody wants an empty set written without a word."""
    yield from items
    if not report.items:
        why = "; ".join(f"{n} {what}" for what, n in report.counts.items()) or "the file is empty"
        raise UserError(f"{src}: no item came out ({why}); nothing was written")
