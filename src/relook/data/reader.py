"""JSON and Parquet records, read from front to back one at a time, with the file and line they come from.

JSON is scanned as latin-1, where one byte is one character (JSON's punctuation is ASCII in UTF-8), and only then
decoded as UTF-8: so a record has a byte span, by which it is read again, and a broken byte has a line. Memory is that
of one chunk of the file, whatever its length. Random access is in `relook.data.records`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from relook.data.cells import cell
from relook.errors import UserError
from relook.io import replacing

CHUNK = 1 << 20  # bytes read at a time from an array
LARGEST_RECORD = 64 << 20  # bytes; a longer one means a missing brace, and is reported instead of read to the end
NO_PYARROW = "Parquet needs pyarrow, which is not installed; pip install 'relook[train]'"
TABLES = (".csv", ".tsv")
EXTRA = "extra"  # the Parquet column of the keys of a record that have no column, as JSON
_TAIL = 16  # characters: an error this near the end of what was read may only mean that more must be read
_SPACE = " \t\r\n"
_BLANK = re.compile(f"[{_SPACE}]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object (or row) of a file.

    Attributes:
        value: the object.
        file, line: where it starts; lines count from 1 (of Parquet and datasets: the number of the row).
        entry: its number in the array (from 1) where the line does not tell it from others, else 0.
        start, end: its bytes [start, end) in a JSON file.
        place: where it is, if that is no line.
    """

    value: dict[str, Any]
    file: str
    line: int
    entry: int = 0
    start: int = 0
    end: int = 0
    place: str = ""

    @property
    def where(self) -> str:
        """The place that opens every message about this record: "file:line"."""
        return self.place or place_of_record(self.file, self.line, self.entry)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that cannot be read: where ("file:line"), and why."""

    where: str
    why: str


def place_of_record(path: str | Path, line: int, entry: int = 0) -> str:
    """A place in a file, such as "a.json:7"; of an array on one line "a.json:1, entry 512"."""
    return f"{path}:{line}" + (f", entry {entry}" if entry else "")


# -- reading from front to back


def scan(path: str | Path) -> Iterator[Record | Unreadable]:
    """The records of a JSON array, JSON lines, a Parquet file or a folder of them; unreadable ones in their place.

    A record is `Unreadable` where the next one can still be found: any line of JSON lines, an entry of an array that is
    not UTF-8. What cannot be passed over is an error.
    """
    path = Path(path)
    shards = parquet_files(path)
    for shard in shards:
        yield from _scan_parquet(shard)
    if shards:
        return
    with open_input(path) as file:
        first = _first_character(file)
        if path.suffix in TABLES:
            yield from _scan_csv(path, file)
        elif first == "[":
            yield from JsonScanner(path, file).array()
        elif first == "{":
            yield from _scan_lines(path, file)
        elif first:
            raise UserError(
                f"{path}: starts with {first!r}; expected a JSON array of objects or one JSON object a line"
            )


def readable(record: Record | Unreadable) -> Record:
    """The record, or a UserError that says where and why there is none."""
    if isinstance(record, Unreadable):
        raise UserError(f"{record.where}: {record.why}")
    return record


def read_records(path: str | Path) -> Iterator[Record]:
    """As `scan`, but an unreadable record is an error too, with file and line."""
    return map(readable, scan(path))


def read_members(path: str | Path, key: str) -> Iterator[Record]:
    """The objects of the array `key` of the one JSON object in a file, in order: "annotations" of COCO."""
    with open_input(Path(path)) as file:
        yield from map(readable, JsonScanner(Path(path), file).member(key))


def open_input(path: Path) -> IO[bytes]:
    """Open for reading, or say in one line why not. Records are read twice, so a pipe is refused (before it blocks)."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(
                f"{path}: is a pipe or a device, which cannot be read twice; save it as a file and give that"
            )
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a JSON or JSON-lines file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the path of a JSON or JSON-lines file in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files that a path stands for, in order: itself, or those in a folder; none for anything else."""
    if path.suffix == ".parquet" and path.is_file():
        return [path]
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def folder_of(path: str | Path) -> Path:
    """The folder from which a set's relative image paths hold: the file's own, or the folder of Parquet files."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _first_character(file: IO[bytes]) -> str:
    """The first character that is not white space, "" for an empty file; the file is left after its byte-order mark."""
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(start)
    text = ""
    while not text and (chunk := file.read(4096)):
        text = chunk.decode("latin-1").lstrip(_SPACE)
    file.seek(start)
    return text[:1]


def _scan_lines(path: Path, file: IO[bytes]) -> Iterator[Record | Unreadable]:
    start, line = file.tell(), 0
    while data := file.readline(LARGEST_RECORD + 1):
        end, line = start + len(data), line + 1
        if len(data) > LARGEST_RECORD:
            raise UserError(f"{path}:{line}: a line of over {LARGEST_RECORD >> 20} MB; expected one JSON object a line")
        if data.strip():
            yield parse_record(path, data, line, start, end)
        start = end


def _scan_csv(path: Path, file: IO[bytes]) -> Iterator[Record | Unreadable]:
    """Rows as records of text, None for an empty cell; they are separated by what the line of names has most of."""
    lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
    at = 0
    try:
        for at, names in enumerate(lines, start=1):  # noqa: B007
            if names.strip():
                break
        else:
            return
        head = at
        csv.field_size_limit(LARGEST_RECORD)
        mark = max(",\t;", key=names.count)
        rows = csv.DictReader(itertools.chain([names], lines), delimiter=mark, skipinitialspace=True, strict=True)
        columns = [name.strip() for name in rows.fieldnames or ()]
        if twice := [name for name in columns if name and columns.count(name) > 1]:
            raise UserError(f"{path}:{head}: has two columns called {twice[0]!r}; rename one of them")
        rows.fieldnames = columns
        for row in rows:
            at = head - 1 + rows.line_num
            if None in row:
                why = f"{len(row[None])} values more than the {len(row) - 1} columns; put texts with a comma in quotes"
                yield Unreadable(place_of_record(path, at), why)
            else:
                try:
                    yield Record({key: cell(text) if text else None for key, text in row.items() if key}, str(path), at)
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    why = "a cell looks like a list or a struct, but is no JSON; write it as JSON"
                    yield Unreadable(place_of_record(path, at), why)
    except csv.Error as error:
        why = f"a quote that does not close, or that opens in front of only a part of a value ({error})"
        raise UserError(f"{path}:{at + 1}: {why}; put the whole value in quotes, and double those in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not CSV that can be read ({error}); save it as UTF-8 with a line of names") from None


def parse_record(path: Path, data: bytes, line: int, start: int, end: int, entry: int = 0) -> Record | Unreadable:
    """The record in these bytes, which start on this line."""
    at = line
    try:
        value = json.loads(data.decode("utf-8"))
        if isinstance(value, dict):
            return Record(value, str(path), line, entry, start, end)
        why = f"a {type(value).__name__} where an object {{...}} was expected"
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        why = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        at = line + min(error.lineno - 1, data.rstrip().count(b"\n"))  # not the line after its last
        why = f"broken JSON ({error.msg}); mend or remove the record"
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        why = f"not a record ({error}); mend or remove it"
    return Unreadable(place_of_record(path, at, entry), why)


class JsonScanner:
    """Finds the JSON values of a file chunk by chunk. `line` is that of the next character, `text[at]`."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        _first_character(file)
        self.offset = file.tell()  # of text[0], in bytes
        self.text, self.at, self.line = "", 0, 1
        self.decoder = json.JSONDecoder()

    def array(self) -> Iterator[Record | Unreadable]:
        """The objects of the file's one array."""
        yield from self.entries()
        if extra := self.peek():
            raise UserError(
                f"{self.path}:{self.line}: {extra!r} after the end of the array; expected the end of the file"
            )

    def member(self, key: str) -> Iterator[Record | Unreadable]:
        """The objects of the array `key` of the file's one object."""
        found = False
        self.take("{")
        while self.peek() == '"':
            name = self.value(0)[0]
            self.take(":")
            if self.peek() == "[":
                yield from self.entries(objects=name == key)
            else:
                self.value(0)
            found = found or name == key
            if self.peek() != ",":
                break
            self.take(",")
        self.take("}")
        if not found:
            raise UserError(f"{self.path}: has no {key!r}; expected an object with a list of that name")

    def entries(self, objects: bool = True) -> Iterator[Record | Unreadable]:
        """The objects of the array that starts here; `objects=False` passes over it, whatever it holds."""
        self.take("[")
        number, last = 0, self.line  # the line on which the entry before ended
        while self.peek() != "]" or number:
            number, first = number + 1, self.peek()
            line, entry = self.line, number if last == self.line else 0
            if objects and first != "{":
                seen = f"an entry that starts with {first!r}" if first else "the end of the file"
                where = place_of_record(self.path, line, entry)
                raise UserError(f"{where}: {seen} where an object {{...}} was expected")
            value, data = self.value(entry)
            if objects:
                end = self.offset + self.at
                plain = Record(value, str(self.path), line, entry, end - len(data), end) if data.isascii() else None
                yield plain or parse_record(self.path, data, line, end - len(data), end, entry)
            last = self.line
            if self.peek() == "]":
                break
            self.take(",", f" after entry {number}" if last == self.line else "")
        self.take("]")

    def value(self, entry: int) -> tuple[Any, bytes]:
        """The value here (text as latin-1) and its bytes; passes over it, and reads on while the text ends in it."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.text[end - 1] in '}]"' or not self.more():  # a number may go on
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _TAIL
                if cut and len(self.text) - self.at <= LARGEST_RECORD and self.more():
                    continue
                at = self.line + self.text.count("\n", self.at, error.pos)
                why = f"broken JSON ({error.msg}); mend or remove the record that starts on line {self.line}"
                raise UserError(f"{place_of_record(self.path, at, entry)}: {why}") from None
            except (RecursionError, ValueError) as error:
                where = place_of_record(self.path, self.line, entry)
                raise UserError(f"{where}: not a record ({error}); mend or remove it") from None
        data = self.text[self.at : end].encode("latin-1")
        self.line += data.count(b"\n")
        self.at = end
        return value, data

    def more(self) -> bool:
        """Drop what was scanned and read on; doubling what is held keeps a long record linear in its length."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        if chunk:
            self.offset += self.at
            self.text, self.at = self.text[self.at :] + chunk.decode("latin-1"), 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space, not taken; "" at the end of the file."""
        while True:
            start, self.at = self.at, _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.line += self.text.count("\n", start, self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, character: str, after: str = "") -> None:
        """Pass over the next character, which must be this one."""
        if (found := self.peek()) != character:
            seen = repr(found) if found else "the end of the file"
            raise UserError(
                f"{self.path}:{self.line}: {seen}{after} where {character!r} was expected; "
                "the array is broken or cut off"
            )
        self.at += 1


def _scan_parquet(path: Path) -> Iterator[Record]:
    for number, value in enumerate(parquet_rows(path), start=1):
        yield Record(with_extra(value), str(path), number)


def parquet_rows(path: Path, at_once: int = 1000) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, `at_once` of them in memory."""
    arrow, parquet = import_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=at_once):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not a Parquet file that can be read ({said}); get it or convert the set again"
        ) from None


def with_extra(value: dict[str, Any]) -> dict[str, Any]:
    """A row with the keys that `relook data convert` kept as JSON."""
    return value | json.loads(value.pop(EXTRA, None) or "{}")


def import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(NO_PYARROW) from None
    return pyarrow, parquet


# -- writing


def write_records(path: str | Path, values: Iterable[dict[str, Any]]) -> int:
    """Write records (`.json`: an array, any other name: JSON lines); returns how many. Nothing is left half-written."""
    count = 0
    with writing_records(path) as put:
        for value in values:
            put(value)
            count += 1
    return count


@contextmanager
def writing_records(path: str | Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one record more, to a file in the form of `write_records`."""
    is_array, before = Path(path).suffix == ".json", ""
    with replacing(path) as file:

        def put(value: dict[str, Any]) -> None:
            nonlocal before
            text = json.dumps(value, ensure_ascii=False)
            file.write(f"{before}{text}" if is_array else f"{text}\n")
            before = ",\n"

        file.write("[\n" if is_array else "")
        yield put
        file.write("\n]\n" if is_array else "")
