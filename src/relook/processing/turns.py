"""The structure of a conversation: roles and order of its turns, its images and the view stage of each.

Pure functions over messages ({"role", "content"} with placeholders, or with parts as chat templates take them) and over
texts as the chat template writes them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from relook.errors import UserError
from relook.looks import IM_START, LOOKS, VISION_END, VISION_START, parse_calls
from relook.processing.vocabulary import BREAK, KINDS

Message = Mapping[str, str]


def plain_turn(message: Message, as_text: Callable[[str], str], grid: int) -> dict[str, Any]:
    """A message from outside, its content changed by `as_text`, except for the calls in what the assistant says."""
    content, kept, at = message["content"], list[str](), 0
    for call in parse_calls(content, grid) if message["role"] == "assistant" else ():
        if call.problem is None:
            kept += [as_text(content[at : call.span[0]]), content[slice(*call.span)]]
            at = call.span[1]
    return {**message, "content": "".join([*kept, as_text(content[at:])])}


def template_turn(
    message: Mapping[str, Any], as_text: Callable[[str], str] | None, question_first: bool, grid: int
) -> Any:
    """A message for the chat template: the images and the question of a user turn as in `processor.first_turn`.

    Parts with text between images, as a look shows several regions, stay as they are. With `as_text`, for templates
    whose text is encoded, also as in `plain_turn`.
    """
    content, role = message.get("content") or "", message["role"]
    if role not in ("system", "user", "assistant"):
        raise UserError(f"role {str(role)[:40]!r} is not understood; expected system, user or assistant")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    for part in parts:
        if not isinstance(part, Mapping) or "type" not in part or not isinstance(part.get("text", ""), str):
            shape = "{'type': 'text', 'text': ...} or {'type': 'image', 'image': ...}"
            raise UserError(f"content part {str(part)[:80]} is not understood; expected {shape}")
    parts = [_look_part(part) for part in parts]
    sides = [is_text for is_text, _ in groupby(parts, lambda part: part["type"] == "text")]
    if role == "user" and True in sides and len(sides) <= 2:
        images = [part for part in parts if part["type"] != "text"]
        question = "".join(part.get("text", "") for part in parts if part["type"] == "text").strip()
        after = question_first and all(part["type"] == "image" for part in images)
        newline = {"type": "text", "text": "\n"}
        apart = [piece for image in images for piece in ([newline, image] if after else [image, newline])]
        parts = [*([] if after else apart), {"type": "text", "text": question}, *(apart if after else [])]
    if as_text is not None:
        groups = [list(group) for _, group in groupby(parts, lambda part: part["type"] == "text")]
        parts = []
        for group in groups:  # what stands together is one text, or two halves of a token would meet
            together = {"type": "text", "text": "".join(part.get("text", "") for part in group)}
            parts += [together] if group[0]["type"] == "text" else group
        said = [plain_turn({"role": role, "content": part.get("text", "")}, as_text, grid)["content"] for part in parts]
        if role == "assistant" and said and said[0][:1].isspace():
            said[0] = BREAK + said[0]  # or it would melt into the newline of its header
        parts = [
            {**part, "text": text} if part["type"] == "text" else part for part, text in zip(parts, said, strict=True)
        ]
    return {**message, "content": parts[0]["text"] if isinstance(content, str) else parts}


def _look_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part that shows a re-encoded image, in a form that any chat template writes alike.

    Stock ones take what has the key "image" for an ordinary image, and write the text of parts of types that are not
    theirs.
    """
    kind = part["type"]
    if kind not in _PADS:
        return part
    shown = {"type": kind, "text": VISION_START + _PADS[kind] + VISION_END}
    key = next((key for key in (kind, "image", "url", "path", "base64") if key in part), None)
    return shown if key is None else {**shown, kind: part[key]}


_PADS = {spec.placeholder.strip("<>"): spec.pad for kind, spec in KINDS.items() if kind != "image"}


def check_counts(messages: Sequence[Message], images: Mapping[str, int]) -> None:
    """Refuse a conversation whose placeholders and images differ in number, naming both."""
    for kind, spec in KINDS.items():
        placeholders = sum(message["content"].count(spec.placeholder) for message in messages)
        given = images.get(kind, 0)
        if placeholders != given:
            raise UserError(
                f"the conversation has {placeholders} {spec.placeholder} placeholders but {given} entries in "
                f"{spec.item_key!r}; expected one image per placeholder"
            )


def check_pads(texts: Sequence[str], images: Mapping[str, int]) -> None:
    for kind, spec in KINDS.items():
        pads = sum(text.count(spec.pad) for text in texts)
        if pads != images[kind]:
            raise UserError(
                f"the text has {pads} {spec.pad} but {images[kind]} {spec.item_key} were given; "
                "expected one image per pad"
            )


def image_stages(messages: Sequence[Message]) -> list[str]:
    """The stage of each <image>: "crop" in a turn that answers a region call, else "first"."""
    stages: list[str] = []
    called = False
    for message in messages:
        if message["role"] == "assistant":
            called = LOOKS["region"].start in message["content"]
        else:
            stages += ["crop" if called else "first"] * message["content"].count(KINDS["image"].placeholder)
    return stages


def pad_stages(texts: Sequence[str]) -> list[str]:
    """`image_stages` for the pads of whole conversations as the chat template writes them."""
    stages: list[str] = []
    for text in texts:
        called = False
        for turn in text.split(IM_START):
            if turn.startswith("assistant"):
                called = LOOKS["region"].start in turn
            stages += ["crop" if called else "first"] * turn.count(KINDS["image"].pad)
    return stages


def expand_pads(texts: Sequence[str], pad: str, counts: Sequence[int]) -> list[str]:
    numbers = iter(counts)
    return [re.sub(re.escape(pad), lambda match: match.group() * next(numbers), text) for text in texts]


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The system prompt of a conversation (None: the processor's) and its turns, user and assistant by turns."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    turns = messages[1:] if system is not None else messages
    roles = [turn["role"] for turn in turns]
    if not roles or roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]:
        raise UserError(f"turns by {', '.join(roles) or 'nobody'}; expected user, assistant, user, ... in turn")
    return system, turns
