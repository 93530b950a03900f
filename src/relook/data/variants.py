"""Published items in another form: without the sentences that ask, with another encoder's look, or without looks.

The published sets exist once for each model (CLIP, detection, seg); only the names in them differ. This module knows
turns and names. It refuses to know boxes and pixels.
"""

from __future__ import annotations

from dataclasses import replace

from relook.data.items import ImageRef, Item, Message
from relook.looks import ANSWER_PREFIX, LOOKS, parse_calls, write_call
from relook.looks import without_triggers as strip_triggers

DIRECT = "none"  # the look of an item that answers at once


def variant(item: Item, look: str = "region", *, free_choice: bool = False) -> Item:
    """The item with its re-encoding looks made by `look`, or with none of its looks for "none".

    "region" and shares of looks leave the looks as they are: an item holds no box that another region could come of.
    `free_choice` strips the sentences that ask for a look.
    """
    if free_choice or look == DIRECT:
        item = without_triggers(item)
    if look == DIRECT:
        return without_looks(item)
    return with_encoder(item, look) if look in LOOKS and LOOKS[look].reencodes else item


def without_triggers(item: Item) -> Item:
    """The item without the sentences that ask for a look, so that a model learns to decide."""
    return replace(item, messages=tuple(_stripped(turn) if turn.role == "user" else turn for turn in item.messages))


def _stripped(turn: Message) -> Message:
    return Message(turn.role, strip_triggers(turn.content))


def with_encoder(item: Item, look: str) -> Item:
    """The item with every re-encoding call, placeholder and image list of another look renamed to `look`."""
    images = dict(item.images)
    turns = list(item.messages)
    for name, spec in LOOKS.items():
        if not spec.reencodes or name == look or not images.get(spec.item_key):
            continue
        own = LOOKS[look]
        for old, new in ((write_call(name), write_call(look)), (spec.placeholder, own.placeholder)):
            turns = [Message(turn.role, turn.content.replace(old, new)) for turn in turns]
        images[own.item_key] = (*images.get(own.item_key, ()), *images[spec.item_key])
        images[spec.item_key] = ()
    return replace(item, messages=tuple(turns), images=images)


def without_looks(item: Item) -> Item:
    """The item with its calls and the turns that show what was looked at taken out: question and answer remain."""
    turns: list[Message] = []
    waiting = False  # the turn before was a call: this one shows what it asked for
    dropped: dict[str, int] = {}
    for turn in item.messages:
        calls = parse_calls(turn.content) if turn.role == "assistant" else []
        if calls:
            for call in calls:
                key = LOOKS[call.look].item_key
                dropped[key] = dropped.get(key, 0) + 1
            waiting = True
        elif waiting and turn.role == "user":
            waiting = False
        else:
            turns.append(Message(turn.role, turn.content.removeprefix(ANSWER_PREFIX)))
    images = {key: _first(refs, len(refs) - dropped.get(key, 0)) for key, refs in item.images.items()}
    return replace(item, messages=tuple(turns), images=images)


def _first(refs: tuple[ImageRef, ...], count: int) -> tuple[ImageRef, ...]:
    return refs[: max(count, 0)]
