"""The table of faults: what can be wrong with an item, how it is found, and how it is mended.

A fault is a row of `RULES`. `find` yields what it sees, in words; `mend` gives the item without the fault, or None
where it must be left out of the set; a row without `mend` is for people to judge. `relook.data.check` runs the table
over a file and knows no fault by name. What must be known besides the item (the grid, its images, what was seen before)
comes as an `Context`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from relook.data.crops import answer_room, crop_faults, mend_crops, region_calls
from relook.data.images import ImageFacts, place_image, split_ref
from relook.data.items import IMAGE_KEYS, PLACEHOLDERS, Item, Message
from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, look_turn, parse_calls, x_token, y_token
from relook.regions import GRID


@dataclass
class Context:
    """What the rules may ask besides the item: `number` is the item's (from 1), `facts` tells of an image file."""

    grid: int = GRID
    root: str = "."
    strict: bool = False  # paths may not leave the root
    facts: Callable[[str], ImageFacts | None] = lambda file: None  # None: not looked at
    other_file: Callable[[bytes], str | None] = lambda digest: None  # an evaluation image with the same bytes
    other_look: Callable[[bytes], str | None] = lambda look: None  # one that looks nearly the same
    first_seen: dict[int, int] = field(default_factory=dict)  # hash of an item -> number of the first such item
    number: int = 0
    _last: tuple[Item, list[str], list[tuple[str, str]]] | None = None

    def files(self, item: Item) -> list[str]:
        """The image files that an item names, each once."""
        return self._of(item)[0]

    def crop_faults(self, item: Item) -> list[tuple[str, str]]:
        """(row, what was seen) of the item's crops, which several rows share."""
        return self._of(item)[1]

    def _of(self, item: Item) -> tuple[list[str], list[tuple[str, str]]]:
        """What several rows ask of the same item, found once."""
        if self._last is None or self._last[0] is not item:
            refs = (ref for key in IMAGE_KEYS for ref in item.images[key] if isinstance(ref, str))
            files = list(dict.fromkeys(split_ref(ref)[0] for ref in refs))
            self._last = item, files, list(crop_faults(item, self))
        return self._last[1:]

    def known(self, item: Item) -> Iterator[tuple[str, ImageFacts]]:
        """The images of an item that were looked at and could be read."""
        for file in self.files(item):
            facts = self.facts(file)
            if facts is not None and facts.problem is None:
                yield file, facts


Find = Callable[[Item, Context], Iterator[str]]
Mend = Callable[[Item, Context], Item | None]


@dataclass(frozen=True)
class Rule:
    """A row: what is found, what `--fix` does about it, and the two functions.

    `find` is None where the fault shows before there is an item; `mend` is None where the item stays as it is.
    """

    finds: str
    mends: str
    find: Find | None
    mend: Mend | None


def leave_out(item: Item, context: Context) -> None:
    """The mend of what cannot be mended."""
    return None


# ---- the turns


def _placeholders(item: Item, context: Context) -> Iterator[str]:
    counts = item.placeholder_counts()
    for key in IMAGE_KEYS:
        if counts[key] != len(item.images[key]):
            yield f"{counts[key]} placeholders for {len(item.images[key])} {key}"


def _mend_placeholders(item: Item, context: Context) -> Item | None:
    """Write the turns after calls anew, and an `<image>` above the question where there is one image and none said."""
    turns = list(item.messages)
    for i, turn in enumerate(turns[:-1]):
        calls = parse_calls(turn.content, context.grid) if turn.role == "assistant" else []
        if calls and turns[i + 1].role == "user":
            turns[i + 1] = Message("user", look_turn(calls))
    mended = replace(item, messages=tuple(turns))
    mark = PLACEHOLDERS["images"]
    asked = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    missing = len(item.images["images"]) - mended.placeholder_counts()["images"]
    if missing == 1 and asked is not None and mark not in turns[asked].content:
        turns[asked] = Message("user", f"{mark}\n{turns[asked].content}")
        mended = replace(item, messages=tuple(turns))
    return None if any(_placeholders(mended, context)) else mended


def _off_edge(item: Item, context: Context) -> Iterator[str]:
    """`<|x_8|>` and `<|y_8|>` on 8 x 8 cells: a box edge on the image's border, floored to the cell after the last."""
    for token in (x_token(context.grid), y_token(context.grid)):
        count = sum(turn.content.count(token) for turn in item.messages if turn.role == "assistant")
        if count:
            yield f"{token} names a cell beyond the last of {context.grid}" + (f", {count} times" if count > 1 else "")


def _mend_off_edge(item: Item, context: Context) -> Item | None:
    mended = mend_crops(item, context, "off-edge")
    return None if mended is None else _clamped_turns(mended, context.grid)


def _clamped_turns(item: Item, grid: int) -> Item:
    turns = list(item.messages)
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            text = turn.content.replace(x_token(grid), x_token(grid - 1)).replace(y_token(grid), y_token(grid - 1))
            turns[i] = Message(turn.role, text)
    return replace(item, messages=tuple(turns))


def _malformed(item: Item, context: Context) -> Iterator[str]:
    """Calls that do not parse, apart from those that only need `_off_edge`."""
    if any(_off_edge(item, context)):
        item = _clamped_turns(item, context.grid)
    for turn in item.messages:
        if turn.role == "assistant" and "<|" in turn.content:
            for call in parse_calls(turn.content, context.grid):
                if call.problem:
                    yield f"{call.look} call: {call.problem}"


def _role_order(item: Item, context: Context) -> Iterator[str]:
    roles = [turn.role for turn in item.messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        shown = ", ".join(roles[:8]) + (f" and {len(roles) - 8} more" if len(roles) > 8 else "")
        yield f"roles {shown}; expected user and assistant in turn, the last an assistant's"


def _mend_roles(item: Item, context: Context) -> Item | None:
    """Cut what comes after the last assistant's turn, and the images it stood for; any other order is left out."""
    last = max((i for i, turn in enumerate(item.messages) if turn.role == "assistant"), default=-1)
    kept, cut = item.messages[: last + 1], Item(item.messages[last + 1 :], {})
    gone = cut.placeholder_counts()
    images = {key: refs[: len(refs) - gone[key]] for key, refs in item.images.items()}
    mended = replace(item, messages=kept, images=images)
    return None if any(_role_order(mended, context)) else mended


def _empty_answer(item: Item, context: Context) -> Iterator[str]:
    said = [turn.content for turn in item.messages if turn.role == "assistant"]
    for number, text in enumerate(said, start=1):
        if not text.strip() or text.strip() == ANSWER_PREFIX.strip():
            yield "the last answer is empty" if number == len(said) else f"assistant's turn {number} is empty"


# ---- crops and their calls (relook.data.crops)


def _crop_rule(name: str) -> tuple[Find, Mend]:
    def find(item: Item, context: Context) -> Iterator[str]:
        return (detail for rule, detail in context.crop_faults(item) if rule == name)

    def mend(item: Item, context: Context) -> Item | None:
        return mend_crops(item, context, name)

    return find, mend


def _crowded(item: Item, context: Context) -> Iterator[str]:
    if region_calls(item, context.grid) and item.messages[-1].role == "assistant":
        yield from answer_room(item, context)


# ---- images


def _leaving(item: Item, context: Context) -> Iterator[str]:
    for file in context.files(item) if context.strict else ():
        try:
            place_image(file, context.root, strict=True)
        except UserError as error:
            yield str(error).partition(";")[0]


def _image_problem(problem: str) -> Find:
    def find(item: Item, context: Context) -> Iterator[str]:
        for file in context.files(item):
            facts = context.facts(file)
            if facts is not None and facts.problem == problem:
                yield f"{file}: {facts.detail}"

    return find


def item_key(item: Item, digests: Mapping[str, bytes]) -> int:
    """64 bits of an item's turns, and of its images, by content where that is known, else by name.

    Among a million items the chance that any two different ones share a key is 3 in 100 million.
    """
    parts: list[object] = [(turn.role, turn.content) for turn in item.messages]
    for key in IMAGE_KEYS:
        for ref in item.images[key]:
            file, box = split_ref(ref) if isinstance(ref, str) else (str(ref), None)
            parts.append((key, digests.get(file, file), box))
    return int.from_bytes(hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest(), "little")


def _duplicate(item: Item, context: Context) -> Iterator[str]:
    digests = {file: facts.digest for file, facts in context.known(item)}
    first = context.first_seen.setdefault(item_key(item, digests), context.number)
    if first != context.number:
        yield f"the same turns and images as item {first}"


def _evaluated(item: Item, context: Context) -> Iterator[str]:
    for file, facts in context.known(item):
        other = context.other_file(facts.digest)
        if other is not None:
            yield f"{file} is the evaluation image {other}, byte for byte"


def _nearly_evaluated(item: Item, context: Context) -> Iterator[str]:
    for file, facts in context.known(item):
        if facts.look is not None and context.other_file(facts.digest) is None:
            other = context.other_look(facts.look)
            if other is not None:
                yield f"{file} looks like the evaluation image {other}"


_LEFT_OUT = "the item is left out"

RULES: dict[str, Rule] = {
    "form": Rule("a record that is broken, or is not an item", _LEFT_OUT, None, leave_out),
    "role-order": Rule(
        "roles out of order, or no answer at the end", "turns after the last answer are cut, else left out",
        _role_order, _mend_roles,
    ),
    "empty-answer": Rule("an assistant's turn that says nothing", _LEFT_OUT, _empty_answer, leave_out),
    "off-edge": Rule(
        "<|x_8|> or <|y_8|>: a cell beyond the last", "the last cell, and a crop inside the image",
        _off_edge, _mend_off_edge,
    ),
    "malformed-call": Rule("a call that cannot be read", _LEFT_OUT, _malformed, leave_out),
    "placeholder-count": Rule(
        "placeholders that disagree with the image lists", "written anew where turns and lists allow, else left out",
        _placeholders, _mend_placeholders,
    ),
    "crop-swapped": Rule("a crop with min and max swapped", "put in order", *_crop_rule("crop-swapped")),
    "exif-rotation": Rule(
        "a crop and cells of the picture as stored, which EXIF turns", "crop and cells turned with it",
        *_crop_rule("exif-rotation"),
    ),
    "crop-outside": Rule(
        "a crop that is empty or leaves the image", "cut anew from the call's cells, or at the border, else left out",
        *_crop_rule("crop-outside"),
    ),
    "crop-region": Rule(
        "a crop that is not the region of its call", "cut anew where the image's size is known, else left out",
        *_crop_rule("crop-region"),
    ),
    "answer-room": Rule("an answer longer than its crops could show", "kept: look at it", _crowded, None),
    "path-outside": Rule("an image path that leaves the given root", _LEFT_OUT, _leaving, leave_out),
    "missing-image": Rule("an image that is not there", _LEFT_OUT, _image_problem("missing"), leave_out),
    "unreadable-image": Rule(
        "an image that cannot be decoded to its end", _LEFT_OUT, _image_problem("unreadable"), leave_out
    ),
    "duplicate": Rule("an item that was there before", "the later one is left out", _duplicate, leave_out),
    "evaluated": Rule("an image of the evaluation set, by its bytes", _LEFT_OUT, _evaluated, leave_out),
    "nearly-evaluated": Rule(
        "an image that looks like one of the evaluation set", "kept: look at both", _nearly_evaluated, None
    ),
}  # fmt: skip
