"""Published items in another form: with another look, with none, or without the sentences that ask for one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from relook.data.items import Item, Message
from relook.data.settings import BUILT, built_settings
from relook.looks import ANSWER_PREFIX, LOOKS, parse_calls, without_triggers, write_call


def variant(item: Item, look: str = "region", *, free_choice: bool = False) -> Item:
    """The item with its re-encoding looks made by `look`, or with none of its looks for "none".

    "region" and shares of looks leave the looks as they are: an item holds no box that another region could come of.
    `free_choice` strips the sentences that ask for a look.
    """
    if free_choice or look == "none":
        asked = (replace(t, content=without_triggers(t.content)) if t.role == "user" else t for t in item.messages)
        item = replace(item, messages=tuple(asked))
        if free_choice and built_settings(item.extra):
            item = replace(item, extra=item.extra | {BUILT: {**item.extra[BUILT], "free_choice": True}})
    if look == "none":
        return _without_looks(item)
    return _with_encoder(item, look) if look in LOOKS and LOOKS[look].reencodes else item


def _with_encoder(item: Item, look: str) -> Item:
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


def _without_looks(item: Item) -> Item:
    """The item with its calls and the turns that show what was looked at taken out: question and answer remain."""
    turns: list[Message] = []
    waiting = False  # the turn before was a call: this one shows what it asked for
    dropped: Counter[str] = Counter()
    for turn in item.messages:
        calls = parse_calls(turn.content) if turn.role == "assistant" else []
        if calls:
            dropped.update(LOOKS[call.look].item_key for call in calls)
            waiting = True
        elif waiting and turn.role == "user":
            waiting = False
        else:
            turns.append(Message(turn.role, turn.content.removeprefix(ANSWER_PREFIX)))
    images = {key: refs[: max(len(refs) - dropped[key], 0)] for key, refs in item.images.items()}
    return replace(item, messages=tuple(turns), images=images)
