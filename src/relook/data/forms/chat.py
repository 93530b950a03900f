"""Conversations of published sets, a record each: LLaVA and ShareGPT, POPE, Visual-CoT.

    llava       {"image" or "images", "conversations": [{"from", "value"}], "system": "..."}
    pope        {"image", "text", "label"}
    swift       {"messages", "images", "objects": {"ref": ["a dog"], "bbox": [[x1, y1, x2, y2]]}} (ms-swift)
    viscot      {"dataset": "gqa", "image": ["cot/gqa/2316539.jpg", "cot/gqa/2316539.jpg###[217, 343, 242, 393]"],
                 "conversations": [question and sentence that asks for coordinates, "[0.542, 0.686, 0.592, 0.786]",
                                   "<image>", "window"]}

A conversation of one exchange about one image is a `Question`, from which any look can be built; another stays the
`Item` it is.

Marks of other tools for places in a text (`<ref-object>` and `<bbox>` of ms-swift, `<ref>...</ref><box>...</box>` of
InternVL and Qwen-VL, in thousandths of the image) are resolved in an answer: the words stay, the boxes become those of
the question. A question that points at a place in this way, or an answer that is nothing but boxes, is left out.

Visual-CoT's box after `###` is x1, y1, x2, y2 in pixels of the image. The fractions of the second turn are *not* of the
image: they are of the square that holds it, with equal bands on both sides of its shorter axis. So the two together say
how large the image was, which nothing else in the file does: above, 217/0.542 and 242/0.592 do not agree on a width,
but (217 + 54) / 0.542 = (242 + 54) / 0.592 = 343 / 0.686 = 500 do: 500 high, 500 - 2 * 54 = 392 wide.
Three decimals make that an interval, which `padded_size` returns with the size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from relook.boxes import read_box
from relook.data.items import IMAGE_KEYS, Item, LeftOut, Message, Question
from relook.errors import UserError
from relook.regions import Box

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
ASKS_FOR_BOX = re.compile(
    r"\s*Please provide the bounding box coordinate of the region that can help you answer the question better\.\s*$"
)
_BOX = re.compile(r"(?P<path>.*)###\[(?P<box>[^\]]*)\]", re.DOTALL)
_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_TAGGED = re.compile(r"<box>(?P<box>[^<]*\d[^<]*)</box>")
_MARKS = re.compile("<ref-object>|<bbox>")
_HALF_DIGIT = 0.0005  # fractions are written with three decimals
LARGEST_SIDE = 1e5  # pixels; what a box at the very edge would otherwise leave open


def llava_conversation(data: Mapping[str, Any], where: str) -> Question | Item:
    """A LLaVA or ShareGPT conversation. A missing placeholder of a single image is put in front of the first turn."""
    turns = data.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' is {turns!r}; expected a list of {{'from', 'value'}} turns")
    messages = [_turn(turn, i, where) for i, turn in enumerate(turns)]
    if isinstance(data.get("system"), str) and data["system"] and messages[0].role != "system":
        messages.insert(0, Message("system", data["system"]))
    given = data.get("image", data.get("images"))
    images = [given] if isinstance(given, str) else list(given or ())
    if not all(isinstance(ref, str) for ref in images):
        raise UserError(f"{where}: images are {given!r}; expected paths")
    marks = sum(turn.content.count(PLACEHOLDER) for turn in messages)
    users = [i for i, turn in enumerate(messages) if turn.role == "user"]
    if len(images) == 1 and not marks and users:
        first = messages[users[0]]
        messages[users[0]] = Message("user", f"{PLACEHOLDER}\n{first.content}")
    if len(images) == 1 and marks <= 1 and [turn.role for turn in messages] == ["user", "assistant"]:
        text = messages[0].content.replace(PLACEHOLDER, "").strip()
        if text and messages[1].content.strip():
            return _tagged(data, Question(images[0], text, (messages[1].content,), where=where))
    said = " ".join(turn.content for turn in messages)
    if "<video>" in said and not (data.get("video") or data.get("videos")):
        raise LeftOut(where, "unresolved", "<video> in a text, and the record has none")
    if _TAGGED.search(said):
        raise LeftOut(where, "unresolved", "<box> in a conversation of several turns or images")
    keys = ("id", "conversations", "image", "images", "system", *IMAGE_KEYS)
    extra = {key: value for key, value in data.items() if key not in keys}
    return Item(tuple(messages), {key: tuple(images) if key == "images" else () for key in IMAGE_KEYS}, extra, where)


def _tagged(data: Mapping[str, Any], question: Question) -> Question:
    """The question with the <box> of its answer resolved, whose numbers are thousandths whatever others are."""
    where, answer = question.where, question.answer
    found = [match["box"] for match in _TAGGED.finditer(answer)]
    if _TAGGED.search(question.text):
        raise LeftOut(where, "unresolved", "<box> in a question points at a place, which words cannot")
    if "<video>" in question.text + answer and not (data.get("video") or data.get("videos")):
        raise LeftOut(where, "unresolved", "<video> in a text, and the record has none")
    if not found:
        return question
    if not all(isinstance(data.get(side), int) for side in ("width", "height")):
        raise LeftOut(where, "unresolved", "<box> counts in thousandths of the image; add its width and height")
    size = int(data["width"]), int(data["height"])
    values = [float(number) for box in found for number in re.findall(r"-?\d*\.?\d+", box)]
    quads = [values[i : i + 4] for i in range(0, len(values), 4)]
    inside = all(0 <= value <= 1000 for value in values) and max(values) > 1
    if len(values) % 4 or not inside or any(x1 > x2 or y1 > y2 for x1, y1, x2, y2 in quads):
        raise LeftOut(where, "unresolved", f"<box>{found[0]}</box> is no box; expected x1, y1, x2, y2 in thousandths")
    asked = {"image": question.image, "question": question.text, "width": size[0], "height": size[1]}
    boxes = [list(read_box(quad, size, "0-1000")) for quad in quads]
    return replace(_resolved(asked, _TAGGED.sub("", answer), boxes, where), written=())


def _resolved(line: dict[str, Any], answer: str, boxes: list[list[float]], where: str) -> Question:
    """The question whose answer has had its boxes taken out of the text."""
    words = re.sub(r"\s+([,.;])", r"\1", " ".join(answer.split()))
    if not any(character.isalnum() for character in words):
        raise LeftOut(where, "unresolved", "the answer is nothing but boxes, which no text of it remains without")
    return Question.from_dict({**line, "answer": words, "bboxs": boxes}, where)


def swift_record(data: Mapping[str, Any], where: str) -> Question | Item:
    """A conversation of ms-swift: `<ref-object>` becomes the words it stands for, `<bbox>` a box of the question."""
    item, objects = Item.from_dict(data, where), data.get("objects")
    if not objects:
        if any(_MARKS.search(turn.content) for turn in item.messages):
            raise LeftOut(where, "unresolved", "<bbox> or <ref-object> in a text, and the record has no 'objects'")
        return item
    names, boxes = ([*(objects.get(key) or ())] if isinstance(objects, Mapping) else [] for key in ("ref", "bbox"))
    taken: list[Any] = []

    def resolve(role: str, match: re.Match[str]) -> str:
        if match[0] == "<bbox>" and role != "assistant":
            raise LeftOut(where, "unresolved", "<bbox> in a question points at a place, which words cannot")
        left = boxes if match[0] == "<bbox>" else names
        if not left:
            raise LeftOut(where, "unresolved", f"more {match[0]} than 'objects' has")
        if match[0] == "<bbox>":
            taken.append(left.pop(0))
            return ""
        return str(left.pop(0))

    turns = [_MARKS.sub(lambda match, role=turn.role: resolve(role, match), turn.content) for turn in item.messages]  # type: ignore[misc]
    extra = {key: value for key, value in item.extra.items() if key != "objects"}
    if not taken:
        messages = tuple(Message(turn.role, text) for turn, text in zip(item.messages, turns, strict=True))
        return Item(messages, item.images, extra, where)
    images = item.images["images"]
    if [turn.role for turn in item.messages] != ["user", "assistant"] or len(images) != 1:
        raise LeftOut(where, "unresolved", "<bbox> in a conversation of several turns or images")
    if objects.get("bbox_type", "real") != "real":
        raise LeftOut(where, "unresolved", f"boxes of the type {objects['bbox_type']!r}; expected 'real', in pixels")
    asked = turns[0].replace(PLACEHOLDER, "").strip()
    return _resolved({"image": images[0], "question": asked}, turns[1], taken, where)


def pope_question(data: Mapping[str, Any], where: str) -> Question:
    """A question of POPE: is a named object in the image, yes or no; there are no boxes."""
    image, text, label = (data.get(key) for key in ("image", "text", "label"))
    if not all(isinstance(value, str) and value.strip() for value in (image, text, label)):
        raise UserError(f"{where}: image, text and label are {image!r}, {text!r}, {label!r}; expected three texts")
    return Question(str(image), str(text), (str(label),), field="pope", where=where)


def _turn(turn: Any, index: int, where: str) -> Message:
    speaker = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    content = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
    if speaker not in ROLES or not isinstance(content, str):
        raise UserError(
            f"{where}: conversations[{index}] is {str(turn)[:80]}; expected {{'from', 'value'}} by {', '.join(ROLES)}"
        )
    return Message(ROLES[speaker], _REF.sub(r"\1", content))


def viscot_question(data: Mapping[str, Any], where: str) -> Question:
    """The question of one record, its size worked out from both boxes (`slack` says how well)."""
    images, turns = data.get("image"), data.get("conversations")
    if not isinstance(images, list) or len(images) != 2 or not all(isinstance(ref, str) for ref in images):
        raise UserError(f"{where}: 'image' is {images!r}; expected [path, path###[x1, y1, x2, y2]]")
    match = _BOX.fullmatch(images[1])
    if match is None:
        raise UserError(f"{where}: {images[1]!r} names no box; expected path###[x1, y1, x2, y2]")
    if not isinstance(turns, list) or len(turns) != 4 or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: expected four turns under 'conversations' (question, box, <image>, answer)")
    asked, fractions, _, answer = (str(turn.get("value", "")) for turn in turns)
    pixels = _numbers(match["box"], where)
    box = (math.floor(pixels[0]), math.floor(pixels[1]), math.ceil(pixels[2]), math.ceil(pixels[3]))
    size, slack = padded_size(box, _numbers(fractions.strip().strip("[]"), where)) or (None, (0, 0))
    text = ASKS_FOR_BOX.sub("", asked.removeprefix("<image>").strip())
    if not text:
        raise UserError(f"{where}: the question is empty")
    name = data.get("dataset")
    return Question(images[0], text, (answer,), (box,), size, None if name is None else str(name), where, slack)


def padded_size(box: Box, fractions: Sequence[float]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size (width, height) of the image and how far each side may be off, both in pixels; None if nothing fits.

    `box` is in pixels of the image, `fractions` the same box in the image padded to a square on both sides of its
    shorter axis. A pixel of rounding is allowed on top of the decimals.

    >>> padded_size((217, 343, 242, 393), (0.542, 0.686, 0.592, 0.786))
    ((392, 500), (3, 2))
    """
    across = [(box[0], fractions[0]), (box[2], fractions[2])]
    down = [(box[1], fractions[1]), (box[3], fractions[3])]
    for tolerance in (1.0, 2.0, 4.0, 8.0):
        wide = _fits(across, down, tolerance)
        tall = [(side, other) for other, side in _fits(down, across, tolerance)]
        if fitting := wide + tall:
            widths, heights = zip(*fitting, strict=True)
            return _middle(widths, heights)
    return None


def _fits(long: list[tuple[int, float]], short: list[tuple[int, float]], tolerance: float) -> list[tuple[float, float]]:
    """Extreme (long side, short side) of an image whose long axis is not padded; edges as (pixel, fraction).

    With side S and a band p on each end of the short axis, an edge v at fraction f says |f S - p - v| <= S/2000 + t:
    half planes in (S, p). What they leave is a polygon, and its corners are the extremes of S and of S - 2 p.
    """
    telling = [(pixel, share) for pixel, share in long if share > _HALF_DIGIT]  # an edge at 0 says nothing of the side
    low = max([1.0, *((pixel - tolerance) / (share + _HALF_DIGIT) for pixel, share in telling)])
    high = min([LARGEST_SIDE, *((pixel + tolerance) / (share - _HALF_DIGIT) for pixel, share in telling)])
    if low > high:
        return []
    planes = [(1.0, 0.0, high), (-1.0, 0.0, -low), (0.0, -1.0, 0.0), (-1.0, 2.0, -1.0)]  # a S + b p <= c
    for pixel, share in short:
        planes.append((share - _HALF_DIGIT, -1.0, pixel + tolerance))
        planes.append((-share - _HALF_DIGIT, 1.0, tolerance - pixel))
    corners = []
    for (a, b, c), (d, e, f) in combinations(planes, 2):
        if det := a * e - b * d:
            side, band = (c * e - b * f) / det, (a * f - c * d) / det
            if all(x * side + y * band <= z + 1e-6 for x, y, z in planes):
                corners.append((side, side - 2 * band))
    return corners


def _middle(widths: Sequence[float], heights: Sequence[float]) -> tuple[tuple[int, int], tuple[int, int]]:
    width, height = (round((min(sides) + max(sides)) / 2) for sides in (widths, heights))
    off = (math.ceil((max(sides) - min(sides)) / 2) for sides in (widths, heights))
    return (width, height), (next(off), next(off))


def _numbers(text: str, where: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise UserError(f"{where}: {text!r} is not a box; expected four numbers x1, y1, x2, y2")
    return values
