"""Training items in the published JSON format, and the questions they are built from, typed.

An item is a conversation and the images its placeholders stand for:

    {"messages": [{"role": "user", "content": "<image>\\nWhat is the total? Identify the region ..."},
                  {"role": "assistant", "content": "<|region_token_start|>...<|region_token_end|>"},
                  {"role": "user", "content": "<image>"},
                  {"role": "assistant", "content": "9.30"}],
     "images": ["a.jpg", "a.jpg_80,100,320,250"],
     "clip_images": [], "detection_images": [], "seg_images": []}

Each list holds the images of one placeholder in the order of its occurrences; the look table says which lists there
are. `a.jpg_80,100,320,250` is the crop (x1, y1, x2, y2 in pixels of the upright original, x2 and y2 exclusive) of
`a.jpg`.

A question is one image, text, accepted answers, and the boxes that show the answer:

    {"image": "a.jpg", "question": "Who?", "answer": "ACME", "bboxs": [[100, 120, 300, 240]], "width": 640, ...}
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook.boxes import Numbers, parse_units, read_box
from relook.data.dialect import HELD, BoxFit
from relook.data.images import ImageRef, file_size, file_turn, place_image, split_ref
from relook.data.reader import read_records, write_records
from relook.data.settings import built_settings, located_by
from relook.errors import UserError, naming
from relook.looks import ANSWER_PREFIX, LOOKS, parse_calls
from relook.regions import GRID, Box, cells_in, upright

IMAGE_KEYS: tuple[str, ...] = tuple(LOOKS[name].item_key for name in LOOKS)  # "images", "clip_images", ...
PLACEHOLDERS: dict[str, str] = {LOOKS[name].item_key: LOOKS[name].placeholder for name in LOOKS}
ROLES = ("system", "user", "assistant")
COLUMNS: dict[str, tuple[str, ...]] = {  # of a question: ours, and the names that others give it
    "image": ("image", "images", "img", "picture", "image_path", "img_path", "image_file", "file_name", "filename"),
    "question": ("question", "query", "text", "caption", "prompt"),
    "answer": ("answer", "answers", "label", "response"),
    "bboxs": ("bboxs", "bboxes", "bbox", "boxes", "box", "bounding_box", "bounding_boxes"),
}


class LeftOut(UserError):
    """A record of the right form that cannot be used: left out and counted where many are read.

    Attributes:
        where: its place, "file:line".
        rule: the row of `faults.RULES`.
        detail: what was seen, without the place.
    """

    def __init__(self, where: str, rule: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.where, self.rule, self.detail = where, rule, detail


@dataclass(frozen=True)
class Message:
    """One turn: its role, and its text with placeholders and control tokens."""

    role: str
    content: str


@dataclass(frozen=True)
class Item:
    """One conversation with its images.

    Attributes:
        messages: the turns.
        images: lists of images by their key ("images", "clip_images", ...).
        extra: the other keys of the JSON object.
        where: "file:line", for messages; not compared.
    """

    messages: tuple[Message, ...]
    images: dict[str, tuple[ImageRef, ...]]
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "item") -> Item:
        """The item of one JSON object.

        Checks types only: whether placeholders, crops and turns agree is checked by `relook.data.check`, since a set
        with faults must be readable to be mended.

        Raises:
            UserError: not of this form; the message opens with `where`.
        """
        messages = data.get("messages")
        if not isinstance(messages, list) or not messages:
            seen = "no 'messages'" if messages is None else f"'messages' is {_name(messages)}"
            raise UserError(f"{where}: {seen}; expected a list of {{'role', 'content'}} turns")
        images = {key: _images(data.get(key), key, where) for key in IMAGE_KEYS}
        extra = {key: value for key, value in data.items() if key != "messages" and key not in images}
        with naming(where):
            built_settings(extra)
        return cls(tuple(_message(turn, i, where) for i, turn in enumerate(messages)), images, extra, where)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON object, every image list present."""
        messages = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return {"messages": messages} | {key: list(self.images.get(key, ())) for key in IMAGE_KEYS} | self.extra

    def placeholder_counts(self) -> dict[str, int]:
        """How often each list's placeholder occurs in the turns: {"images": 2, "clip_images": 0, ...}."""
        return {key: sum(turn.content.count(mark) for turn in self.messages) for key, mark in PLACEHOLDERS.items()}

    def map_images(self, change: Callable[[ImageRef], ImageRef]) -> Item:
        """The same item with every entry of its image lists changed."""
        return replace(self, images={key: tuple(map(change, refs)) for key, refs in self.images.items()})

    def under(self, root: str | Path, *, strict: bool = False) -> Item:
        """The same item with its relative image paths below `root` (see `place_image`)."""
        with naming(self.where):
            return self.map_images(lambda ref: place_image(ref, root, strict=strict))


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        image: path, or image in memory.
        answers: all accepted answers; the first is the one to learn.
        boxes: where the answer stands: x1, y1, x2, y2 in pixels of the upright original, x2 and y2 exclusive.
        size: (width, height) of the upright image where the source states it.
        field: groups scores ("date", "total").
        where: "file:line", for messages.
        slack: by how many pixels each side of `size` may be off; (0, 0) where it is exact.
        notes: what did not come out as its source has it, each to be counted.
        units: the dialect in which the source writes boxes ("0-1000 xywh", see `relook.boxes`); "" for none of these.
        written: the boxes as the source has them, until `in_pixels` has seen to them.
        view: (width, height) of the resized view that "resized" boxes are of, where the source states it.
        located: how its boxes were found, where nobody annotated them: {"by": "ocr", "with": "...", "score": 0.97}.
    """

    image: ImageRef
    text: str
    answers: tuple[str, ...]
    boxes: tuple[Box, ...] = ()
    size: tuple[int, int] | None = None
    field: str | None = None
    where: str = ""
    slack: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    units: str = ""
    written: tuple[Numbers, ...] = ()
    view: tuple[int, int] | None = None
    located: Mapping[str, Any] | None = None

    @property
    def answer(self) -> str:
        """The answer to learn."""
        return self.answers[0]

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], where: str = "question", columns: Mapping[str, str] | None = None
    ) -> Question:
        """The question of one JSON object or row; `width`, `height`, boxes and `field` (or `dataset`) are optional.

        Args:
            columns: our names to its own, where they are not the usual ones (`COLUMNS`): {"question": "prompt_en"}.

        Raises:
            UserError: not of this form; the message opens with `where`.
        """
        with naming(where):
            image, text, answer, boxes = (column(data, ours, columns or {}) for ours in COLUMNS)
            for ours, value in (("image", image), ("question", text), ("answer", answer)):
                if value is None and not any(name in data for name in ((columns or {}).get(ours), *COLUMNS[ours])):
                    raise UserError(missing(ours, data))
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if not image or not (isinstance(image, str) or hasattr(image, "size")):
            raise UserError(f"{where}: 'image' is {image!r}; expected the path of an image")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: 'question' is {text!r}; expected text")
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            raise LeftOut(
                where, "empty-answer", f"'answer' is {answer!r}; expected text, a number, or a list of accepted ones"
            )
        answers = _answers(answer)
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"{where}: 'answer' is {answer!r}; expected text, a number, or a list of accepted ones")
        size = _size(data, where) if isinstance(image, str) else None  # what is in memory has one
        group = data.get("field", data.get("dataset"))
        group = None if group is None else str(group)
        question = cls(image, text, answers, (), size, group, where, located=located_by(data))
        return question.boxed(_boxes(boxes, where), "pixels", _size(data, where, "resized_"))

    def boxed(self, written: Sequence[Numbers], units: str, view: tuple[int, int] | None = None) -> Question:
        """The same question with boxes as written in a dialect; in pixels at once where that takes no size."""
        kind, order = parse_units(units)
        found = (read_box(each, (1, 1), kind, order) for each in written if kind == "pixels")
        return replace(self, boxes=tuple(map(_outwards, found)), units=units, written=tuple(written), view=view)

    def counted_in(self, units: str) -> Question:
        """The same question with its boxes read in a dialect that somebody states, in place of its form's."""
        if self.boxes and not self.written:
            raise UserError(f"{self.where}: boxes of this form are not in {units}, it defines what they are in")
        return self.boxed(self.written, units, self.view)

    def in_pixels(self, fit: BoxFit | None = None, turn: int | None = None) -> Question:
        """The same question with its boxes in pixels, whatever they are written in; `fit` counts them.

        Args:
            turn: EXIF orientation of the image, where it is at hand; else read from the file.

        Raises:
            UserError: the image is needed (for its size) and not there; a number that its units do not have.
        """
        if not self.written:
            return self
        units, order = parse_units(self.units)
        size = self.size if units == "pixels" else image_size(self)
        if size is None and fit is not None and fit.boxes < HELD and isinstance(self.image, str):
            with suppress(UserError):
                size = file_size(self.image)
        turn = file_turn(self.image) if units == "stored" and turn is None else turn or 1
        boxes = []
        with naming(self.where):
            for values in self.written:
                box = read_box(values, size or (1, 1), units, order, view=self.view, turn=turn)
                if fit is not None:
                    fit.add((units, order), values, box, size, self.where)
                boxes.append(_outwards(box))
        return replace(self, boxes=tuple(boxes), written=())

    def under(self, root: str | Path, *, strict: bool = False) -> Question:
        """The same question with its image path below `root` (see `place_image`)."""
        with naming(self.where):
            return replace(self, image=place_image(self.image, root, strict=strict))


def read_items(path: str | Path) -> Iterator[Item]:
    """The items of a JSON array, JSON-lines or Parquet file, lazily. Errors name file and line."""
    return (Item.from_dict(record.value, record.where) for record in read_records(path))


def write_items(path: str | Path, items: Iterable[Item]) -> int:
    """Write items (`.json`: an array, else JSON lines), aside first and then renamed; returns how many."""
    return write_records(path, (item.to_dict() for item in items))


def item_question(item: Item, grid: int | None = None) -> Question | None:
    """The question of an item: None for one of no image or several, or that is not answered in words.

    Its boxes are those that the item keeps of its question (`bboxs`), else what its (nested: last) region calls name.

    Args:
        grid: cells per side; as the item was built, else 8, unless given.
    """
    extra, built = item.extra, built_settings(item.extra)
    grid = grid or built.get("grid", GRID)
    asked = next((turn.content for turn in item.messages if turn.role == "user"), "").replace("<image>", "").strip()
    said = [turn.content for turn in item.messages if turn.role == "assistant"]
    whole = [ref for ref in item.images["images"] if not isinstance(ref, tuple)]
    files = {split_ref(ref)[0] if isinstance(ref, str) else id(ref) for ref in whole}
    if not asked or not said or len(files) != 1:
        return None
    answers = tuple(extra.get("answers") or [said[-1].removeprefix(ANSWER_PREFIX)])
    question = Question(item.images["images"][0], asked, answers, field=extra.get("field"), where=item.where)
    calls = [[call.cells for call in parse_calls(text, grid) if call.cells and not call.problem] for text in said]
    if extra.get("bboxs"):
        boxes = tuple(map(_outwards, _boxes(extra["bboxs"], item.where)))
        return replace(question, boxes=boxes, located=located_by(extra))
    frame: Box = (0, 0, *(image_size(question) if any(calls) else (1, 1)))
    boxes, nested = tuple[Box, ...](), built.get("max_looks", 1) > 1
    for cells in filter(None, calls):
        boxes = (*(() if nested else boxes), *(cells_in(each, frame, grid) for each in cells))
        frame = cells_in(cells[-1], frame, grid, built.get("margin", 0)) if nested else frame
    return replace(question, boxes=boxes)


def from_page(page: Any, index: int, where: str = "") -> Question:
    """Question `index` of a page of a synthetic dataset (`.image`, `.qas` with question, answer, boxes, field)."""
    qa = page.qas[index]
    boxes = tuple(_outwards(_numbers(box, where)) for box in qa.boxes)
    return Question(page.image, qa.question, (qa.answer,), boxes, page.image.size, getattr(qa, "field", None), where)


def image_size(question: Question) -> tuple[int, int]:
    """(width, height) of the upright image: as the source states, else from the file's header (EXIF turns applied)."""
    if question.size is not None:
        return question.size
    if not isinstance(question.image, str):
        return upright(question.image).size
    size = file_size(question.image, question.where)
    if size is None:
        raise UserError(f"{question.where}: no image at {question.image}; check the path, or give the image root")
    return size


def _name(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _message(turn: Any, index: int, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: messages[{index}] is {_name(turn)}; expected {{'role', 'content'}}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise UserError(f"{where}: messages[{index}] has role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{where}: messages[{index}] has {_name(content)} as content; expected text")
    return Message(role, content)


def _images(value: Any, key: str, where: str) -> tuple[ImageRef, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: {key!r} is {_name(value)}; expected a list of image paths")
    for i, ref in enumerate(value):
        # In-memory items hold PIL images or (image, box) pairs; what has a size is taken for one without importing PIL.
        if not isinstance(ref, str | os.PathLike | tuple) and not hasattr(ref, "size"):
            raise UserError(f"{where}: {key}[{i}] is {_name(ref)}; expected the path of an image")
    return tuple(value)


def _size(data: Mapping[str, Any], where: str, of: str = "") -> tuple[int, int] | None:
    sides = data.get(f"{of}width"), data.get(f"{of}height")
    if sides == (None, None):
        return None
    width, height = (side if isinstance(side, int) and not isinstance(side, bool) and side > 0 else 0 for side in sides)
    if not width or not height:
        seen = f"{of}width and {of}height are {sides[0]!r} and {sides[1]!r}"
        raise UserError(f"{where}: {seen}; expected positive whole numbers")
    return width, height


def column(data: Mapping[str, Any], ours: str, columns: Mapping[str, str]) -> Any:
    """What a row holds under the name given for `ours`, or under one of the usual names; None for nothing.

    Raises:
        UserError: no such name, or several of the usual ones that hold different things.
    """
    if (given := columns.get(ours)) is not None:
        if given not in data:
            raise UserError(f"has no {given!r}, which columns names for {ours!r}, among its keys ({', '.join(data)})")
        return data[given]
    there = [name for name in COLUMNS[ours] if data.get(name) is not None]
    if ours not in there and any(data[name] != data[there[0]] for name in there[1:]):
        raise UserError(f"{ours!r} may be {' or '.join(there)}; say which: --columns {ours}={there[0]}")
    return data[there[0]] if there else None


def missing(ours: str, data: Mapping[str, Any]) -> str:
    """That a row has nothing for `ours`, what it has, and what to do."""
    wanted = ", ".join(COLUMNS[ours])
    return f"no {ours!r} among its keys ({', '.join(data)}); expected one of {wanted}, or --columns {ours}=NAME"


def _answers(value: Any) -> tuple[Any, ...]:
    """Accepted answers as texts, each once: of a text, a number, yes or no, SQuAD's structs, and lists of them."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("text", "answer") if key in value), value)
    values = value if isinstance(value, list | tuple) else [value]
    said = []
    for each in values:
        if isinstance(each, Mapping):
            each = next((each[key] for key in ("text", "answer") if key in each), each)
        if isinstance(each, bool):
            each = "yes" if each else "no"
        elif isinstance(each, int | float) and abs(each) < math.inf:
            each = str(each)
        said.append(each)
    return tuple(each for number, each in enumerate(said) if each not in said[:number])


def _boxes(value: Any, where: str) -> tuple[Numbers, ...]:
    """Boxes as written: a list of them, or the only one."""
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise UserError(f"{where}: 'bboxs' is {value!r}; expected a list of [x1, y1, x2, y2] in pixels")
    return tuple(_numbers(each, where) for each in (value if isinstance(value[0], list | tuple) else [value]))


def _numbers(value: Any, where: str) -> Numbers:
    numbers = isinstance(value, list | tuple) and len(value) == 4
    if not numbers or not all(isinstance(v, int | float) and abs(v) < 1e9 for v in value):
        raise UserError(f"{where}: box {value!r}; expected [x1, y1, x2, y2] in pixels")
    return value[0], value[1], value[2], value[3]


def _outwards(box: Numbers) -> Box:
    """A box in whole pixels that still covers what a fractional one covered."""
    return math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
