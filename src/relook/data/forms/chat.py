"""Chat and yes/no forms of published sets, a record each: LLaVA and ShareGPT conversations, POPE.

    llava       {"image" or "images", "conversations": [{"from", "value"}]}
    pope        {"image", "text", "label"}

A conversation of one exchange about one image is a `Question`, from which any look can be built; a longer one stays the
`Item` it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relook.data.items import IMAGE_KEYS, Item, Message, Question
from relook.errors import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"


def llava_conversation(data: Mapping[str, Any], where: str) -> Question | Item:
    """A LLaVA or ShareGPT conversation. A missing placeholder of a single image is put in front of the first turn."""
    turns = data.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: 'conversations' is {turns!r}; expected a list of {{'from', 'value'}} turns")
    messages = [_turn(turn, i, where) for i, turn in enumerate(turns)]
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
            return Question(images[0], text, (messages[1].content,), where=where)
    keys = ("id", "conversations", "image", "images")
    extra = {key: value for key, value in data.items() if key not in keys and key not in IMAGE_KEYS}
    lists = {key: tuple(images) if key == "images" else () for key in IMAGE_KEYS}
    return Item(tuple(messages), lists, extra, where)


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
    return Message(ROLES[speaker], content)
