"""From questions with boxes to training items: the turns in which the model asks for a look are made here.

    {"image": "a.jpg", "question": "Who?", "answer": "ACME", "bboxs": [[100, 120, 300, 240]]}

becomes, for look="region", an image of 640 x 400 and 8 x 8 cells of 80 x 50 pixels (the box lies in x 1..3, y 2..4):

    user       <image>\\nWho? Identify the region that can help you answer the question, and then answer the question.
    assistant  <|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>
    user       <image>                                   images: a.jpg, a.jpg_80,100,320,250
    assistant  ACME

No crop needs to exist: it is written as a suffix and cut from the original when the item is encoded. A box edge on
the image's border belongs to the last cell, so `<|x_8|>` never arises.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from relook.data.forms import Found, is_dataset, read
from relook.data.images import ImageFinder, ImageRef, file_size, place_image, relative, split_ref, with_file
from relook.data.items import IMAGE_KEYS, Item, Message, Question, image_size, naming, variant, write_items
from relook.data.published import EVAL_SPLITS
from relook.data.reader import folder_of, writing_records
from relook.data.rules import DIRECT, REENCODINGS, BuildOptions, Note, draw, question_boxes, region_cells
from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, LOOKS, look_turn, parse_calls, write_call
from relook.regions import GRID, Box, Cells, cells_to_box, covered, join_crop_suffix, widen


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
        format: a row of `forms.FORMATS`; recognized from the file unless given.
        images: folders by dataset, in which images are looked up by name (see `images.ImageFinder`).
        val: share of the *images* whose items go to `val_path(dst)` instead; none is in both.
        split, columns: of a dataset (see `forms.table.read_hub`).
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
    of_dataset = format == "hub" or (format is None and is_dataset(src))
    place = _Placer(Path(dst).parent if of_dataset else folder_of(src), Path(dst), image_root, images, report.note)
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

    Conversations that a source holds already as items are only changed where the options say so (`items.variant`).
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
    options, note = options or BuildOptions(), (report or BuildReport()).note
    _refuse_marks(question)
    if not question.answer.strip():
        note("questions with an empty answer", question.where)
    look = options.look_of(question)
    if look == DIRECT:
        return _direct(question, options)
    if options.align:
        return _aligned(question, look)
    if LOOKS[look].reencodes:
        return _reencoding(question, options, look)
    boxes = question_boxes(question, options, note)
    if boxes:
        return _region(question, options, boxes, note)
    if options.no_box == "error":
        raise UserError(f"{question.where}: no usable box; give one, or build with no_box='skip' or 'direct'")
    note("questions without a usable box", question.where)
    if options.no_box in REENCODINGS:
        return _reencoding(question, options, options.no_box)
    return _direct(question, options) if options.no_box == "direct" else None


def _region(question: Question, options: BuildOptions, boxes: Sequence[Box], note: Note) -> Item:
    """A region look at these boxes; a direct answer where one is almost the whole image."""
    size, grid = image_size(question), options.grid
    cells = region_cells(boxes, question, grid, note)
    if options.whole is not None and any(covered(box, (0, 0, *size)) >= options.whole for box in boxes):
        note("boxes of almost the whole image, answered directly", question.where)
        return _direct(question, options)
    crops = [crop_ref(question.image, each, size, grid=grid, margin=options.margin) for each in cells]
    call = "".join(write_call("region", each, grid) for each in cells)
    item = _looking(question, options, "region", call, {"images": [question.image, *crops]})
    if question.slack == (0, 0):
        return item
    note("sizes worked out from boxes, crops may be some pixels off", question.where)
    return replace(item, extra=item.extra | {"estimated_size": list(size), "off_by": list(question.slack)})


def crop_ref(image: ImageRef, cells: Cells, size: tuple[int, int], *, grid: int = GRID, margin: int = 0) -> ImageRef:
    """The crop of these cells as an item records it: a path with its box, or (image, box) where it is in memory.

    >>> crop_ref("wide.png", (1, 2, 3, 4), (640, 400))
    'wide.png_80,100,320,250'
    """
    box = cells_to_box(widen(cells, margin, grid), size, grid)
    return join_crop_suffix(image, box) if isinstance(image, str) else (image, box)


def _item(texts: Sequence[str], images: dict[str, list[ImageRef]]) -> Item:
    """An item of these turns, user and assistant alternating."""
    turns = (Message(role, text) for role, text in zip(cycle(("user", "assistant")), texts, strict=False))
    return Item(tuple(turns), {key: tuple(images.get(key, ())) for key in IMAGE_KEYS})


def _first_turn(text: str, options: BuildOptions) -> str:
    lines = [LOOKS["region"].placeholder, text]
    return "\n".join(reversed(lines) if options.question_first else lines)


def _direct(question: Question, options: BuildOptions) -> Item:
    return _item([_first_turn(question.text, options), question.answer], {"images": [question.image]})


def _aligned(question: Question, look: str) -> Item:
    """An alignment pair: the view that the projector must learn to show, and what is to be said of it."""
    spec = LOOKS[look]
    return _item([f"{spec.placeholder}\n{question.text}", question.answer], {spec.item_key: [question.image]})


def _reencoding(question: Question, options: BuildOptions, look: str) -> Item:
    images = {"images": [question.image], LOOKS[look].item_key: [question.image]}
    return _looking(question, options, look, write_call(look), images)


def _looking(
    question: Question, options: BuildOptions, look: str, call: str, images: dict[str, list[ImageRef]]
) -> Item:
    """The four turns of an item with a look: question, call, what the look shows, answer."""
    trigger = "" if options.free_choice else f" {LOOKS[look].trigger}"
    prefix = ANSWER_PREFIX if options.answer_prefix else ""
    shown = look_turn(parse_calls(call, options.grid))
    return _item([_first_turn(f"{question.text}{trigger}", options), call, shown, f"{prefix}{question.answer}"], images)


def _refuse_marks(question: Question) -> None:
    """A question or answer that holds a placeholder would shift every image after it."""
    for spec in LOOKS.values():
        if any(spec.placeholder in text for text in (question.text, question.answer)):
            raise UserError(f"{question.where}: {spec.placeholder!r} in the text would stand for an image; remove it")


def _some(pairs: Iterator[tuple[Found, Item]], src: str | Path, report: BuildReport) -> Iterator[tuple[Found, Item]]:
    """The items, or an error where there is none: nobody wants an empty set written without a word."""
    yield from pairs
    if not report.items:
        why = "; ".join(f"{n} {what}" for what, n in report.counts.items()) or "the file is empty"
        raise UserError(f"{src}: no item came out ({why}); nothing was written")


# -- image paths and sizes


class _Placer:
    """Gives questions and items the image paths and sizes that they have in the built file.

    Args:
        home: folder of the source's relative paths.
        target: the built file; paths are rewritten to hold from its folder, unless there is an `image_root`.
        images: folders by dataset, in which images are looked up by name first.
    """

    def __init__(
        self, home: Path, target: Path, image_root: str | Path | None, images: dict[str, Path] | None, note: Note
    ) -> None:
        self.root, self.target, self.strict, self.note = Path(image_root or home), target, image_root is not None, note
        self.finder = ImageFinder(images or {})
        self.sizes: dict[str, tuple[int, int] | None] = {}

    def __call__(self, thing: Found) -> Found | None:
        """The same with paths for the target; None for a question whose image is not the one its boxes are of."""
        with naming(thing.where):
            if isinstance(thing, Item):
                return thing.map_images(lambda ref: with_file(ref, lambda file: self.paths(file)[1]))
            if not isinstance(thing.image, str):
                return thing
            here, written = self.paths(thing.image)
        sized = self.sized(thing, here)
        return None if sized is None else replace(sized, image=written)

    def paths(self, file: str) -> tuple[str, str]:
        """Where an image file is from here, and its path in the target."""
        if found := self.finder.find(file):
            return found, relative(found, self.target.parent)
        here = str(place_image(file, self.root, strict=self.strict))
        return here, file if self.strict or os.path.isabs(file) else relative(here, self.target.parent)

    def sized(self, question: Question, here: str) -> Question | None:
        """The question with the size of its image file, where that is at hand.

        Raises:
            UserError: the source states another size; there is neither a size nor a file.
        """
        if here not in self.sizes:
            self.sizes[here] = file_size(here, question.where)
            if self.sizes[here] is None:
                self.note("images not at hand, sizes not held against them", f"{question.where}: {here}")
        real, stated = self.sizes[here], question.size
        if real is None:
            if stated is None and question.boxes:
                raise UserError(
                    f"{question.where}: no image at {here} and no width and height; give the images, or state the size"
                )
            return question
        if stated is not None and any(abs(r - s) > off for r, s, off in zip(real, stated, question.slack, strict=True)):
            what = f"{here} is {real[0]} x {real[1]}, but width and height say {stated[0]} x {stated[1]}"
            if question.slack == (0, 0):
                raise UserError(f"{question.where}: {what}; boxes of another size would name the wrong cells")
            self.note("images of another size than their boxes were drawn on, left out", f"{question.where}: {here}")
            return None
        return replace(question, size=real, slack=(0, 0))


# -- evaluation splits


@dataclass
class SplitsReport:
    """One build a split, and the splits whose source file was not there."""

    built: dict[str, BuildReport]
    absent: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for name, report in self.built.items():
            row = EVAL_SPLITS[name]
            lines.append(f"{name}: {report.items} items (stated {row.stated}) from {row.file}")
            lines += [f"    {line}" for line in str(report).splitlines()[1:]]
        return "\n".join(lines + [f"{name}: not built, no {file}" for name, file in self.absent.items()])


def build_splits(
    source: str | Path, target: str | Path, *, action: str = "clip", names: list[str] | None = None, **options: Any
) -> SplitsReport:
    """Build the evaluation splits whose source files lie in `source` into `target`/NAME.json.

    Every question comes out, as in the paper's counts: a box that is empty or outside its image names the nearest cell.

    Args:
        action: the re-encoding look of the action splits ("clip", "detection" or "seg"), which depends on the model.
        names: only these splits.
        options: of `build` (images, image_root, limit, and the fields of `BuildOptions`).

    Raises:
        UserError: no such split, none of the files, or several files for one split.
    """
    source, target = Path(source), Path(target)
    if action not in REENCODINGS:
        raise UserError(f"the action splits look by {action!r}; expected one of {', '.join(REENCODINGS)}")
    if not source.is_dir():
        raise UserError(f"{source}: is no folder; give the folder that holds the benchmark's files")
    unknown = sorted(set(names or ()) - set(EVAL_SPLITS))
    if unknown:
        raise UserError(f"no split {unknown[0]!r}; expected one of {', '.join(EVAL_SPLITS)}")
    report = SplitsReport({}, {})
    for row in EVAL_SPLITS.values():
        if names and row.name not in names:
            continue
        files = sorted(source.glob(row.file))
        if not files:
            report.absent[row.name] = row.file
            continue
        if len(files) > 1:
            raise UserError(
                f"{row.name}: which of {', '.join(each.name for each in files)} it was is not published; "
                f"leave one of them in {source}"
            )
        look = "region" if row.kind == "region" else action
        made = build(files[0], target / f"{row.name}.json", look=look, outside="clamp", **options)
        report.built[row.name] = made
        if made.items != row.count and options.get("limit") is None:
            made.note(f"items, where {row.count} questions were expected", f"{files[0]}: {made.items}")
    if not report.built:
        raise UserError(f"{source}: none of {', '.join(sorted(set(report.absent.values())))} is there")
    return report
