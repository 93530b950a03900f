"""Records of a set by number, whatever its file format.

JSON array, JSON lines    one pass finds where the records are: 24 bytes a record are kept
Parquet                   a file, or a folder of them as `relook data convert` writes it
saved dataset             a folder that `datasets.save_to_disk` wrote; images stay undecoded bytes
sequence                  items in memory, or anybody's dataset
"""

from __future__ import annotations

import bisect
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from relook.data.reader import (
    TABLES,
    Record,
    Unreadable,
    import_pyarrow,
    open_input,
    parquet_files,
    parse_record,
    readable,
    scan,
    with_extra,
)
from relook.errors import UserError

GROUPS = 8  # row groups of Parquet that are kept in memory, at least


class Records:
    """Records by number and from front to back. `unreadable` are those without a number, known after `len`.

    This class: items that are in memory already, or rows of somebody else's dataset, as they are.
    """

    unreadable: Sequence[Unreadable] = ()

    def __init__(self, items: Sequence[Any], name: str = "items") -> None:
        self.items, self.name = items, name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Record:
        item = self.items[number]
        if isinstance(item, Record):
            return item
        return Record(item if isinstance(item, dict) else {"item": item}, self.name, number + 1)

    def __iter__(self) -> Iterator[Record | Unreadable]:
        return (self[number] for number in range(len(self)))


class JsonRecords(Records):
    """A JSON array or JSON lines. The file is gone through once, when its length or a record is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: tuple[array[int], ...] = ()  # starts and ends (bytes), lines, entries of an array on one line

    def _index(self) -> tuple[array[int], ...]:
        if not self._places:
            for _ in self:
                pass
        return self._places

    def __len__(self) -> int:
        return len(self._index()[0])

    def __getitem__(self, number: int) -> Record:
        start, end, line, entry = (values[number] for values in self._index())
        with open_input(self.path) as file:
            file.seek(start)
            return readable(parse_record(self.path, file.read(end - start), line, start, end, entry))

    def __iter__(self) -> Iterator[Record | Unreadable]:
        places, unreadable = (array("Q"), array("Q"), array("I"), array("I")), list[Unreadable]()
        for record in scan(self.path):
            if isinstance(record, Unreadable):
                unreadable.append(record)
            else:
                for values, value in zip(places, (record.start, record.end, record.line, record.entry), strict=True):
                    values.append(value)
            yield record
        self._places, self.unreadable = places, unreadable


class ParquetRecords(Records):
    """A Parquet file, or a folder of them. A record by number costs its row group, of which the last ones are kept.

    Args:
        held: records that are wanted near one another: their groups are kept (`GROUPS` at least).
    """

    def __init__(self, path: Path, held: int = 0) -> None:
        self.path, self.held = path, held
        self._groups: list[tuple[Path, int, int]] = []  # file, group, rows of the file before it
        self._starts: list[int] = []  # number of the first record of each group
        self._length = 0
        self._read: dict[int, list[dict[str, Any]]] = {}  # the last used last
        _, parquet = import_pyarrow()
        for file in parquet_files(path):
            before = self._length
            with parquet.ParquetFile(file) as opened:
                for group in range(opened.metadata.num_row_groups):
                    self._groups.append((file, group, self._length - before))
                    self._starts.append(self._length)
                    self._length += opened.metadata.row_group(group).num_rows

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Record:
        at = bisect.bisect_right(self._starts, number) - 1
        file, group, before = self._groups[at]
        rows = self._read.pop(at, None)
        if rows is None:
            _, parquet = import_pyarrow()
            with parquet.ParquetFile(file) as opened:
                rows = opened.read_row_group(group).to_pylist()
            while len(self._read) >= GROUPS and sum(map(len, self._read.values())) > self.held:
                del self._read[next(iter(self._read))]
        self._read[at] = rows
        row = number - self._starts[at]
        return Record(with_extra(dict(rows[row])), str(file), before + row + 1)

    def __iter__(self) -> Iterator[Record | Unreadable]:
        return scan(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": {}}


class SavedRecords(Records):
    """A dataset that `datasets.save_to_disk` wrote, memory-mapped; its images stay undecoded bytes."""

    def __init__(self, path: Path, split: str) -> None:
        super().__init__(saved_dataset(path, split).with_format("arrow"), str(path))

    def __getitem__(self, number: int) -> Record:
        rows: Any = self.items[number : number + 1]
        return Record(rows.to_pylist()[0], self.name, number + 1)


def saved_dataset(path: Path, split: str) -> Any:
    """The `datasets.Dataset` in a folder that `save_to_disk` wrote; `split` where it holds several."""
    datasets = import_datasets(path)
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a saved dataset that can be read ({str(error).splitlines()[0]})") from None
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if split not in rows:
        raise UserError(f"{path}: has no split {split!r}; its splits: {', '.join(map(str, rows))}")
    return rows[split]


def import_datasets(source: str | Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: needs the package datasets, which is not installed; pip install 'relook[train]'"
        ) from None
    return datasets


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def records(path: str | Path, split: str = "train", held: int = 0) -> Records:
    """The records of a source, whatever its file format.

    Args:
        path: a JSON or JSON-lines file, a Parquet file or folder of them, or a folder that `save_to_disk` wrote.
        split: of a saved dataset that holds several.
        held: records that are wanted near one another (see `ParquetRecords`).

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give JSON, JSON lines, Parquet or a saved dataset")
    if is_saved_dataset(path):
        return SavedRecords(path, split)
    if parquet_files(path):
        return ParquetRecords(path, held)
    if path.is_dir():
        raise UserError(f"{path}: a folder without Parquet files or a saved dataset; give one of its files")
    return Records(list(map(readable, scan(path)))) if path.suffix in TABLES else JsonRecords(path)


def saved_columns(path: Path) -> list[str]:
    """The names of the columns of a dataset that `save_to_disk` wrote."""
    info = next(iter(sorted(path.rglob("dataset_info.json"))), None)
    try:
        return list(json.loads(info.read_text(encoding="utf-8"))["features"]) if info is not None else []
    except (OSError, ValueError, KeyError, TypeError):
        return []  # loading it will say so


def holds_items(path: Path) -> bool:
    """Whether a path is Parquet of items, as `relook data convert` writes it, by the columns of its first file."""
    shards = parquet_files(path)
    if not shards:
        return False
    arrow, parquet = import_pyarrow()
    try:
        return "messages" in parquet.read_schema(shards[0]).names
    except (arrow.ArrowException, OSError):
        return False  # no Parquet, or a pointer to it: reading it will say so
