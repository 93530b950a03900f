"""JSON records on disk: read one at a time with their place, written aside and then renamed.

A file is either a JSON array of objects (the published form) or JSON lines; which of the two is seen from its
first character. This module knows bytes, lines and JSON; it refuses to know what a record means.

Places are exact because records are found in the *bytes*: the text is scanned as latin-1, where one byte is one
character (JSON's own punctuation is ASCII in UTF-8), and only then is a record decoded as UTF-8. So a record has a
byte span, which `ItemsDataset` keeps to read it again, and a broken byte has a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from relook.errors import UserError
from relook.io import replacing

CHUNK = 1 << 20  # bytes read at a time from an array
LARGEST_RECORD = 64 << 20  # bytes; a longer one means a missing brace, and is reported instead of read to the end
_TAIL = 16  # characters: an error this near the end of what was read may only mean that more must be read
_SPACE = " \t\r\n"

Broken = Callable[[int, str], None]  # told the line and what is wrong with the record there


@dataclass(frozen=True)
class Record:
    """One JSON object of a file: its value, the line it starts on (from 1) and its bytes [start, end).

    `entry` is its number in the array (from 1) where the line does not tell it from others, else 0.
    """

    value: dict[str, Any]
    line: int
    start: int
    end: int
    entry: int = 0

    def where(self, path: str | Path) -> str:
        """What opens every error about this record: "file:line"."""
        return place_of_record(path, self.line, self.entry)


def place_of_record(path: str | Path, line: int, entry: int = 0) -> str:
    """A place in a file; sets of others may be an array on one line, of which only the entry's number says where.

    >>> place_of_record("a.json", 7), place_of_record("a.json", 1, 512)
    ('a.json:7', 'a.json:1, entry 512')
    """
    return f"{path}:{line}" + (f", entry {entry}" if entry else "")


def read_records(path: str | Path, broken: Broken | None = None) -> Iterator[Record]:
    """The records of a JSON array or JSON-lines file, one at a time; memory stays that of one chunk.

    Args:
        broken: told of a record that is broken and passed over, where the next one can still be found: any line of
            JSON lines, and an entry of an array that is not UTF-8. Without it such a record is an error too.

    Raises:
        UserError: no such file, not JSON, not UTF-8, or an entry that is not an object; with file and line.
    """
    path = Path(path)
    with open_input(path) as file:
        first = _first_character(file)
        file.seek(0)
        if first == "[":
            yield from _read_array(path, file, broken)
        elif first == "{":
            yield from _read_lines(path, file, broken)
        elif first:
            raise UserError(
                f"{path}: starts with {first!r}; expected a JSON array of objects or one JSON object a line"
            )


def read_span(path: str | Path, start: int, end: int, line: int, entry: int = 0) -> dict[str, Any]:
    """One record again from its bytes [start, end), as `read_records` reported them."""
    path = Path(path)
    with open_input(path) as file:
        file.seek(start)
        return _decode(path, file.read(end - start), line, entry)


def open_input(path: Path) -> IO[bytes]:
    """Open for reading, or say in one line why not.

    Records are found by their place in the file, so it must be one that can be read twice. A pipe is refused before it
    is opened: one that nobody writes into would never open.
    """
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


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records (`.json`: an array, any other name: JSON lines); returns how many. Nothing is left half-written."""
    count = 0
    with writing_records(path) as put:
        for record in records:
            put(record)
            count += 1
    return count


@contextmanager
def writing_records(path: str | Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one record more, for those that do not come in one row; the form as `write_records`."""
    array, before = Path(path).suffix == ".json", ""
    with replacing(path) as file:

        def put(record: dict[str, Any]) -> None:
            nonlocal before
            file.write(f"{before}{as_json(record)}" if array else f"{as_json(record)}\n")
            before = ",\n"

        file.write("[\n" if array else "")
        yield put
        file.write("\n]\n" if array else "")


def as_json(record: dict[str, Any]) -> str:
    """One line of JSON, readable; escaped where it holds half a surrogate pair, which UTF-8 cannot write."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def _first_character(file: IO[bytes]) -> str:
    """The first character that is not white space or a byte-order mark; "" for an empty file."""
    file.seek(_bom(file))
    while chunk := file.read(4096):
        if text := chunk.decode("latin-1").lstrip(_SPACE):
            return text[0]
    return ""


def _bom(file: IO[bytes]) -> int:
    """Length of a UTF-8 byte-order mark at the start of the file: 3 or 0."""
    file.seek(0)
    return 3 if file.read(3) == b"\xef\xbb\xbf" else 0


def _decode(path: Path, data: bytes, line: int, entry: int = 0) -> dict[str, Any]:
    """The object in these bytes, which start on this line."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        where = place_of_record(path, at, entry)
        raise UserError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        at = line + min(error.lineno - 1, data.rstrip().count(b"\n"))  # not the line after its last
        where = place_of_record(path, at, entry)
        raise UserError(f"{where}: broken JSON ({error.msg}); mend or remove the record") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        raise UserError(f"{place_of_record(path, line, entry)}: not a record ({error}); mend or remove it") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{place_of_record(path, line, entry)}: a {type(value).__name__} where an object {{...}} was expected"
        )
    return value


def _read_lines(path: Path, file: IO[bytes], broken: Broken | None) -> Iterator[Record]:
    start, line = _bom(file), 0
    file.seek(start)
    while data := file.readline(LARGEST_RECORD + 1):
        end, line = start + len(data), line + 1
        if len(data) > LARGEST_RECORD:
            raise UserError(f"{path}:{line}: a line of over {LARGEST_RECORD >> 20} MB; expected one JSON object a line")
        if data.strip():
            try:
                yield Record(_decode(path, data, line), line, start, end)
            except UserError as error:
                _pass_over(broken, path, line, error)
        start = end


def _pass_over(broken: Broken | None, path: Path, line: int, error: UserError) -> None:
    """Tell of a broken record, or raise where nobody wants to be told."""
    if broken is None:
        raise error from None
    at, text = line, str(error).removeprefix(f"{path}:")
    place, colon, rest = text.partition(": ")
    number = place.partition(", entry ")[0]
    if colon and number.isdigit():
        at, text = int(number), rest
    broken(at, text)


def _read_array(path: Path, file: IO[bytes], broken: Broken | None) -> Iterator[Record]:
    """Objects of a JSON array, scanned chunk by chunk (see the module's text for why as latin-1)."""
    window = Window(path, file)
    window.skip_spaces()
    window.begin_array()
    if window.skip_spaces() == "]":
        return
    while True:
        record = window.record(broken)
        if record is not None:
            yield record
        if window.skip_spaces() == "]":
            break
        window.expect(",")
        window.skip_spaces()
    window.expect("]")
    if extra := window.skip_spaces():
        raise UserError(f"{path}:{window.line}: {extra!r} after the end of the array; expected the end of the file")


class Window:
    """The part of an array file that is in memory, and where in it the scan stands.

    `line` is the line of the next character, `entries` how many entries of the array were begun (`entry`), and `text`
    what is held, as latin-1, of which `at` is the next character.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.offset = _bom(file)  # of text[0] in the file, bytes
        file.seek(self.offset)
        self.text, self.at, self.line = "", 0, 1
        self.entries, self._last = 0, 0  # the line on which the entry before ended
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Drop what was scanned and read on; doubling what is held keeps a long record linear in its length."""
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.offset += self.at
        self.text, self.at = self.text[self.at :] + chunk.decode("latin-1"), 0
        return bool(chunk)

    def skip_spaces(self) -> str:
        """The next character that is not white space, not taken; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                character = self.text[self.at]
                if character not in _SPACE:
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self.more():
                return ""

    def expect(self, character: str) -> None:
        found = self.text[self.at : self.at + 1]
        if found != character:
            seen = repr(found) if found else "the end of the file"
            after = f" after entry {self.entries}" if self._last == self.line else ""
            raise UserError(
                f"{self.path}:{self.line}: {seen}{after} where {character!r} was expected; "
                "the array is broken or cut off"
            )
        self.at += 1

    def begin_array(self) -> None:
        self.expect("[")
        self.entries, self._last = 0, 0

    def entry(self) -> int:
        """Begin the next entry of the array: its number where it shares its line with the one before, else 0."""
        self.entries += 1
        return self.entries if self._last == self.line else 0

    def end_entry(self, end: int) -> None:
        """Take the entry's text up to `end`."""
        self.line += self.text.count("\n", self.at, end)
        self.at, self._last = end, self.line

    def record(self, broken: Broken | None) -> Record | None:
        """The object that starts here, None where it is broken and told of; reads on while the text ends inside it."""
        entry = self.entry()
        where = place_of_record(self.path, self.line, entry)
        if self.text[self.at : self.at + 1] != "{":
            found = self.text[self.at : self.at + 1]
            seen = f"an entry that starts with {found!r}" if found else "the end of the file"
            raise UserError(f"{where}: {seen} where an object {{...}} was expected")
        value: dict[str, Any] | None
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _TAIL
                if cut and len(self.text) - self.at <= LARGEST_RECORD and self.more():
                    continue
                at = self.line + self.text.count("\n", self.at, error.pos)
                why = f"broken JSON ({error.msg}); mend or remove the record that starts on line {self.line}"
                raise UserError(f"{place_of_record(self.path, at, entry)}: {why}") from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{where}: not a record ({error}); mend or remove it") from None
        text = self.text[self.at : end]
        if not text.isascii():
            value = self._utf8(text, broken, entry)
        record = None if value is None else Record(value, self.line, self.offset + self.at, self.offset + end, entry)
        self.end_entry(end)
        return record

    def _utf8(self, text: str, broken: Broken | None, entry: int) -> dict[str, Any] | None:
        """The object of bytes that were scanned as latin-1; None where they are not UTF-8 and that is told."""
        try:
            return _decode(self.path, text.encode("latin-1"), self.line, entry)
        except UserError as error:
            _pass_over(broken, self.path, self.line, error)
            return None
