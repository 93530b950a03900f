"""The arrays inside one large JSON object, read element by element: {"images": [...], "annotations": [...]}.

COCO's files are one object of several hundred megabytes; memory stays that of one chunk here too. This module knows
JSON and places, as `records` does, whose window it reads through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from relook.data.records import LARGEST_RECORD, Record, Window, open_input, place_of_record
from relook.errors import UserError


def read_members(path: str | Path, key: str) -> Iterator[Record]:
    """The objects of the array `key` of the object in this file, in order; other members are passed over.

    Raises:
        UserError: not one JSON object, broken, no such member, or an entry that is not an object; with file and line.
    """
    path = Path(path)
    with open_input(path) as file:
        window = Window(path, file)
        window.skip_spaces()
        window.expect("{")
        found = False
        while window.skip_spaces() == '"':
            name = json.loads(_value(window, path))
            window.skip_spaces()
            window.expect(":")
            if window.skip_spaces() == "[":
                yield from _elements(window, path, objects=name == key)
            else:
                _value(window, path)
            found = found or name == key
            if window.skip_spaces() != ",":
                break
            window.expect(",")
        window.expect("}")
        if not found:
            raise UserError(f"{path}: has no {key!r}; expected an object with a list of that name")


def _elements(window: Window, path: Path, objects: bool) -> Iterator[Record]:
    """The entries of the array that starts here, where they are wanted; passes over it either way."""
    window.begin_array()
    while (first := window.skip_spaces()) != "]":
        line, entry = window.line, window.entry()
        if objects and first != "{":
            seen = f"an entry that starts with {first!r}" if first else "the end of the file"
            raise UserError(f"{place_of_record(path, line, entry)}: {seen} where an object {{...}} was expected")
        data = _value(window, path, entry)
        if objects:
            end = window.offset + window.at
            yield Record(json.loads(data), line, end - len(data), end, entry)
        if window.skip_spaces() == "]":
            break
        window.expect(",")
    window.expect("]")


def _value(window: Window, path: Path, entry: int = 0) -> bytes:
    """The bytes of the JSON value here; reads on while the text may end inside it (a number may go on in the next)."""
    while True:
        try:
            end = window.decoder.raw_decode(window.text, window.at)[1]
        except json.JSONDecodeError as error:
            if len(window.text) - window.at <= LARGEST_RECORD and window.more():
                continue
            at = window.line + window.text.count("\n", window.at, error.pos)
            raise UserError(f"{place_of_record(path, at, entry)}: broken JSON ({error.msg}); mend the file") from None
        if end == len(window.text) and window.more():
            continue
        text = window.text[window.at : end]
        data = text.encode("latin-1")
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            at = window.line + data.count(b"\n", 0, error.start)
            where = place_of_record(path, at, entry)
            raise UserError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
        window.end_entry(end)
        return data
