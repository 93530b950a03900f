"""Items by number, as a stream, and in the order of a seed for training.

`ItemsDataset` and `ItemStream` give the items of one file. `SampledItems` and `StreamedItems` give those of a recipe's
`data:`: which record comes when is a function of the seed and the position, whether records are read by number or from
front to back, so nothing needs to be saved to resume a run but the position. No image is opened here:
`relook.data.collate` makes rows and batches of the items.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from relook.data.build import build_item
from relook.data.forms.table import row_question, stored_image
from relook.data.items import IMAGE_KEYS, Item, variant
from relook.data.reader import Record, Unreadable, folder_of, read_records
from relook.data.records import Records, SequenceRecords, records
from relook.data.rules import BuildOptions, Data, ItemSource
from relook.errors import RelookError, UserError

T = TypeVar("T")
Found = tuple[int, Record | Unreadable]  # number of the source, record of it

BUFFER = 16384  # records in the shuffle buffer, as in the published training
DRAWS = 1000  # draws between sources that are made at a time
EARLY = 200  # samples: a share of unreadable ones is not judged on fewer


# -- one file


class ItemsDataset(Sequence[Item]):
    """The items of a file by number (a map-style dataset). Nothing is held but where each record lies.

    Args:
        path: a JSON array, JSON lines, Parquet, or a saved dataset.
        image_root: folder of the relative image paths, which they may not leave; without it, the file's own folder.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path, self.image_root = Path(path), image_root
        self.records = records(path)
        length = len(self.records)
        if bad := self.records.unreadable:
            raise UserError(f"{bad[0].where}: {bad[0].why}")
        if not length:
            raise UserError(f"{path}: holds no items; build some with `relook data build`")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)} in {self.path}")
        return _placed(self.records[index % len(self)], self.image_root)


class ItemStream:
    """The items of a file in a shuffled order, from front to back through a buffer; the file is never held.

    Args:
        path, image_root: as of `ItemsDataset`.
        seed: of the order; `epoch` (an attribute, to be set between passes) gives each pass another.
        buffer: records that are held to draw from; 1 gives the file's own order.
        part: (i, n) for every n-th record from the i-th on, one part for each of n workers.
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
        mine = islice(read_records(self.path), self.part[0], None, self.part[1])
        for record in shuffled(mine, self.buffer, f"{self.seed}/{self.epoch}"):
            yield _placed(record, self.image_root)


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


def _placed(record: Record, image_root: str | Path | None) -> Item:
    """The item of a record that is one, its image paths below the root, or the folder of the record's file."""
    value = record.value
    lists = {key: value[key] for key in IMAGE_KEYS if isinstance(value.get(key), list)}
    if any(isinstance(ref, dict) for refs in lists.values() for ref in refs):  # an image column of a dataset
        value = value | {key: [stored_image(ref, record.where) for ref in refs] for key, refs in lists.items()}
    root = folder_of(record.file) if image_root is None else image_root
    return Item.from_dict(value, record.where).under(root, strict=image_root is not None)


# -- the items of a recipe, by position


def interleaved(
    lengths: Sequence[int], shares: Sequence[float], over: bool, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch drawn from several sources, as `datasets.interleave_datasets` draws with probabilities.

    Args:
        lengths: of the sources.
        shares: their probabilities, which add up to 1.
        over: end when every source has run out once (one that runs out early starts again); else when the first does.

    Returns:
        (n,) the source of each draw; (n,) how many came from that source before.
    """
    which = np.empty(0, dtype=np.int64)
    while True:
        which = np.concatenate([which, draw.choice(len(lengths), size=DRAWS, p=np.asarray(shares))])
        places = [np.flatnonzero(which == source) for source in range(len(lengths))]
        ends = [int(place[n - 1]) for place, n in zip(places, lengths, strict=True) if len(place) >= n]
        if ends and (not over or len(ends) == len(lengths)):
            break
    which = which[: (max(ends) if over else min(ends)) + 1]
    before = np.empty(len(which), dtype=np.int64)
    for source in range(len(lengths)):
        place = np.flatnonzero(which == source)
        before[place] = np.arange(len(place))
    return which, before


class SampledItems:
    """The items of several sources by position, epoch after epoch in a new order; records are read by number.

    Args:
        data: of the recipe; with several sources, `data.mix` says how they come together.
        seed: of the order.
        validation: how many records are held out (`self.validation`), chosen by the seed, and never come otherwise.
        processor: of the model that learns: questions become items on its grid and in its order.
        sources: records in place of those that `data` names (items in memory).

    Raises:
        UserError: a source that is not there or holds nothing; nothing would be left to learn from.
        RelookError: too many records cannot be read.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        validation: int = 0,
        processor: Any = None,
        sources: Sequence[Records] | None = None,
    ) -> None:
        self.data, self.seed = data, seed
        self.sources, self.build = data.all_sources(), build_options(data, processor)
        weights = [source.weight for source in self.sources]
        self.shares = [weight / sum(weights) for weight in weights]
        self.records = list(sources) if sources is not None else [records(s.path, s.split) for s in self.sources]
        self.validation = ValidationSplit(self, self._hold_out(validation))

    @classmethod
    def of(cls, items: Sequence[Any], seed: int) -> SampledItems:
        """Items that are in memory, or another dataset's, shuffled every epoch."""
        return cls(Data.model_validate({"path": "items"}), seed, sources=[SequenceRecords(items)])

    @property
    def unreadable(self) -> list[Unreadable]:
        """Records that have no position because they cannot be read."""
        return [one for source in self.records for one in source.unreadable]

    def _hold_out(self, count: int) -> list[tuple[int, int]]:
        """Choose the (source, number) of `count` records for validation; `_numbers` keeps those of the others."""
        lengths = [len(source) for source in self.records]
        for source, length in zip(self.sources, lengths, strict=True):
            if not length:
                raise UserError(f"{source.path}: holds no items; build some with `relook data build`")
        if bad := self.unreadable:
            first = f"{bad[0].where}: {bad[0].why}"
            check_share(len(bad), sum(lengths) + len(bad), "records", self.data.max_broken, first)
        if 2 * count > sum(lengths):
            raise self._too_few(count, sum(lengths))
        starts = np.cumsum([0, *lengths])
        chosen = np.sort(np.random.default_rng([self.seed, 1]).permutation(starts[-1])[:count])  # over all sources
        self._numbers = [np.setdiff1d(np.arange(begin, end), chosen) - begin for begin, end in pairwise(starts)]
        self._lengths: list[int] = []  # of the epochs that are known
        self._order: tuple[int, Any, Any] = (-1, None, None)
        which = np.searchsorted(starts, chosen, side="right") - 1
        return [(int(source), int(number - starts[source])) for source, number in zip(which, chosen, strict=True)]

    def _too_few(self, count: int, found: int) -> UserError:
        names, few = ", ".join(source.path for source in self.sources), max(1, found // 10)
        return UserError(
            f"validation.items is {count} and would hold out most of the {found} items in {names}; "
            f"say fewer: validation.items={few}"
        )

    def __len__(self) -> int:
        """Items of the first epoch."""
        return self._length(0)

    def _length(self, epoch: int) -> int:
        while len(self._lengths) <= epoch:
            self._lengths.append(len(self._ordered(len(self._lengths))[0]))
        return self._lengths[epoch]

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources and record numbers of an epoch, in order; the last epoch asked for is kept."""
        if self._order[0] != epoch:
            sizes, draw = [len(numbers) for numbers in self._numbers], np.random.default_rng([self.seed, epoch])
            if self.data.mix == "concat":
                order = draw.permutation(sum(sizes))
                which = np.repeat(np.arange(len(sizes)), sizes)[order]
                numbers = np.concatenate(self._numbers)[order]
            else:
                which, before = interleaved(sizes, self.shares, self.data.mix == "interleave_over", draw)
                numbers = np.empty_like(before)
                for source, size in enumerate(sizes):
                    mine = which == source
                    numbers[mine] = self._numbers[source][self._shuffled(epoch, source, before[mine], size)]
            self._order = epoch, which, numbers
        return self._order[1:]

    def _shuffled(self, epoch: int, source: int, before: np.ndarray, size: int) -> np.ndarray:
        """The place of each how-many-th draw from a source: a new permutation for each time through it."""
        rounds = int(before.max(initial=-1)) // size + 1
        orders = [np.random.default_rng([self.seed, epoch, source, r]).permutation(size) for r in range(rounds)]
        return np.concatenate([np.empty(0, dtype=np.int64), *orders])[before]

    def record(self, position: int) -> Found:
        """The source and the record at a position."""
        epoch = 0
        while position >= self._length(epoch):
            position -= self._length(epoch)
            epoch += 1
        which, numbers = self._ordered(epoch)
        source = int(which[position])
        return source, self.records[source][int(numbers[position])]

    def held_out(self, source: int, number: int) -> Found:
        """A record that is held out."""
        return source, self.records[source][number]

    def item(self, source: int, record: Record | Unreadable) -> Item:
        """The item of a record, its images placed but not opened.

        Raises:
            UserError: it is none; with file and line.
        """
        if isinstance(record, Unreadable):
            raise UserError(f"{record.where}: {record.why}")
        given = record.value.get("item")
        item = given if isinstance(given, Item) else record_item(record, self.sources[source], self.build)
        return variant(item, free_choice=True) if self.data.free_choice else item

    def __iter__(self) -> Iterator[Item]:
        """The items of the first epoch, in order."""
        return (self.item(*self.record(position)) for position in range(len(self)))


class StreamedItems(SampledItems):
    """The items of sources that are read from front to back, mixed, and shuffled through a buffer.

    Going on to a position is cheap and going back expensive (the stream starts again), so ask in order. Every process
    that asks reads all records and makes items of its own ones only. The first records are those held out.
    """

    def _hold_out(self, count: int) -> list[tuple[int, int]]:
        self._kept: dict[tuple[int, int], Record | Unreadable] = {}
        self._stream: Iterator[tuple[tuple[int, int], Record | Unreadable]] | None = None
        self._next = 0
        self._last: Found | None = None
        first = list(islice(self._epoch(0), 2 * count or 1))
        if not first:
            names = ", ".join(source.path for source in self.sources)
            raise UserError(f"{names}: holds no items; build some with `relook data build`")
        if len(first) < 2 * count:
            raise self._too_few(count, len(first))
        self._kept = dict(first[:count])
        return list(self._kept)

    def __len__(self) -> int:
        raise UserError("a stream does not know how many items it has; say steps or samples, not epochs")

    def __iter__(self) -> Iterator[Item]:
        return (self.item(source, record) for (source, _), record in self._epoch(0))

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which reads its own stream."""
        return {**self.__dict__, "_stream": None, "_next": 0}

    def held_out(self, source: int, number: int) -> Found:
        return source, self._kept[source, number]

    def record(self, position: int) -> Found:
        if self._stream is None or position < self._next - 1:
            self._stream, self._next = self._endless(), 0
        while self._next <= position:
            (source, _), record = next(self._stream)
            self._last, self._next = (source, record), self._next + 1
        assert self._last is not None
        return self._last

    def _endless(self) -> Iterator[tuple[tuple[int, int], Record | Unreadable]]:
        epoch = 0
        while True:
            yield from self._epoch(epoch)
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[tuple[tuple[int, int], Record | Unreadable]]:
        return shuffled(self._mixed(epoch), self.data.buffer, f"{self.seed}/{epoch}")

    def _mixed(self, epoch: int) -> Iterator[tuple[tuple[int, int], Record | Unreadable]]:
        """The records of an epoch as the sources are read, with their (source, number)."""
        streams = [self._read(source) for source in range(len(self.records))]
        if self.data.mix == "concat":
            for stream in streams:
                yield from stream
            return
        draw, over = np.random.default_rng([self.seed, epoch]), self.data.mix == "interleave_over"
        ahead = [next(stream, None) for stream in streams]
        for source, record in zip(self.sources, ahead, strict=True):
            if record is None:
                raise UserError(f"{source.path}: holds no items that could be taught; leave it out of the mix")
        done: set[int] = set()
        while True:
            for source in draw.choice(len(streams), size=DRAWS, p=np.asarray(self.shares)).tolist():
                record = ahead[source]
                assert record is not None
                yield record
                ahead[source] = next(streams[source], None)
                if ahead[source] is None:  # that was its last
                    done.add(source)
                    if not over or len(done) == len(streams):
                        return
                    streams[source] = self._read(source)
                    ahead[source] = next(streams[source])

    def _read(self, source: int) -> Iterator[tuple[tuple[int, int], Record | Unreadable]]:
        numbered = enumerate(self.records[source])
        return (((source, number), record) for number, record in numbered if (source, number) not in self._kept)


class ValidationSplit(Sequence[Item]):
    """The items that are held out."""

    def __init__(self, items: SampledItems, keys: list[tuple[int, int]]) -> None:
        self.items, self.keys = items, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        return self.items.item(*self.record(index))

    def record(self, index: int) -> Found:
        """The source and the record of a held-out item."""
        return self.items.held_out(*self.keys[index])


def open_items(data: Data, seed: int, validation: int = 0, processor: Any = None) -> SampledItems:
    """The items that a recipe's `data` names; see `SampledItems`."""
    return (StreamedItems if data.streaming else SampledItems)(data, seed, validation, processor)


def record_item(record: Record, source: ItemSource, options: BuildOptions) -> Item:
    """The item of a record: a published item as it is; a question with the source's look, built by `options`.

    Images are placed below the source's `image_root` (which they may not leave) or the folder of its file; those that a
    dataset holds as bytes stay in memory.
    """
    if "messages" in record.value:
        return _placed(record, source.image_root)
    root = folder_of(record.file) if source.image_root is None else source.image_root
    question = row_question(record.value, source.columns, record.where).under(
        root, strict=source.image_root is not None
    )
    item = build_item(question, replace(options, look=source.look))
    assert item is not None  # no_box="direct" skips nothing
    return item


def build_options(data: Data, processor: Any = None) -> BuildOptions:
    """How questions become items: on the grid, with the margin and in the order that the model is going to see.

    Without a processor (a start that is not here) as the published models were trained.
    """
    if processor is None:
        return BuildOptions(no_box="direct", free_choice=data.free_choice)
    return BuildOptions(
        no_box="direct",
        grid=processor.grid_size,
        margin=processor.region_margin,
        free_choice=data.free_choice or processor.free_choice,
        question_first=processor.question_first,
    )


def check_share(broken: int, seen: int, what: str, most: float, first: str) -> None:
    """Stop where more than a share `most` of what was seen is broken, or all of it.

    Raises:
        RelookError: it is; names the first.
    """
    if broken > most * max(seen, EARLY) or broken == seen:
        raise RelookError(
            f"{broken} of {seen} {what} could not be read, more than data.max_broken allows ({most:g}); "
            f"the first: {first}; mend the set (relook data check says what is wrong with it), or raise data.max_broken"
        )
