"""From questions with boxes to training items: the turns in which the model asks for a look are made here.

    {"image": "a.jpg", "question": "Who?", "answer": "ACME", "bboxs": [[100, 120, 300, 240]]}

becomes, for look="region", an image of 640 x 400 and 8 x 8 cells of 80 x 50 pixels (the box lies in x 1..3, y 2..4):

    user       <image>\\nWho? Identify the region that can help you answer the question, and then answer the question.
    assistant  <|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>
    user       <image>                                   images: a.jpg, a.jpg_80,100,320,250
    assistant  ACME

With max_looks=2 a second call may follow, which counts cells of the first crop, and a third image, the crop of these.
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

from relook.data.dialect import BoxFit
from relook.data.faults import TEXT, Context, refuse
from relook.data.forms import Found, Source
from relook.data.forms.table import read_hub
from relook.data.images import ImageRef, split_ref
from relook.data.items import IMAGE_KEYS, Item, LeftOut, Message, Question, image_size, write_items
from relook.data.placing import Placer, same_size
from relook.data.reader import folder_of, readable, writing_records
from relook.data.rules import DIRECT, BuildOptions, draw, question_boxes, region_turns, val_path
from relook.data.settings import BUILT, IMPLIED, LOCATED, SETTINGS, model_settings, view_of
from relook.data.variants import variant
from relook.errors import UserError
from relook.files import split_page
from relook.looks import ANSWER_PREFIX, LOOKS, look_turn, parse_calls, write_call
from relook.regions import Box, covered, join_crop_suffix

SHOWN = 20  # records left out that a report names


@dataclass
class BuildReport:
    """What a build did: items written, and every question or box that did not come out as given, with examples.

    `left_out` names each record that could not be used: "file:line: why". `fit` counts the boxes as they are written.
    """

    items: int = 0
    val: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    fit: BoxFit = field(default_factory=BoxFit)

    def note(self, what: str, where: str) -> None:
        self.counts[what] += 1
        if len(self.examples.setdefault(what, [])) < 5:
            self.examples[what].append(where)

    def __str__(self) -> str:
        notes = [f"{n} {what} (first: {self.examples[what][0]})" for what, n in sorted(self.counts.items())]
        parts = f" ({self.items - self.val} to train on, {self.val} to validate)" if self.val else ""
        if left := len(self.left_out):
            notes.append(f"{left} record{'s' * (left > 1)} left out:")
            notes += [f"    {line}" for line in self.left_out[:SHOWN]] + ["    ..."] * (left > SHOWN)
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
    ask: str | None = None,
    units: str | None = None,
    model: str | None = None,
    **options: Any,
) -> BuildReport:
    """Build the items of a source into `dst` (`.json`: an array, else JSON lines), written aside, then renamed.

    Image paths stay as written where `image_root` is given (read the items with the same root); otherwise they are
    rewritten so that they hold from the folder of `dst`. Where an image is at hand, its size is compared with the
    stated one, since boxes of a resized copy would name the wrong cells.

    Args:
        format: a row of `forms.FORMATS`; recognized from the file unless given.
        images: folders by dataset, in which images are looked up by name (see `images.ImageFinder`).
        val: share of the *images* whose items go to `val_path(dst)` instead; none is in both, and no document.
        split, columns, ask, units: see `forms.Source`. Images of datasets are written beside `dst`.
        model: whose settings decide grid, margin, free_choice and question_first: a model, or a recipe that names one.
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
    settings, report = BuildOptions(**(options if model is None else _for_model(model, options))), BuildReport()
    source = Source(src, format, image_root=image_root, columns=columns, ask=ask, split=split, units=units)
    report.fit = source.fit
    view = view_of(model) if model is not None and "resized" in (units or "") else None
    home = Path(dst).parent if source.form.name == "hub" else folder_of(source.path)
    place = Placer(home, Path(dst), image_root, images, report, view)
    made = (
        (thing, item)
        for thing in things(source, Path(dst), report)
        if (placed := place(thing)) is not None
        for item in build_items([placed], settings, report)
    )
    pairs = _some(islice(made, limit), src, report)
    if val:
        _write_parts(pairs, Path(dst), val, settings.seed, report, src)
    else:
        write_items(dst, (item for _, item in pairs))
    return report


def things(source: Source, dst: Path, report: BuildReport) -> Iterator[Found]:
    """What a source holds; what cannot be used is noted. A dataset's images are written into `NAME_images`."""
    if source.form.name == "hub":
        folder, reading = dst.with_name(f"{dst.stem}_images"), source.reading
        yield from map(source.stated, read_hub(source.source, reading.split or "train", reading.columns, folder))
        return
    for record in source.scan():
        try:
            yield source.thing(readable(record))
        except LeftOut as error:
            report.left_out.append(str(error))


def _for_model(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the settings of a model.

    Raises:
        UserError: an option says something else, or asks for a look that the model lacks.
    """
    wanted, looks = model_settings(model)
    for name, value in wanted.items():
        if options.get(name, value) != value:
            raise UserError(f"{name} is {options[name]}, but {model} has {value}; leave one of the two out")
    if lacking := {*BuildOptions(**options).shares} - {*looks, DIRECT}:
        raise UserError(
            f"look {', '.join(sorted(lacking))}: {model} has {', '.join(looks)}; give one of these, or none"
        )
    return options | wanted


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
    """The image files of a thing, each by one name (of a page, its document); its text where it has none."""
    refs = [thing.image] if isinstance(thing, Question) else [ref for refs in thing.images.values() for ref in refs]
    files = {os.path.normpath(split_page(split_ref(ref)[0])[0]) for ref in refs if isinstance(ref, str)}
    return files or {thing.text if isinstance(thing, Question) else thing.messages[0].content}


def build_items(
    things: Iterable[Found], options: BuildOptions | None = None, report: BuildReport | None = None
) -> Iterator[Item]:
    """The items of questions, lazily; what was skipped, dropped, clamped or left out is counted in `report`.

    Conversations that a source holds already as items are only changed where the options say so (`items.variant`).
    """
    options, report = options or BuildOptions(), report if report is not None else BuildReport()
    for thing in things:
        try:
            if isinstance(thing, Item):
                refuse(thing, Context(), TEXT)  # `data check` mends or finds the others
                item: Item | None = variant(thing, options.look, free_choice=options.free_choice)
            else:
                thing = thing.in_pixels(report.fit)
                item = build_item(thing, options, report)
        except LeftOut as error:
            report.left_out.append(str(error))
            continue
        if item is not None:
            report.items += 1
            yield item if isinstance(thing, Item) else replace(item, extra=item.extra | _kept(thing, options))


def build_item(
    question: Question, options: BuildOptions | None = None, report: BuildReport | None = None
) -> Item | None:
    """The item of one question, or None where it is skipped (no usable box; see `BuildOptions.no_box`)."""
    options, note, where = options or BuildOptions(), (report or BuildReport()).note, question.where
    refuse(question, Context())
    for what in question.notes:
        note(what, where)
    for spec in LOOKS.values():  # a placeholder in the text would shift every image after it
        if any(spec.placeholder in text for text in (question.text, question.answer)):
            raise LeftOut(where, "unresolved", f"{spec.placeholder} in a text would stand for an image")
    if not question.answer.strip():
        note("questions with an empty answer", where)
    question = question.in_pixels()
    look, image, extra = options.look_of(question), question.image, {}
    calls, views = list[str](), [image]
    if look == "region":
        if boxes := question_boxes(question, options, note):
            size = image_size(question)
            if isinstance(image, str) and image.startswith("data:"):
                raise LeftOut(where, "form", "an image in a data URL has no name for its crop; save it as a file")
            asked_for = region_turns(boxes, question, options, note)
            calls = ["".join(write_call("region", cells, options.grid) for cells, _ in turn) for turn in asked_for]
            views += [crop_ref(image, box) for turn in asked_for for _, box in turn]
            if options.whole is not None and any(covered(box, (0, 0, *size)) >= options.whole for box in boxes):
                note("boxes of almost the whole image, answered directly", where)
                look = DIRECT
            elif question.slack != (0, 0):
                note("sizes worked out from boxes, crops may be some pixels off", where)
                extra = {"estimated_size": list(size), "off_by": list(question.slack)}
        elif options.no_box == "error":
            raise UserError(f"{where}: no usable box; give one, or build with no_box='skip' or 'direct'")
        else:
            note("questions without a usable box", where)
            if options.no_box == "skip":
                return None
            look = DIRECT if options.no_box == "direct" else options.no_box
    asked = question.text if look == DIRECT or options.free_choice else f"{question.text} {LOOKS[look].trigger}"
    lines = [LOOKS["region"].placeholder, asked]
    first = "\n".join(reversed(lines) if options.question_first else lines)
    if look == DIRECT:
        return _item([first, question.answer], {"images": [image]})
    spec = LOOKS[look]
    if options.align:  # the view that the projector must learn to show, and what is to be said of it
        return _item([f"{spec.placeholder}\n{question.text}", question.answer], {spec.item_key: [image]})
    looking = [
        turn for call in calls or [write_call(look)] for turn in (call, look_turn(parse_calls(call, options.grid)))
    ]
    answer = f"{ANSWER_PREFIX if options.answer_prefix else ''}{question.answer}"
    return _item([first, *looking, answer], {"images": [image], spec.item_key: views}, extra)


def as_item(thing: Found, options: BuildOptions, context: Context, report: BuildReport | None = None) -> Item:
    """The item of a thing: of a question, the one that training makes of it (sizes as the context has them)."""
    if isinstance(thing, Item):
        return thing
    known = context.facts(thing.image) if isinstance(thing.image, str) else None
    if known is not None and known.problem is None:
        same_size(thing, str(thing.image), known.size)
        thing = replace(thing, size=known.size, slack=(0, 0))
    sized = thing.size is not None or not isinstance(thing.image, str)
    if sized or "pixels" in thing.units:
        thing = thing.in_pixels(None if report is None else report.fit, None if known is None else known.orientation)
    if not sized:
        thing = replace(thing, boxes=(), written=())  # name no cells where the image is not there; that is a fault
    item = build_item(thing, replace(options, no_box="direct"), report)
    assert item is not None  # no_box="direct" skips nothing
    return replace(item, extra=item.extra | _kept(thing, options))


def _kept(question: Question, options: BuildOptions) -> dict[str, Any]:
    """What an item keeps beside its turns: how it was built, and of the question what turns cannot say."""
    built = {name: getattr(options, name) for name in SETTINGS}
    kept: dict[str, Any] = {BUILT: {name: value for name, value in built.items() if IMPLIED.get(name) != value}}
    if question.boxes:
        kept[BUILT] |= {} if question.units in ("", "pixels") else {"units": question.units}
        kept["bboxs"] = [list(box) for box in question.boxes]
        if question.located is not None:
            kept[LOCATED] = dict(question.located)
    if len(question.answers) > 1:
        kept["answers"] = list(question.answers)
    return kept | ({} if question.field is None else {"field": question.field})


def crop_ref(image: ImageRef, box: Box) -> ImageRef:
    """A crop as an item records it: a path with its box, or (image, box) where it is in memory."""
    return join_crop_suffix(image, box) if isinstance(image, str) else (image, box)


def _item(texts: Sequence[str], images: dict[str, list[ImageRef]], extra: dict[str, Any] | None = None) -> Item:
    """An item of these turns, user and assistant alternating."""
    turns = (Message(role, text) for role, text in zip(cycle(("user", "assistant")), texts, strict=False))
    return Item(tuple(turns), {key: tuple(images.get(key, ())) for key in IMAGE_KEYS}, extra or {})


def _some(pairs: Iterator[tuple[Found, Item]], src: str | Path, report: BuildReport) -> Iterator[tuple[Found, Item]]:
    """The items, or an error where there is none: nobody wants an empty set written without a word."""
    yield from pairs
    report.fit.refuse(src)
    if not report.items:
        whys = [f"{n} {what}" for what, n in report.counts.items()]
        whys += [f"{len(report.left_out)} left out, the first: {report.left_out[0]}"] if report.left_out else []
        why = "; ".join(whys) or "the file is empty"
        raise UserError(f"{src}: no item came out ({why}); nothing was written")
