"""What was seen before: the number of every distinct item, in 24 to 48 bytes an item.

A Python dictionary would take three times that. Keys are 64-bit hashes; among a million items the chance that any two
different ones share a key is 3 in 100 million.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping

from relook.data.items import IMAGE_KEYS, Item, split_ref


class Seen:
    """A hash table of open addresses: `first(key, number)` is the number with which the key came first."""

    def __init__(self) -> None:
        self._keys, self._numbers, self._count = array("Q", bytes(8 << 10)), array("Q", bytes(8 << 10)), 0

    def first(self, key: int, number: int) -> int:
        """The number given with `key` the first time; numbers count from 1."""
        if self._count * 3 > len(self._keys) * 2:
            self._grow()
        at = self._place(self._keys, self._numbers, key)
        if not self._numbers[at]:
            self._keys[at], self._numbers[at], self._count = key, number, self._count + 1
        return self._numbers[at]

    def _grow(self) -> None:
        size = len(self._keys) * 2
        keys, numbers = array("Q", bytes(8 * size)), array("Q", bytes(8 * size))
        for key, number in zip(self._keys, self._numbers, strict=True):
            if number:
                at = self._place(keys, numbers, key)
                keys[at], numbers[at] = key, number
        self._keys, self._numbers = keys, numbers

    @staticmethod
    def _place(keys: array[int], numbers: array[int], key: int) -> int:
        """Where the key stands, or the free place where it belongs."""
        mask = len(keys) - 1
        at = key & mask
        while numbers[at] and keys[at] != key:
            at = (at + 1) & mask
        return at


def item_key(item: Item, digests: Mapping[str, bytes]) -> int:
    """64 bits of what an item teaches: its turns, and its images by content where that is known, else by name."""
    parts: list[object] = [(turn.role, turn.content) for turn in item.messages]
    for key in IMAGE_KEYS:
        for ref in item.images[key]:
            file, box = split_ref(ref) if isinstance(ref, str) else (str(ref), None)
            parts.append((key, digests.get(file, file), box))
    return int.from_bytes(hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest(), "little")
