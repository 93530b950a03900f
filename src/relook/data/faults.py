"""The table of faults: what can be wrong with an item, how it is found, and how it is mended.

A fault is a row of `RULES`: `find` yields what it sees, in words; `mend` gives the item without the fault, or None
where it must be left out of the set. A row without `mend` is for people to judge. `relook.data.check` runs the table
over a file. What is needed besides the item (the grid, its images, earlier items) is a `Context`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from relook.data.crops import FactsOf, answer_room, crop_faults, mend_crops, region_calls
from relook.data.images import ImageFacts, place_image, split_ref
from relook.data.items import IMAGE_KEYS, PLACEHOLDERS, Item, LeftOut, Message, Question
from relook.data.settings import built_settings, difference
from relook.errors import UserError
from relook.looks import ANSWER_PREFIX, LOOKS, look_turn, parse_calls, x_token, y_token
from relook.regions import GRID


@dataclass
class Context:
    """What rules look up besides the item.

    Attributes:
        root, strict: folder of the image paths; whether they may not leave it.
        looks: those that the model has; None where it is not known.
        settings: for which items are to be built (`data.settings`); one that an item does not store is not compared.
        facts: of an image file.
        other_file: an evaluation image with the same bytes, by their digest.
        other_look: an evaluation image that looks nearly the same, by the perceptual hash.
        first_seen: number of the first item with the same hash (`item_key`).
        number: of the current item, from 1.
    """

    grid: int = GRID
    root: str = "."
    strict: bool = False
    looks: Sequence[str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: FactsOf = lambda file: None
    other_file: Callable[[bytes], str | None] = lambda digest: None
    other_look: Callable[[bytes], str | None] = lambda look: None
    first_seen: dict[int, int] = field(default_factory=dict)
    number: int = 0
    _last: tuple[Item, list[tuple[str, str]]] | None = None

    def files(self, item: Item) -> list[str]:
        """The image files that an item names, each once."""
        refs = (ref for key in IMAGE_KEYS for ref in item.images[key] if isinstance(ref, str))
        return list(dict.fromkeys(split_ref(ref)[0] for ref in refs))

    def crop_faults(self, item: Item) -> list[tuple[str, str]]:
        """(row, what was seen) of the item's crops, which several rows share."""
        if self._last is None or self._last[0] is not item:
            self._last = item, list(crop_faults(item, self.grid, self.facts, self.settings))
        return self._last[1]

    def known(self, item: Item) -> Iterator[tuple[str, ImageFacts]]:
        """The images of an item that were looked at and could be read."""
        for file in self.files(item):
            facts = self.facts(file)
            if facts is not None and facts.problem is None:
                yield file, facts


UNREAD = ("video", "videos", "audio", "audios", "objects")  # of records of LLaVA and ms-swift
_HALF = re.compile("[\ud800-\udfff]")

Find = Callable[[Item, Context], Iterator[str]]
Mend = Callable[[Item, Context], Item | None]


class Rule(NamedTuple):
    """A row: `find` is None where the fault shows before there is an item; `mend` where the item stays as it is."""

    find: Find | None
    mend: Mend | None = lambda item, context: None  # leaves it out


# -- turns


def half_characters(texts: Sequence[str]) -> Iterator[str]:
    """Half a surrogate pair, which JSON can hold and no tokenizer takes."""
    for text in texts:
        if not text.isascii() and (found := _HALF.search(text)):
            yield f"{found.group()!a} is half a character (a lone surrogate)"


def _half_characters(item: Item, context: Context) -> Iterator[str]:
    return half_characters([turn.content for turn in item.messages])


def _unresolved(item: Item, context: Context) -> Iterator[str]:
    """Placeholders that their form defines and that nothing stands behind."""
    for turn in item.messages:
        for mark in PLACEHOLDERS.values() if turn.role != "user" else ():
            if mark in turn.content:
                yield f"{mark} in what the {turn.role} says shows nothing"
    for key in UNREAD:
        if item.extra.get(key):
            yield f"its {key!r} cannot be shown"


def _other_settings(item: Item, context: Context) -> Iterator[str]:
    if differs := difference(built_settings(item.extra), context.settings):
        yield f"built with {differs}"


def _foreign_look(item: Item, context: Context) -> Iterator[str]:
    said = (turn.content for turn in item.messages if turn.role == "assistant" and "<|" in turn.content)
    used = {call.look for text in said for call in parse_calls(text, context.grid) if call.problem is None}
    used |= {name for name, spec in LOOKS.items() if spec.reencodes and item.images.get(spec.item_key)}
    for look in LOOKS if context.looks is not None else ():
        if look in used and look not in (context.looks or ()):
            yield f"a {look} look, which the model lacks; it has {', '.join(context.looks or ()) or 'none'}"


def _placeholders(item: Item, context: Context) -> Iterator[str]:
    counts = item.placeholder_counts()
    for key in IMAGE_KEYS:
        given = len(item.images.get(key, ()))
        if counts[key] != given:
            yield f"{counts[key]} placeholders for {given} {key}"


def _mend_placeholders(item: Item, context: Context) -> Item | None:
    """Write the turns after calls anew, and an `<image>` above the question where one image has no placeholder."""
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
            times = f", {count} times" if count > 1 else ""
            yield f"{token} names a cell beyond the last of {context.grid}{times}"


def _mend_off_edge(item: Item, context: Context) -> Item | None:
    mended = mend_crops(item, context.grid, context.facts, "off-edge", context.settings)
    return None if mended is None else _clamped_turns(mended, context.grid)


def _clamped_turns(item: Item, grid: int) -> Item:
    def clamped(text: str) -> str:
        return text.replace(x_token(grid), x_token(grid - 1)).replace(y_token(grid), y_token(grid - 1))

    turns = (replace(t, content=clamped(t.content)) if t.role == "assistant" else t for t in item.messages)
    return replace(item, messages=tuple(turns))


def _malformed(item: Item, context: Context) -> Iterator[str]:
    """Calls that do not parse, apart from those that only need `_mend_off_edge`."""
    for turn in _clamped_turns(item, context.grid).messages:
        if turn.role == "assistant" and "<|" in turn.content:
            calls = parse_calls(turn.content, context.grid)
            yield from (f"{call.look} call: {call.problem}" for call in calls if call.problem)


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


# -- crops and their calls


def _crop_rule(name: str) -> Rule:
    return Rule(
        lambda item, context: (detail for rule, detail in context.crop_faults(item) if rule == name),
        lambda item, context: mend_crops(item, context.grid, context.facts, name, context.settings),
    )


def _crowded(item: Item, context: Context) -> Iterator[str]:
    if region_calls(item, context.grid) and item.messages[-1].role == "assistant":
        yield from answer_room(item, context.grid)


# -- images


def _leaving(item: Item, context: Context) -> Iterator[str]:
    for file in context.files(item) if context.strict else ():
        try:
            place_image(file, context.root, strict=True)
        except UserError as error:
            yield str(error).partition(";")[0]


def _image_problem(problem: str) -> Find:
    def find(item: Item, context: Context) -> Iterator[str]:
        facts = ((file, context.facts(file)) for file in context.files(item))
        return (f"{file}: {found.detail}" for file, found in facts if found is not None and found.problem == problem)

    return find


def item_key(item: Item, context: Context) -> int:
    """64 bits of an item's turns, and of its images, by content where that is known, else by name.

    Among a million items the chance that any two different ones share a key is 3 in 100 million.
    """
    digests = {file: facts.digest for file, facts in context.known(item)}
    parts: list[object] = [(turn.role, turn.content) for turn in item.messages]
    for key in IMAGE_KEYS:
        for ref in item.images[key]:
            file, box = split_ref(ref) if isinstance(ref, str) else (str(ref), None)
            parts.append((key, digests.get(file, file), box))
    return int.from_bytes(hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest(), "little")


def _duplicate(item: Item, context: Context) -> Iterator[str]:
    first = context.first_seen.setdefault(item_key(item, context), context.number)
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


RULES: dict[str, Rule] = {  # in the order in which faults are mended
    "form": Rule(None),  # a record that is broken, or is not an item
    "box-units": Rule(None),  # boxes of questions that only make sense in other units or another order
    "half-character": Rule(_half_characters),
    "unresolved": Rule(_unresolved),  # a placeholder in an answer; a video, audio or object of other forms
    "role-order": Rule(_role_order, _mend_roles),  # or no answer at the end
    "empty-answer": Rule(_empty_answer),
    "off-edge": Rule(_off_edge, _mend_off_edge),  # <|x_8|> or <|y_8|>: a cell beyond the last
    "malformed-call": Rule(_malformed),
    "foreign-look": Rule(_foreign_look),  # that the model lacks
    "other-settings": Rule(_other_settings, None),  # built for another grid, margin or order than the model's
    "placeholder-count": Rule(_placeholders, _mend_placeholders),  # that disagrees with the image lists
    "crop-swapped": _crop_rule("crop-swapped"),  # min and max
    "exif-rotation": _crop_rule("exif-rotation"),  # a crop and cells of the picture as stored, which EXIF turns
    "crop-outside": _crop_rule("crop-outside"),  # empty, or leaves the image
    "crop-region": _crop_rule("crop-region"),  # not the region of its call
    "answer-room": Rule(_crowded, None),  # an answer longer than its crops could show
    "path-outside": Rule(_leaving),  # an image path that leaves the given root
    "missing-image": Rule(_image_problem("missing")),
    "unreadable-image": Rule(_image_problem("unreadable")),
    "duplicate": Rule(_duplicate),
    "evaluated": Rule(_evaluated),  # an image of the evaluation set, by its bytes
    "nearly-evaluated": Rule(_nearly_evaluated, None),  # an image that looks like one of the evaluation set
}


def found_faults(item: Item, context: Context) -> Iterator[tuple[str, str]]:
    """(row, what was seen) of every fault of an item, in the order of the table."""
    return ((name, detail) for name, rule in RULES.items() if rule.find for detail in rule.find(item, context))


# what training stumbles over, apart from what shows when images are opened
TEXT = ("half-character", "unresolved")
NEEDED = (
    *TEXT,
    "role-order",
    "empty-answer",
    "off-edge",
    "malformed-call",
    "foreign-look",
    "other-settings",
    "placeholder-count",
)


def refuse(thing: Item | Question, context: Context, rows: Sequence[str] = NEEDED) -> None:
    """Raise for a thing that cannot be used: the one idea of a valid record, of build, check, dry run and training.

    Raises:
        LeftOut: it shows a fault of one of the `rows`; a question has text only.
    """
    if isinstance(thing, Question):
        for detail in half_characters((thing.text, *thing.answers)):
            raise LeftOut(thing.where, "half-character", detail)
        return
    for name in rows:
        rule = RULES[name]
        for detail in rule.find(thing, context) if rule.find else ():
            raise LeftOut(thing.where, name, detail)
