"""Groups of questions by what their records hold, so that results can be given for each: `--by "field,width<880"`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from relook.errors import UserError
from relook.evaluate.records import Record
from relook.io import nearest

_PART = re.compile(r" *(?P<key>[a-z_]+) *(?:< *(?P<bound>[0-9]+(?:\.[0-9]+)?) *)?")


def grouping(by: str) -> Callable[[Record], str | None]:
    """Names the group of a record: what it has under a key, on which side of a bound that is, or several of these.

    Keys are a record's, and the "width" and "height" of its image in pixels. None for a record that lacks one.

    >>> grouping("field,width<880")({"field": "total", "size": [600, 1280]})
    'total, width < 880'

    Raises:
        UserError: `by` is not of this form, or names a key that no record has.
    """
    parts = [_PART.fullmatch(part) for part in by.split(",")]
    keys = [(part["key"], part["bound"]) for part in parts if part is not None]
    if len(keys) < len(parts):
        raise UserError(f"by {by!r} is not understood; expected keys and bounds: field, width<880 or field,width<880")
    for key, _ in keys:
        if key not in (known := [*Record.__annotations__, "width", "height"]):
            raise UserError(f"by {by!r}: records have no {key!r}; {nearest(key, known)}")

    def group(record: Record) -> str | None:
        width, height = record.get("size") or (None, None)
        held: dict[str, Any] = {**record, "width": width, "height": height}
        names = [_side(key, held.get(key), bound) for key, bound in keys]
        return ", ".join(filter(None, names)) if all(names) else None

    return group


def _side(key: str, value: Any, bound: str | None) -> str | None:
    """The value itself, or on which side of the bound it is; None where there is none."""
    if bound is None:
        return str(value) if isinstance(value, str | int) else None
    return f"{key} {'<' if value < float(bound) else '>='} {bound}" if isinstance(value, int | float) else None
