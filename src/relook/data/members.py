"""The arrays inside one large JSON object, read element by element: {"images": [...], "annotations": [...]}.

COCO's files are one object of several hundred megabytes; memory stays that of one chunk here too. This module knows
JSON and places, as `records` does, whose window it reads through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relook.data.records import LARGEST_RECORD, Record, _Window, open_input
from relook.errors import UserError


def read_members(path: str | Path, key: str) -> Iterator[Record]:
    """The objects of the array `key` of the object in this file, in order; other members are passed over.

    Raises:
        UserError: not one JSON object, broken, no such member, or an entry that is not an object; with file and line.
    """
    path = Path(path)
    with open_input(path) as file:
        window = _Window(path, file)
        window.skip_spaces()
        window.expect("{")
        found = False
        while window.skip_spaces() == '"':
            name = _value(window)
            window.skip_spaces()
            window.expect(":")
            if window.skip_spaces() == "[":
                for record in _elements(window, objects=name == key):
                    if record is not None:
                        yield record
            else:
                _value(window)
            found = found or name == key
            if window.skip_spaces() != ",":
                break
            window.expect(",")
        window.expect("}")
        if not found:
            raise UserError(f"{path}: has no {key!r}; expected an object with a list of that name")


def _elements(window: _Window, objects: bool) -> Iterator[Record | None]:
    """The entries of the array that starts here: records where they are wanted, None for those passed over."""
    window.expect("[")
    while window.skip_spaces() != "]":
        if objects:
            yield window.record()
        else:
            _value(window)
        if window.skip_spaces() == "]":
            break
        window.expect(",")
    window.expect("]")


def _value(window: _Window) -> Any:
    """Any JSON value from here; reads on while the text may end inside it (a number may go on in the next chunk)."""
    while True:
        try:
            value, end = window.decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            if len(window.text) - window.at <= LARGEST_RECORD and window.more():
                continue
            raise UserError(f"{window.path}:{window.line}: broken JSON ({error.msg}); mend the file") from None
        if end == len(window.text) and window.more():
            continue
        window.line += window.text.count("\n", window.at, end)
        window.at = end
        return value
