"""Records of a source by number and from front to back: JSON, JSON lines, Parquet, a saved Hugging Face dataset.

`FORMS` says which of them a path is. By number, only places are held (or a few groups of rows); from front to back,
nothing but what is being read. Knows files and rows; it refuses to know what a record means and opens no image.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from relook.data.records import read_records, read_span
from relook.data.stream import EXTRA, NO_PYARROW, Row, parquet_files, read_rows
from relook.errors import UserError

GROUPS = 8  # row groups of Parquet that are held at a time


@dataclass(frozen=True, slots=True)
class Unread:
    """A record that cannot be read: where ("file:line"), and why."""

    where: str
    why: str


class Records(Protocol):
    """What a source can do. `unread` names the records that have no number because they cannot be read."""

    unread: list[Unread]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Row: ...

    def __iter__(self) -> Iterator[Row | Unread]: ...


class JsonRecords:
    """A JSON array or JSON lines. The file is gone through once, when a record is first asked for by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unread: list[Unread] = []
        self._places: tuple[array[int], array[int], array[int]] | None = None  # starts, ends (bytes), lines

    def _index(self) -> tuple[array[int], array[int], array[int]]:
        if self._places is None:
            places = array("Q"), array("Q"), array("L")
            for record in read_records(self.path, self._pass_over):
                for column, value in zip(places, (record.start, record.end, record.line), strict=True):
                    column.append(value)
            self._places = places
        return self._places

    def _pass_over(self, line: int, why: str) -> None:
        self.unread.append(Unread(f"{self.path}:{line}", why))

    def __len__(self) -> int:
        return len(self._index()[0])

    def __getitem__(self, number: int) -> Row:
        start, end, line = (column[number] for column in self._index())
        return Row(read_span(self.path, start, end, line), str(self.path), line)

    def __iter__(self) -> Iterator[Row | Unread]:
        broken: list[Unread] = []
        for row in read_rows(self.path, lambda line, why: broken.append(Unread(f"{self.path}:{line}", why))):
            yield from broken
            broken.clear()
            yield row
        yield from broken


class ParquetRecords:
    """A Parquet file, or a folder of them as `relook data convert` writes it.

    A record by number costs its whole group of rows (the last ones are held): for sets that are shuffled at random,
    reading from front to back (streaming) is what Parquet is for.
    """

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(NO_PYARROW) from None
        self.path, self.unread = path, []  # type: tuple[Path, list[Unread]]
        self._groups: list[tuple[Path, int, int, int]] = []  # file, group, number of its first record, line before it
        self._length = 0
        self._held: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        for file in parquet_files(path):
            line = 0
            with parquet.ParquetFile(file) as opened:
                for group in range(opened.metadata.num_row_groups):
                    self._groups.append((file, group, self._length, line))
                    rows = opened.metadata.row_group(group).num_rows
                    self._length, line = self._length + rows, line + rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Row:
        import bisect

        at = bisect.bisect_right(self._groups, number, key=lambda group: group[2]) - 1
        file, group, first, before = self._groups[at]
        if at not in self._held:
            from pyarrow import parquet

            with parquet.ParquetFile(file) as opened:
                self._held[at] = opened.read_row_group(group).to_pylist()
        self._held.move_to_end(at)
        if len(self._held) > GROUPS:
            self._held.popitem(last=False)
        value = dict(self._held[at][number - first])
        value |= json.loads(value.pop(EXTRA, None) or "{}")
        return Row(value, str(file), before + number - first + 1)

    def __iter__(self) -> Iterator[Row | Unread]:
        yield from read_rows(self.path)


class DatasetRecords:
    """A dataset of the library `datasets` as `save_to_disk` leaves it. Images stay as they are stored: undecoded."""

    def __init__(self, path: Path, split: str) -> None:
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError:
            raise UserError(
                f"{path}: needs the package datasets, which is not installed; pip install 'relook[train]'"
            ) from None
        self.path, self.unread = path, []  # type: tuple[Path, list[Unread]]
        try:
            rows = load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a saved dataset that can be read ({str(error).splitlines()[0]})") from None
        if isinstance(rows, DatasetDict):
            if split not in rows:
                raise UserError(f"{path}: has no split {split!r}; it has {', '.join(map(str, rows))}")
            rows = rows[split]
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return Row(self._rows[number : number + 1].to_pylist()[0], str(self.path), number + 1)

    def __iter__(self) -> Iterator[Row | Unread]:
        return (self[number] for number in range(len(self)))


class GivenRecords:
    """Items that are in memory already (or made by somebody else's dataset), as they are."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items, self.unread = items, []  # type: tuple[Sequence[Any], list[Unread]]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Row:
        item = self.items[number]
        return Row(item if isinstance(item, dict) else {"item": item}, "items", number + 1)

    def __iter__(self) -> Iterator[Row | Unread]:
        return (self[number] for number in range(len(self)))


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


# whether a path is of this form, and what reads it
FORMS: tuple[tuple[Callable[[Path], bool], Callable[[Path, str], Records]], ...] = (
    (_saved, DatasetRecords),
    (lambda path: bool(parquet_files(path)), lambda path, _: ParquetRecords(path)),
    (lambda path: not path.is_dir(), lambda path, _: JsonRecords(path)),
)


def records(path: str | Path, split: str = "train") -> Records:
    """The records of a source.

    Args:
        path: a JSON or JSON-lines file, a Parquet file or folder of them, or a folder that `save_to_disk` wrote.
        split: of a folder that holds several.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give JSON, JSON lines, Parquet or a saved dataset")
    for of_form, reader in FORMS:
        if of_form(path):
            return reader(path, split)
    raise UserError(f"{path}: a folder without Parquet files or a saved dataset; give one of its files")
