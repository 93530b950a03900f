"""Items for training, in the order of a seed, by their position in it: what comes when is a function of the position.

So nothing needs to be saved of a feed to go on from a checkpoint: the next position is its whole state, whether records
are had by number (`Feed`) or only from front to back (`StreamedFeed`, which reads on to the position without opening an
image). Images are opened when an item is encoded, in the process that draws it. An item that cannot be read, or that is
longer than the cutoff, becomes a `LeftOut`, which `Account` counts and names.

Knows sources, orders and items; not batches, not models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np

from relook.data.access import GivenRecords, Records, Unread, records
from relook.data.items import Item
from relook.data.stream import Row, shuffled
from relook.data.variants import variant
from relook.errors import UserError
from relook.train.account import LeftOut, check_share
from relook.train.lengths import alike, item_length
from relook.train.making import build_options, made, opened
from relook.train.recipe import Data

Key = tuple[int, int]  # number of the source, number of the record in it
FIRST = 1000  # draws between sources that are made at a time


def interleaved(
    lengths: Sequence[int], shares: Sequence[float], over: bool, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch drawn from several sources, as `datasets.interleave_datasets` draws with probabilities.

    Args:
        lengths: of the sources; shares: their probabilities, which add up to 1.
        over: end when every source has run out once (one that runs out early starts again); else when the first does.

    Returns:
        (n,) the source of each draw; (n,) how many came from that source before.
    """
    which = np.empty(0, dtype=np.int64)
    need = np.asarray(lengths)
    while True:
        which = np.concatenate([which, draw.choice(len(lengths), size=FIRST, p=np.asarray(shares))])
        places = [np.flatnonzero(which == source) for source in range(len(lengths))]
        ends = [place[n - 1] if len(place) >= n else None for place, n in zip(places, need, strict=True)]
        known = [end for end in ends if end is not None]
        if known and (not over or len(known) == len(ends)):
            break
    which = which[: (max(known) if over else min(known)) + 1]
    before = np.empty(len(which), dtype=np.int64)
    for source in range(len(lengths)):
        place = np.flatnonzero(which == source)
        before[place] = np.arange(len(place))
    return which, before


class Feed:
    """Items by position, epoch after epoch, of sources whose records are had by number.

    Args:
        data: the recipe's `data`; of several sources `mix` says how they come together.
        seed: of the order.
        held: how many items are kept for validation (`held`), chosen by the seed, and never taught.
        given: records in place of those that `data` names (items in memory).
        processor: of the model that learns: questions become items as it is going to see them.

    Raises:
        UserError: a source that is not there or holds nothing; nothing would be left to learn from.
    """

    def __init__(
        self, data: Data, seed: int, held: int = 0, given: Sequence[Records] | None = None, processor: Any = None
    ) -> None:
        self.data, self.seed = data, seed
        self.sources, self.build = data.all_sources(), build_options(data, processor)
        self.records = list(given) if given is not None else [records(s.path, s.split) for s in self.sources]
        self.window, self.batch = 0, 1
        self._grouped: tuple[int, list[int]] = (-1, [])
        self.held = HeldOut(self, self._choose(held))

    @classmethod
    def of(cls, items: Sequence[Any], seed: int) -> Feed:
        """Items that are in memory, or another dataset's, shuffled every epoch."""
        return cls(Data.model_validate({"path": "items"}), seed, given=[GivenRecords(items)])

    @property
    def unread(self) -> list[Unread]:
        """Records that have no position because they cannot be read."""
        return [one for source in self.records for one in source.unread]

    # -- which record comes when

    def _choose(self, held: int) -> list[Key]:
        """Keep `held` records out of what is taught; see `_taught`."""
        lengths = [len(source) for source in self.records]
        for source, length in zip(self.sources, lengths, strict=True):
            if not length:
                raise UserError(f"{source.path}: holds no items; build some with `relook data build`")
        unread = self.unread
        if unread:
            first = f"{unread[0].where}: {unread[0].why}"
            check_share(len(unread), sum(lengths) + len(unread), "records", self.data.max_broken, first)
        if 2 * held > sum(lengths):
            raise self._too_few(held, sum(lengths))
        starts = np.cumsum([0, *lengths])
        kept = np.sort(np.random.default_rng([self.seed, 1]).permutation(starts[-1])[:held])  # counted over all sources
        self._taught = [np.setdiff1d(np.arange(begin, end), kept) - begin for begin, end in pairwise(starts)]
        self._epochs: list[tuple[int, int]] = []  # first position and length of each epoch known
        self._order: tuple[int, Any, Any] = (-1, None, None)
        sources = np.searchsorted(starts, kept, side="right") - 1
        return [(int(source), int(number - starts[source])) for source, number in zip(sources, kept, strict=True)]

    def _too_few(self, held: int, found: int) -> UserError:
        names, few = ", ".join(source.path for source in self.sources), max(1, found // 10)
        return UserError(
            f"validation.items is {held} and would hold out most of the {found} items in {names}; "
            f"say fewer: validation.items={few}"
        )

    def __len__(self) -> int:
        """Items of the first epoch."""
        return self._epoch(0)[1]

    def _epoch(self, epoch: int) -> tuple[int, int]:
        """First position and length of an epoch."""
        while len(self._epochs) <= epoch:
            start = sum(self._epochs[-1]) if self._epochs else 0
            self._epochs.append((start, len(self._ordered(len(self._epochs))[0])))
        return self._epochs[epoch]

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources and record numbers of an epoch, in order."""
        if self._order[0] != epoch:
            sizes, draw = [len(taught) for taught in self._taught], np.random.default_rng([self.seed, epoch])
            if self.data.mix == "concat":
                order = draw.permutation(sum(sizes))
                which = np.repeat(np.arange(len(sizes)), sizes)[order]
                numbers = np.concatenate(self._taught)[order]
            else:
                which, before = interleaved(sizes, self.shares, self.data.mix == "interleave_over", draw)
                numbers = np.empty_like(before)
                for source, size in enumerate(sizes):
                    mine = which == source
                    numbers[mine] = self._shuffled(epoch, source, before[mine], size)
            self._order = epoch, which, numbers
        return self._order[1:]

    def _shuffled(self, epoch: int, source: int, before: np.ndarray, size: int) -> np.ndarray:
        """The record for each how-many-th draw from a source: a new permutation for each time through it."""
        rounds = int(before.max(initial=-1)) // size + 1
        orders = [np.random.default_rng([self.seed, epoch, source, r]).permutation(size) for r in range(rounds)]
        order = np.concatenate(orders) if orders else np.empty(0, dtype=np.int64)
        return self._taught[source][order[before]]

    @property
    def shares(self) -> list[float]:
        weights = [source.weight for source in self.sources]
        return [weight / sum(weights) for weight in weights]

    def key(self, position: int) -> Key:
        """Source and number of the record at a position."""
        epoch = next((e for e, (start, n) in enumerate(self._epochs) if start <= position < start + n), None)
        while epoch is None:
            start, length = self._epoch(len(self._epochs))
            epoch = len(self._epochs) - 1 if position < start + length else None
        which, numbers = self._ordered(epoch)
        at = position - self._epochs[epoch][0]
        return int(which[at]), int(numbers[at])

    def row(self, position: int) -> tuple[int, Row | Unread]:
        """The source and the record at a position."""
        source, number = self.key(position)
        return source, self.records[source][number]

    def kept(self, source: int, number: int) -> Row | Unread:
        """A record that is held out."""
        return self.records[source][number]

    # -- items

    def item(self, source: int, row: Row | Unread) -> Item:
        """The item of a record, its images placed but not opened.

        Raises:
            UserError: it is none; names file and line.
        """
        if isinstance(row, Unread):
            raise UserError(f"{row.where}: {row.why}")
        given = row.value.get("item")
        item = given if isinstance(given, Item) else made(row, self.sources[source], self.build)
        return variant(item, "region", free_choice=True) if self.data.free_choice else item

    def __iter__(self) -> Iterator[Item]:
        """The items of the first epoch, in order."""
        return (self.item(*self.row(position)) for position in range(len(self)))

    def grouped(self, window: int, batch: int) -> None:
        """From now on, the positions of `window` batches come in the order of `lengths.alike`; 0 for none."""
        self.window, self.batch = window, batch

    def _place(self, index: int, processor: Any) -> int:
        """The position whose item comes as example `index`."""
        size = self.window * self.batch
        if not size:
            return index
        window, at = divmod(index, size)
        if self._grouped[0] != window:
            positions = range(window * size, (window + 1) * size)
            order = alike([self._length(p, processor) for p in positions], self.batch, self._random(window))
            self._grouped = window, order
        return window * size + self._grouped[1][at]

    def _random(self, window: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 2, window])

    def _length(self, position: int, processor: Any) -> int:
        try:
            return item_length(processor, self.item(*self.row(position)))
        except UserError:
            return 0  # it will be left out, and said so, when it is drawn

    def example(self, index: int, processor: Any, cutoff: int | None = None) -> dict[str, Any] | LeftOut:
        """Example `index`, encoded; or why there is none."""
        position = self._place(index, processor)
        source, row = self.row(position)
        return self.encoded(source, row, index, processor, cutoff)

    def encoded(
        self, source: int, row: Row | Unread, index: int, processor: Any, cutoff: int | None
    ) -> dict[str, Any] | LeftOut:
        """One record as `example` gives it."""
        where = row.where
        try:
            encoded = dict(processor.encode_item(opened(self.item(source, row)).to_dict()))
        except UserError as error:
            return LeftOut(index, "broken", where, str(error).removeprefix(f"{where}: "))
        length = len(encoded["input_ids"])
        if cutoff is not None and length > cutoff:
            return LeftOut(index, "too long", where, f"{length} tokens, over the cutoff of {cutoff}")
        return encoded


class StreamedFeed(Feed):
    """Items by position of sources that are read from front to back, mixed, and shuffled through a buffer.

    Positions are cheap to go on to and dear to go back to (the stream starts again), so ask for them in order. Every
    process that draws reads all records and makes items of its own ones only.
    """

    def _choose(self, held: int) -> list[Key]:
        self._out: frozenset[Key] = frozenset()
        self._stream: Iterator[tuple[Key, Row | Unread]] | None = None
        self._next = 0
        self._last: tuple[int, Row | Unread] | None = None
        self._window_rows: dict[int, tuple[int, Row | Unread]] = {}
        first = list(islice(self._pass(0), 2 * held or 1))
        if not first:
            names = ", ".join(source.path for source in self.sources)
            raise UserError(f"{names}: holds no items; build some with `relook data build`")
        if len(first) < 2 * held:
            raise self._too_few(held, len(first))
        self._kept = dict(first[:held])
        self._out = frozenset(self._kept)
        return list(self._kept)

    def __len__(self) -> int:
        raise UserError("a stream does not know how many items it has; say steps or samples, not epochs")

    def __iter__(self) -> Iterator[Item]:
        return (self.item(source, row) for (source, _), row in self._pass(0))

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the position apart, which it finds by itself."""
        return {**self.__dict__, "_stream": None, "_next": 0, "_window_rows": {}, "_grouped": (-1, [])}

    def kept(self, source: int, number: int) -> Row | Unread:
        return self._kept[source, number]

    def _pass(self, epoch: int) -> Iterator[tuple[Key, Row | Unread]]:
        """The records of one epoch."""
        return shuffled(self._mixed(epoch), self.data.buffer, f"{self.seed}/{epoch}")

    def _mixed(self, epoch: int) -> Iterator[tuple[Key, Row | Unread]]:
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
            for source in draw.choice(len(streams), size=FIRST, p=np.asarray(self.shares)).tolist():
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

    def _read(self, source: int) -> Iterator[tuple[Key, Row | Unread]]:
        for number, row in enumerate(self.records[source]):
            if (source, number) not in self._out:
                yield (source, number), row

    def row(self, position: int) -> tuple[int, Row | Unread]:
        if position in self._window_rows:
            return self._window_rows[position]
        if self._stream is None or position < self._next - 1:
            self._stream, self._next = self._endless(), 0
        while self._next <= position:
            (source, _), row = next(self._stream)
            self._last, self._next = (source, row), self._next + 1
        assert self._last is not None
        return self._last

    def _endless(self) -> Iterator[tuple[Key, Row | Unread]]:
        epoch = 0
        while True:
            yield from self._pass(epoch)
            epoch += 1

    def _place(self, index: int, processor: Any) -> int:
        size = self.window * self.batch
        if size and self._grouped[0] != index // size:  # its records are looked at twice: keep them
            self._window_rows = {}
            first = index // size * size
            self._window_rows = {position: self.row(position) for position in range(first, first + size)}
        return super()._place(index, processor)


class HeldOut(Sequence[Any]):
    """Items that are kept for validation."""

    def __init__(self, feed: Feed, keys: list[Key]) -> None:
        self.feed, self.keys = feed, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        return self.feed.item(*self._row(index))

    def _row(self, index: int) -> tuple[int, Row | Unread]:
        source, number = self.keys[index]
        return source, self.feed.kept(source, number)

    def example(self, index: int, processor: Any, cutoff: int | None = None) -> dict[str, Any] | LeftOut:
        """Item `index`, encoded; or why it cannot be had."""
        return self.feed.encoded(*self._row(index), index, processor, cutoff)


def feed(data: Data, seed: int, held: int = 0, processor: Any = None) -> Feed:
    """The feed that a recipe's `data` asks for."""
    return (StreamedFeed if data.streaming else Feed)(data, seed, held, processor=processor)


__all__ = ["Feed", "HeldOut", "StreamedFeed", "feed", "interleaved"]
