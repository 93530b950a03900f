"""Items by number, as a stream, and in the order of a seed for training.

`ItemsDataset` and `ItemStream` give the items of one file, `SampledItems` those of a recipe's `data:`. Which record
comes when is a function of the seed and the position, so nothing needs to be saved to resume a run but the position;
and which records are held out is a function of the images alone. No image is opened here: `relook.data.collate` makes
rows and batches of the items.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from relook.data.build import build_item
from relook.data.faults import Context, refuse
from relook.data.forms import Source, record_thing, stored_item
from relook.data.forms.annotated import Reading
from relook.data.images import file_size, split_ref
from relook.data.items import COLUMNS, IMAGE_KEYS, Item, Question
from relook.data.order import interleaved, windowed
from relook.data.placing import same_size
from relook.data.reader import Record, Unreadable, folder_of, readable
from relook.data.records import Records, records
from relook.data.rules import BuildOptions, Data, ItemSource
from relook.data.settings import SETTINGS, processor_settings, refuse_others
from relook.data.variants import variant
from relook.errors import RelookError, UserError
from relook.files import split_page
from relook.io import rng

Found = tuple[int, Record]  # number of the source, record of it

BUFFER = 16384  # records of a window that a stream shuffles, as in the published training
EARLY = 200  # samples: a share of unreadable ones is not judged on fewer
TRIED = 200  # questions of a source whose boxes are looked at before anything is learnt


# -- one file


class ItemsDataset(Sequence[Item]):
    """The items of a file by number (a map-style dataset). Nothing is held but where each record lies.

    Args:
        path: a JSON array, JSON lines, Parquet, or a saved dataset.
        image_root: folder of the relative image paths, which they may not leave; without it, the file's own folder.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, held: int = 0) -> None:
        self.path, self.image_root = Path(path), image_root
        self.records = records(path, held=held)
        length = len(self.records)
        if bad := self.records.unreadable:
            readable(bad[0])
        if not length:
            raise UserError(f"{path}: holds no items; build some with `relook data build`")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)} in {self.path}")
        return _placed(self.records[index % len(self)], self.image_root)


class ItemStream(ItemsDataset):
    """The items of a file nearly from front to back, shuffled within windows (see `windowed`).

    Args:
        seed: of the order; `epoch` (an attribute, to be set between passes) gives each pass another.
        buffer: records of a window; 1 gives the file's own order.
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
        super().__init__(path, image_root, buffer)
        self.seed, self.buffer, self.part, self.epoch = seed, buffer, part, 0

    def __iter__(self) -> Iterator[Item]:
        order = windowed(len(self), self.buffer, rng(self.seed, self.epoch))
        return (self[number] for number in order[self.part[0] :: self.part[1]].tolist())


def _placed(record: Record, image_root: str | Path | None) -> Item:
    """The item of a record that is one, its image paths below the root, or the folder of the record's file."""
    root = folder_of(record.file) if image_root is None else image_root
    return stored_item(record.value, record.where).under(root, strict=image_root is not None)


# -- the items of a recipe, by position


class SampledItems:
    """The items of several sources by position, epoch after epoch in a new order; records are read by number.

    With `data.streaming`, an order is `windowed` (of `data.buffer` records). A source that an epoch did not take all of
    goes on in the next one, so that each of its items comes in its turn.

    Args:
        data: of the recipe; with several sources, `data.mix` says how they come together.
        seed: of the order.
        validation: how many records are held out (`self.validation`), by image, and never come otherwise: those of the
            file that `relook data build --val` wrote beside a source, else of the source itself.
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
        looks = None if processor is None else processor.looks
        self.context = Context(grid=self.build.grid, looks=looks)
        own = [open_source(source) for source in self.sources] if sources is None else []
        self.opened: list[Source | None] = [*own] if sources is None else [None] * len(self.sources)
        if processor is not None and not data.as_built:
            settings = {name: getattr(self.build, name) for name in SETTINGS}
            if data.free_choice:  # the sentences that ask for a look are taken out
                del settings["free_choice"]
            for source in own:
                if source.streams:
                    refuse_others(source.path, source.scan(), settings)
            self.context.settings = settings
        weights = [source.weight for source in self.sources]
        self.shares = [weight / sum(weights) for weight in weights]
        self.window = max(1, data.buffer // (1 if data.mix == "concat" else len(weights))) if data.streaming else 0
        opened = [source.records(self.window) for source in own] if sources is None else sources
        self.records = list(opened)
        for spec, source, found in zip(self.sources, own, self.records, strict=False):
            _refuse_dialect(spec, source, found)
        self.held = [records(s.val) if validation and s.val else r for s, r in zip(self.sources, opened, strict=True)]
        self.validation = ValidationSplit(self, self._hold_out(validation))
        self._drawn = [np.zeros(len(weights), dtype=np.int64)]  # of each source, before each epoch that is known
        self._order: tuple[int, Any, Any] = (-1, None, None)

    @classmethod
    def of(cls, items: Sequence[Any], seed: int) -> SampledItems:
        """Items that are in memory, or another dataset's, shuffled every epoch."""
        return cls(Data.model_validate({"path": "items"}), seed, sources=[Records(items)])

    @property
    def unreadable(self) -> list[Unreadable]:
        """Records that have no position because they cannot be read."""
        return [one for source in self.records for one in source.unreadable]

    def _hold_out(self, count: int) -> list[tuple[int, int]]:
        """Choose the (source, number) of `count` records for validation; `numbers` keeps those of the others.

        Each source gives its share, those first whose image comes first in an order that depends on the images' paths
        alone. A record that shares an image with one that is held out is not taught either.
        """
        keys = [self._image_keys(*pair) for pair in zip(self.sources, self.records, strict=True)] if count else []
        beside = [own is not held for own, held in zip(self.records, self.held, strict=True)]
        split = [self._image_keys(s, h) if b else k for s, h, b, k in zip(self.sources, self.held, beside, keys)]  # noqa: B905
        lengths = [len(source) for source in self.records]
        total, names = sum(lengths), ", ".join(source.path for source in self.sources)
        few = f"say fewer: validation.items={max(1, total // 10)}"
        if empty := [source.path for source, length in zip(self.sources, lengths, strict=True) if not length]:
            raise UserError(f"{empty[0]}: holds no items; build some with `relook data build`")
        if bad := self.unreadable:
            first = f"{bad[0].where}: {bad[0].why}"
            check_share(len(bad), total + len(bad), "records", self.data.max_broken, first)
        if 2 * count > total and not all(beside):
            raise UserError(
                f"validation.items is {count} and would hold out most of the {total} items in {names}; {few}"
            )
        self.numbers = [np.arange(length) for length in lengths]
        chosen: list[tuple[int, int]] = []
        for source, (own, quota) in enumerate(zip(split, np.diff(np.cumsum([0, *lengths]) * count // total))):  # noqa: B905
            ranked = sorted((images[0], number) for number, images in enumerate(own))
            chosen += sorted((source, number) for _, number in ranked[:quota])
        held = {key for source, number in chosen for key in split[source][number]}
        held |= {key for own, whole in zip(split, beside, strict=False) if whole for images in own for key in images}
        for source, own in enumerate(keys):
            self.numbers[source] = np.flatnonzero([held.isdisjoint(images) for images in own])
            if not len(self.numbers[source]):
                raise UserError(
                    f"validation.items is {count} and leaves nothing to learn from in {self.sources[source].path}: all "
                    f"of it shows images that are held out; {few}, or name a file of other images as validation.path"
                )
        return chosen

    def _image_keys(self, spec: ItemSource, records: Records) -> list[tuple[int, ...]]:
        """Of each record the 64-bit keys of its images, by path from here or content; of its text where it has none."""
        found = []
        columns = (*IMAGE_KEYS, *([spec.columns["image"]] if "image" in spec.columns else COLUMNS["image"]))
        for record in records:
            if isinstance(record, Unreadable):
                continue
            given = record.value.get("item")
            value = {"image": given.image} if isinstance(given, Question) else record.value
            value = given.to_dict() if isinstance(given, Item) else value
            lists = [value[key] for key in columns if value.get(key)]
            refs = [ref for refs in lists for ref in (refs if isinstance(refs, list) else [refs])]
            root = spec.image_root or folder_of(record.file)
            refs = [ref.partition("###")[0] if isinstance(ref, str) else ref for ref in refs]  # Visual-CoT's boxes
            names = {_image_name(ref, root): None for ref in refs} or [json.dumps(value, default=str).encode()]
            digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
            found.append(tuple(int.from_bytes(digest, "big") for digest in digests))
        return found

    def __len__(self) -> int:
        """Items of the first epoch."""
        return self._length(0)

    def _length(self, epoch: int) -> int:
        while len(self._drawn) <= epoch + 1:
            which = self._ordered(len(self._drawn) - 1)[0]
            self._drawn.append(self._drawn[-1] + np.bincount(which, minlength=len(self.sources)))
        return int((self._drawn[epoch + 1] - self._drawn[epoch]).sum())

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources and record numbers of an epoch, in order; the last epoch asked for is kept."""
        if self._order[0] != epoch:
            sizes, draw = [len(numbers) for numbers in self.numbers], np.random.default_rng([self.seed, epoch])
            if self.data.mix == "concat":
                order = self._shuffled(sum(sizes), draw)
                which = np.repeat(np.arange(len(sizes)), sizes)[order]
                numbers = np.concatenate(self.numbers)[order]
            else:
                which, before = interleaved(sizes, self.shares, self.data.mix == "interleave_over", draw)
                numbers = np.empty_like(before)
                for source, own in enumerate(self.numbers):
                    mine = which == source
                    numbers[mine] = own[self._turn(source, before[mine] + self._drawn[epoch][source], len(own))]
            self._order = epoch, which, numbers
        return self._order[1:]

    def _turn(self, source: int, draws: np.ndarray, size: int) -> np.ndarray:
        """The place of each how-many-th draw from a source: a new order for each time through it."""
        if not len(draws):
            return draws
        rounds = range(draws[0] // size, draws[-1] // size + 1)
        orders = [self._shuffled(size, np.random.default_rng([self.seed, source, r])) for r in rounds]
        return np.concatenate(orders)[draws - rounds[0] * size]

    def _shuffled(self, count: int, draw: np.random.Generator) -> np.ndarray:
        return windowed(count, self.window, draw) if self.window else draw.permutation(count)

    def record(self, position: int) -> Found:
        """The source and the record at a position."""
        epoch = 0
        while position >= self._length(epoch):
            position -= self._length(epoch)
            epoch += 1
        which, numbers = self._ordered(epoch)
        source = int(which[position])
        return source, self.records[source][int(numbers[position])]

    def item(self, source: int, record: Record | Unreadable) -> Item:
        """The item of a record, its images placed but not opened."""
        given = readable(record).value.get("item")
        item = given if isinstance(given, Item) else self._built(readable(record), source)
        refuse(item, self.context)
        return variant(item, free_choice=True) if self.data.free_choice else item

    def _built(self, record: Record, source: int) -> Item:
        return record_item(record, self.sources[source], self.build, self.opened[source])

    def __iter__(self) -> Iterator[Item]:
        """The items of the first epoch, in order."""
        return (self.item(*self.record(position)) for position in range(len(self)))


_real_folder = lru_cache(os.path.realpath)


def _image_name(ref: Any, root: str | Path) -> bytes:
    """What tells an image from others: the path of its file from here (of a page, its document's), or its bytes."""
    if isinstance(ref, dict) and ref.get("bytes") is not None:
        return ref["bytes"] if isinstance(ref["bytes"], bytes) else str(ref["bytes"]).encode("utf-8", "surrogatepass")
    ref = ref.get("path") if isinstance(ref, dict) else ref
    if isinstance(ref, tuple):  # (image, box)
        ref = ref[0]
    if isinstance(ref, str):
        folder, name = os.path.split(os.path.abspath(os.path.join(root, split_page(split_ref(ref)[0])[0])))
        path = os.path.join(_real_folder(folder), name)
        path = os.path.relpath(os.path.realpath(path) if os.path.islink(path) else path)
        return unicodedata.normalize("NFC", path).encode("utf-8", "surrogatepass")
    return ref.tobytes() if hasattr(ref, "tobytes") else str(ref).encode()


class ValidationSplit(Sequence[Item]):
    """The items that are held out."""

    def __init__(self, items: SampledItems, keys: list[tuple[int, int]]) -> None:
        self.items, self.keys, self.item, self.seed = items, keys, items.item, items.seed

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        return self.item(*self.record(index))

    def record(self, index: int) -> Found:
        """The source and the record of a held-out item."""
        source, number = self.keys[index]
        return source, self.items.held[source][number]


def open_items(data: Data, seed: int, validation: int = 0, processor: Any = None) -> SampledItems:
    """The items that a recipe's `data` names; see `SampledItems`."""
    return SampledItems(data, seed, validation, processor)


def open_source(spec: ItemSource) -> Source:
    """The source that a recipe names. Raises UserError where it is not there, or of no known form."""
    if not Path(spec.path).exists():
        raise UserError(f"{spec.path}: no such file or folder; give a file of items or questions, or a saved dataset")
    split = None if spec.split == "train" else spec.split
    reading: dict[str, Any] = {"columns": spec.columns, "ask": spec.ask, "split": split, "units": spec.units}
    return Source(Path(spec.path), spec.format, image_root=spec.image_root, **reading)


def record_item(record: Record, source: ItemSource, options: BuildOptions, opened: Source | None = None) -> Item:
    """The item of a record: a published item as it is; a question with the source's look, built by `options`.

    Images are placed below the source's `image_root` (which they may not leave) or the folder of its file; those that a
    dataset holds as bytes stay in memory.
    """
    reading = Reading(columns=source.columns)
    thing = record_thing(record.value, record.where, reading) if opened is None else opened.thing(record)
    root = folder_of(record.file) if source.image_root is None else source.image_root
    question = thing.under(root, strict=source.image_root is not None)
    if isinstance(question, Item):
        return question
    if question.size and isinstance(question.image, str) and (real := file_size(question.image, record.where)):
        same_size(question, question.image, real)
    item = build_item(question, replace(options, look=source.look))
    assert item is not None  # no_box="direct" skips nothing
    return item


def _refuse_dialect(spec: ItemSource, source: Source, found: Records) -> None:
    """Raises UserError where the first questions of a source have boxes of another dialect."""
    for number in range(min(len(found), TRIED)):
        if "messages" in found[number].value:
            return
        with suppress(UserError):  # which is told when its turn comes
            thing = source.thing(found[number])
            if isinstance(thing, Item):
                return
            root = folder_of(found[number].file) if spec.image_root is None else spec.image_root
            thing.under(root, strict=spec.image_root is not None).in_pixels(source.fit)
    source.fit.refuse(spec.path)


def build_options(data: Data, processor: Any = None) -> BuildOptions:
    """How questions become items: on the grid, with the margin and in the order that the model is going to see.

    Without a processor (a start that is not here) as the published models were trained.
    """
    if processor is None:
        return BuildOptions(no_box="direct", free_choice=data.free_choice)
    options = BuildOptions(no_box="direct", **processor_settings(processor))
    return replace(options, free_choice=data.free_choice or processor.free_choice)


def check_share(broken: int, seen: int, what: str, most: float, first: str) -> None:
    """Stop where more than a share `most` of what was seen is broken, or all of it."""
    if broken > most * max(seen, EARLY) or broken == seen:
        raise RelookError(
            f"{broken} of {seen} {what} could not be read, more than data.max_broken allows ({most:g}); "
            f"the first: {first}; mend the set (relook data check says what is wrong with it), or raise data.max_broken"
        )
