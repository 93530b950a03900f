"""Training items in the published JSON format, typed.

An item is a conversation and the images its placeholders stand for:

    {"messages": [{"role": "user", "content": "<image>\\nWhat is the total? Identify the region ..."},
                  {"role": "assistant", "content": "<|region_token_start|>...<|region_token_end|>"},
                  {"role": "user", "content": "<image>"},
                  {"role": "assistant", "content": "9.30"}],
     "images": ["a.jpg", "a.jpg_80,100,320,250"],
     "clip_images": [], "detection_images": [], "seg_images": []}

Each list holds the images of one placeholder in the order of its occurrences; `a.jpg_80,100,320,250` is the crop
(x1, y1, x2, y2 in pixels of the upright original, x2 and y2 exclusive) of `a.jpg`. Which lists there are is the look
table's to say.
This module knows the format. It refuses to know pixels and token ids; it never opens an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook.data.records import read_records, write_records
from relook.errors import UserError
from relook.looks import LOOKS
from relook.regions import split_crop_suffix

IMAGE_KEYS: tuple[str, ...] = tuple(LOOKS[name].item_key for name in LOOKS)  # "images", "clip_images", ...
PLACEHOLDERS: dict[str, str] = {LOOKS[name].item_key: LOOKS[name].placeholder for name in LOOKS}
ROLES = ("system", "user", "assistant")

ImageRef = Any  # a path (str, maybe with a crop suffix) in files; a PIL image or (image, box) in items made in memory


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and the text with placeholders and control tokens."""

    role: str
    content: str


@dataclass(frozen=True)
class Item:
    """One conversation with its images, by the key of their list. `extra` keeps what else the file said.

    `where` ("file:line") is for messages, and no part of what the item is.
    """

    messages: tuple[Message, ...]
    images: dict[str, tuple[ImageRef, ...]]
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "item") -> Item:
        """The typed item of one JSON object; `where` ("file:line") opens every error.

        Checks types only. Whether placeholders, crops and turns agree is `relook.data.check`'s matter: a set with
        faults must still be readable, or nobody could mend it.
        """
        messages = data.get("messages")
        if not isinstance(messages, list) or not messages:
            seen = "no 'messages'" if messages is None else f"'messages' is {_name(messages)}"
            raise UserError(f"{where}: {seen}; expected a list of {{'role', 'content'}} turns")
        images = {key: _images(data.get(key), key, where) for key in IMAGE_KEYS}
        extra = {key: value for key, value in data.items() if key != "messages" and key not in images}
        return cls(tuple(_message(turn, i, where) for i, turn in enumerate(messages)), images, extra, where)

    def to_dict(self) -> dict[str, Any]:
        """The published JSON object, every image list present."""
        messages = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return {"messages": messages} | {key: list(self.images.get(key, ())) for key in IMAGE_KEYS} | self.extra

    def placeholder_counts(self) -> dict[str, int]:
        """How often each list's placeholder occurs in the turns: {"images": 2, "clip_images": 0, ...}."""
        return {key: sum(turn.content.count(mark) for turn in self.messages) for key, mark in PLACEHOLDERS.items()}

    def under(self, root: str | Path, *, strict: bool = False) -> Item:
        """The same item with its relative image paths below `root` (see `place_image`)."""
        placed = {
            key: tuple(place_image(ref, root, strict=strict) for ref in refs) for key, refs in self.images.items()
        }
        return replace(self, images=placed)


def read_items(path: str | Path) -> Iterator[Item]:
    """The items of a JSON array or JSON-lines file, lazily. Errors name file and line."""
    for record in read_records(path):
        yield Item.from_dict(record.value, record.where(path))


def write_items(path: str | Path, items: Iterable[Item]) -> int:
    """Write items (`.json`: an array, else JSON lines), aside first and then renamed; returns how many."""
    return write_records(path, (item.to_dict() for item in items))


def place_image(ref: ImageRef, root: str | Path, *, strict: bool = False) -> ImageRef:
    """A path of an item as a path from here: relative ones are below `root`; images in memory stay as they are.

    `strict` (for a root that the user gave) refuses every path that leaves the root, absolute ones included.
    The check is on the written path, so that a folder linked into the root counts as inside.

    >>> place_image("img/a.jpg_0,0,8,8", "/data")
    '/data/img/a.jpg_0,0,8,8'

    Raises:
        UserError: the path leaves a strict root.
    """
    if not isinstance(ref, str | os.PathLike):
        return ref
    placed = os.path.normpath(os.path.join(root, os.fspath(ref)))
    inside = os.path.abspath(root)
    if strict and os.path.commonpath([inside, os.path.abspath(placed)]) != inside:
        raise UserError(
            f"image path {os.fspath(ref)!r} leaves the image root {root}; give the root that holds it, or mend the path"
        )
    return placed


def split_ref(ref: str) -> tuple[str, tuple[int, int, int, int] | None]:
    """File and crop of an image entry: `"a.jpg_0,0,8,8"` is `("a.jpg", (0, 0, 8, 8))`."""
    file, box = split_crop_suffix(ref)
    return str(file), box


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
