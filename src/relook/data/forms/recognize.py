"""By what a form is recognized: the first record of a file, the keys of its one object, or what else it looks like."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from relook.data.forms.detections import root_tag
from relook.data.reader import TABLES, JsonScanner, Record, Unreadable, open_input, scan
from relook.errors import UserError
from relook.io import read_yaml

PEEK = 1 << 20  # bytes read to recognize a file
LIST = object()  # stands for a list in a file's one object, which is not read
SAMPLES = (
    "*.yaml",
    "*.yml",
    "classes.txt",
    "Annotations/*.xml",
    "*.xml",
    "*.json",
    "annotations/*.json",
    "json/*.json",
)
_SEEN = (  # how a file begins, what that is, and what to do
    (b"%PDF", "a PDF", "give a file of questions about its pages"),
    (b"\x89PNG", "an image", "give a file of questions about it"),
    (b"\xff\xd8\xff", "an image", "give a file of questions about it"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save the sheet as CSV"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    (b"PAR1", "Parquet", "let its name end in .parquet"),
    (b"SQLite format 3", "a SQLite database", "export the table as CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS", "get the file itself (git lfs pull)"),
    (b"<!doctype html", "a web page", "get the file itself"),
    (b"<html", "a web page", "get the file itself"),
)


class Keys(dict[str, Any]):
    """The keys of a file's one object, with their values, or `LIST`."""


def folder_samples(folder: Path) -> Iterator[Path]:
    """Files by which a folder of annotations may be recognized, some of each kind."""
    for pattern in SAMPLES:
        yield from sorted(folder.glob(pattern))[:3]


def first_record(path: Path, enough: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """The first record of a file; of one object, its keys up to those that are enough; {"<tag>": ...} of XML.

    Raises:
        UserError: it is something else, and the message says what it looks like.
    """
    if path.name == "classes.txt":
        return {path.name: LIST}
    with open_input(path) as file:
        head = file.read(PEEK)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, seen, cure in _SEEN:
        if text[:40].lower().startswith(start.lower()):
            raise UserError(f"{path}: looks like {seen}, which holds no questions as it is; {cure}")
    if path.suffix in (".yaml", ".yml"):
        raw = read_yaml(path)
        return raw if isinstance(raw, dict) else {}
    if path.suffix in TABLES or text.startswith(b"["):
        return _first(path)
    if text.startswith(b"<"):
        return {f"<{root_tag(path)}>": LIST}
    if not text:
        return {}
    if not text.startswith(b"{"):
        line = text.partition(b"\n")[0].decode("utf-8", "replace").strip()[:60]
        looks = "a table; let its name end in .csv" if any(mark in line for mark in ",\t;") else "plain text"
        raise UserError(
            f"{path}: starts with {line[:1]!r} and looks like {looks} ({line!r}); expected JSON, CSV or XML"
        )
    first, newline, _ = text.partition(b"\n")
    if newline or len(head) < PEEK:
        try:
            return dict(json.loads(first))
        except ValueError:
            pass
    try:
        return _keys(path, enough)
    except UserError:
        if found := some_record(path):
            return found
        raise


def some_record(path: Path) -> dict[str, Any]:
    """The first record that can be read; {} where there is none."""
    return next((record.value for record in scan(path) if isinstance(record, Record)), {})


def _first(path: Path) -> dict[str, Any]:
    """The first record that can be read; {} where there is none. Raises the fault of the first where none can."""
    fault: Unreadable | None = None
    for record in scan(path):
        if isinstance(record, Record):
            return record.value
        fault = fault or record
    if fault is not None:
        raise UserError(f"{fault.where}: {fault.why}")
    return {}


def _keys(path: Path, enough: Callable[[Mapping[str, Any]], bool]) -> Keys:
    """The keys of a file's one object with their values (of lists: `LIST`), until they are enough."""
    found = Keys()
    with open_input(path) as file:
        scanner = JsonScanner(path, file)
        scanner.take("{")
        while scanner.peek() == '"':
            name = scanner.value(0)[0]
            scanner.take(":")
            if is_list := scanner.peek() == "[":
                found[name] = LIST
            else:
                found[name] = scanner.value(0)[0]
            if enough(found):
                break
            if is_list:
                for _ in scanner.entries(objects=False):
                    pass
            if scanner.peek() != ",":
                break
            scanner.take(",")
    return found
