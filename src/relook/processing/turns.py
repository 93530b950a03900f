"""The structure of a conversation: roles of its turns, number of its images, the view stage of each image.

Pure functions over messages ({"role", "content"} with placeholders) and over texts as the chat template writes them.
"""

import re
from collections.abc import Mapping, Sequence

from relook.errors import UserError
from relook.looks import IM_START, LOOKS
from relook.processing.vocabulary import KINDS

Message = Mapping[str, str]


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
