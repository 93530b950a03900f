"""Sets of any size, read from front to back: the rows of a file, and items shuffled through a buffer.

JSON, JSON lines and Parquet (`relook.data.convert`) come out alike. Nothing is held but a chunk of the file and the
buffer, so a set of any length opens at once. Where any item must be had by number, use `ItemsDataset`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from relook.data.items import Item, split_ref
from relook.data.records import Broken, place_of_record, read_records
from relook.errors import UserError
from relook.regions import join_crop_suffix

T = TypeVar("T")

BUFFER = 16384  # items, as in the published training
NO_PYARROW = "Parquet needs pyarrow, which is not installed; pip install 'relook[train]'"
EXTRA = "extra"  # the Parquet column of what else a record said, as JSON


@dataclass(frozen=True, slots=True)
class Row:
    """One record and its place: `where` is "file:line" (of Parquet: the row's number; `entry` as in `Record`)."""

    value: dict[str, Any]
    file: str
    line: int
    entry: int = 0

    @property
    def where(self) -> str:
        return place_of_record(self.file, self.line, self.entry)


def read_rows(path: str | Path, broken: Broken | None = None) -> Iterator[Row]:
    """The records of a JSON array, JSON lines, a Parquet file or a folder of Parquet files, one at a time.

    Args:
        broken: told of broken records that are passed over, as in `read_records`.
    """
    path = Path(path)
    shards = parquet_files(path)
    if not shards:
        for record in read_records(path, broken):
            yield Row(record.value, str(path), record.line, record.entry)
    for shard in shards:
        for number, value in enumerate(_parquet_records(shard), start=1):
            yield Row(value, str(shard), number)


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files that a path stands for, in order: itself, or those in a folder; none for anything else."""
    if path.suffix == ".parquet" and path.is_file():
        return [path]
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def holds_items(path: Path) -> bool:
    """Whether a path is Parquet of items, as `relook data convert` writes it, by the columns of its first file."""
    shards = parquet_files(path)
    if not shards:
        return False
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(NO_PYARROW) from None
    try:
        return "messages" in parquet.read_schema(shards[0]).names
    except (arrow.ArrowException, OSError):
        return False  # no Parquet, or a pointer to it; who reads it will say


def folder_of(path: Path) -> Path:
    """The folder from which a set's relative image paths hold: the file's own, or the folder of Parquet files."""
    return path if path.is_dir() else path.parent


class ItemStream:
    """The items of a set in a shuffled order, without holding the set.

    A buffer of `buffer` records is filled; each step gives a random one of them and reads the next into its place. The
    order depends on the seed and the epoch alone. `buffer=1` gives the file's own order.

    Args:
        path: what `read_rows` reads.
        image_root: folder of the image paths, which may not leave it; without it, the file's own folder.
        seed, buffer: of the shuffling; `epoch` (an attribute, to be set between passes) gives each pass its order.
        part: (i, n) to get every n-th record from the i-th on, one part for each of n workers.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        *,
        seed: int = 0,
        buffer: int = BUFFER,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if buffer < 1 or not 0 <= part[0] < part[1]:
            raise UserError(
                f"buffer {buffer}, part {part}; expected a buffer of 1 or more and a part (i, n) with i < n"
            )
        self.path, self.image_root = Path(path), image_root
        self.seed, self.buffer, self.part, self.epoch = seed, buffer, part, 0

    def __iter__(self) -> Iterator[Item]:
        rows = (row for number, row in enumerate(read_rows(self.path)) if number % self.part[1] == self.part[0])
        for row in shuffled(rows, self.buffer, f"{self.seed}/{self.epoch}"):
            yield self._item(row)

    def _item(self, row: Row) -> Item:
        """The item of a row with its images placed; errors name file and line."""
        root = self.image_root if self.image_root is not None else Path(row.file).parent
        try:
            return Item.from_dict(row.value, row.where).under(root, strict=self.image_root is not None)
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(row.where) else f"{row.where}: {text}") from None


def shuffled(rows: Iterable[T], buffer: int, seed: str | int) -> Iterator[T]:
    """`rows` through a shuffle buffer; every row comes out once, at the latest when the input has ended.

    >>> sorted(shuffled(range(5), 2, seed=0))
    [0, 1, 2, 3, 4]
    """
    draw = random.Random(seed)
    held: list[T] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        at = draw.randrange(buffer)
        held[at], row = row, held[at]
        yield row
    draw.shuffle(held)
    yield from held


def sampled(rows: Iterable[T], n: int, seed: int) -> tuple[list[tuple[int, T]], int]:
    """`n` rows drawn from all, each with its number (from 1), in their order; and how many there are."""
    draw, total = random.Random(seed), 0
    held: list[tuple[int, T]] = []
    for total, row in enumerate(rows, start=1):
        at = total - 1 if total <= n else draw.randrange(total)
        if at < n:
            held[at : at + 1] = [(total, row)]
    return sorted(held, key=lambda pair: pair[0]), total


def mover(source: Path, target: Path) -> Callable[[Item], Item]:
    """Rewrites the relative image paths of items, given from folder `source`, so that they hold from `target`."""
    start, end = source.resolve(), target.resolve()

    def moved(ref: Any) -> Any:
        if not isinstance(ref, str) or os.path.isabs(ref):
            return ref
        file, box = split_ref(ref)
        there = os.path.relpath(os.path.join(start, file), end)
        return there if box is None else join_crop_suffix(there, box)

    if start == end:
        return lambda item: item
    return lambda item: replace(
        item, images={key: tuple(moved(ref) for ref in refs) for key, refs in item.images.items()}
    )


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(NO_PYARROW) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    extra = json.loads(value.pop(EXTRA, None) or "{}")
                    yield value | extra
    except (arrow.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({said}); convert the set again") from None
