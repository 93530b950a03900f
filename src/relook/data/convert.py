"""A set of items as Parquet: one command, which goes on where it was stopped.

The target is a folder of files of the same number of items, `part-00000.parquet` and on, each written aside and then
renamed, so that those that are there are whole; `convert.json` beside them says which source they were made from.
Columns are those of the published JSON; whatever else a record said is kept as JSON text in `extra`. Images stay files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.data.items import IMAGE_KEYS, Item
from relook.data.records import as_json, open_input
from relook.data.stream import EXTRA, NO_PYARROW, Row, mover, read_rows
from relook.errors import RelookError, UserError
from relook.io import replacing

if TYPE_CHECKING:
    import pyarrow

ROWS = 50_000  # items of a file
STATE = "convert.json"
_BATCH = 1000  # items held at a time
_ENDS = 1 << 20  # bytes at either end of the source by which it is known again


@dataclass(frozen=True)
class Converted:
    """What a conversion did: items and files of the whole set, and how many files were there before."""

    target: str
    items: int
    files: int
    before: int

    def __str__(self) -> str:
        kept = f", {self.before} of them there before" if self.before else ""
        return f"{self.target}: {self.items} items in {self.files} files{kept}"


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    image_root: str | Path | None = None,
    rows: int = ROWS,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write the items of `src` into the folder `dst`; a rerun after a stop keeps the files that are done.

    Paths stay as written where `image_root` is given, which they may not leave; otherwise they are rewritten to hold
    from `dst`.

    Raises:
        UserError: no items, a broken one (file and line), pyarrow is missing, or `dst` holds something else: another
            source's files, or files of another number of items.
        RelookError: the disk is full, or a file cannot be written.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(NO_PYARROW) from None
    src, dst = Path(src), Path(dst)
    state = {"source": src.name, "fingerprint": _fingerprint(src), "rows": rows, "moved": image_root is None}
    before, items = _resume(dst, state)
    if items is not None:
        return Converted(str(dst), items, before, before)
    move = mover(src.parent, dst) if image_root is None else _staying(image_root)
    source, files, items = islice(read_rows(src), before * rows, None), before, before * rows
    while written := _write(dst / f"part-{files:05d}.parquet", _dicts(islice(source, rows), move), items, progress):
        files, items = files + 1, items + written
        if written < rows:
            break
    if not files:
        raise UserError(f"{src}: holds no items; build some with `relook data build`")
    with replacing(dst / STATE) as file:
        json.dump(state | {"items": items, "files": files}, file, indent=1)
    return Converted(str(dst), items, files, before)


def _resume(dst: Path, state: dict[str, Any]) -> tuple[int, int | None]:
    """How many whole files there are, and the number of items where all are there; writes the state at the start."""
    place, parts = dst / STATE, sorted(dst.glob("*.parquet")) if dst.is_dir() else []
    if not place.is_file():
        if parts:
            raise UserError(f"{dst}: holds Parquet files of something else; give a new or empty folder")
        with replacing(place) as file:
            json.dump(state, file, indent=1)
        return 0, None
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
        same = all(known.get(key) == value for key, value in state.items())
    except (ValueError, AttributeError):
        same = False
    if not same:
        raise UserError(f"{dst}: was made from another source or with other options; give a new or empty folder")
    wanted = [dst / f"part-{number:05d}.parquet" for number in range(len(parts))]
    if parts != wanted:
        missing = next(path.name for path, seen in zip(wanted, parts, strict=True) if path != seen)
        raise UserError(f"{dst}: {missing} is not there, but later files are; remove the folder and convert again")
    done = known.get("files") == len(parts)
    return len(parts), known["items"] if done else None


def _staying(root: str | Path) -> Callable[[Item], Item]:
    """A function that gives items as they are, and raises for one with an image path that leaves the root."""

    def checked(item: Item) -> Item:
        try:
            item.under(root, strict=True)
        except UserError as error:
            raise UserError(f"{item.where}: {error}") from None
        return item

    return checked


def _dicts(rows: Iterator[Row], move: Callable[[Item], Item]) -> Iterator[dict[str, Any]]:
    for row in rows:
        item = move(Item.from_dict(row.value, row.where))
        known = item.to_dict()
        yield {key: known[key] for key in ("messages", *IMAGE_KEYS)} | {
            EXTRA: as_json(item.extra) if item.extra else None
        }


def _write(path: Path, items: Iterator[dict[str, Any]], start: int, progress: Callable[[int], None] | None) -> int:
    """One file of items, aside first; returns how many, and writes none for none."""
    import pyarrow as arrow
    from pyarrow import parquet

    first = list(islice(items, _BATCH))
    if not first:
        return 0
    aside, count = path.with_name(path.name + ".part"), 0
    try:
        with parquet.ParquetWriter(aside, _schema(), compression="zstd") as writer:
            batch = first
            while batch:
                writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema=_schema()))
                count += len(batch)
                if progress is not None:
                    progress(start + count)
                batch = list(islice(items, _BATCH))
        os.replace(aside, path)
    except (OSError, arrow.ArrowException) as error:
        aside.unlink(missing_ok=True)
        raise RelookError(
            f"{path}: could not be written ({error}); see to the disk and run the command again"
        ) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return count


def _schema() -> pyarrow.Schema:
    import pyarrow as arrow

    turn = arrow.struct([("role", arrow.string()), ("content", arrow.string())])
    lists = [(key, arrow.list_(arrow.string())) for key in IMAGE_KEYS]
    return arrow.schema([("messages", arrow.list_(turn)), *lists, (EXTRA, arrow.string())])


def _fingerprint(path: Path) -> str:
    """Size and a digest of both ends: enough to see that a source is another one, without reading it all."""
    with open_input(path) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(digest_size=16)
        for start in (0, max(size - _ENDS, 0)):
            file.seek(start)
            digest.update(file.read(_ENDS))
    return f"{size}-{digest.hexdigest()}"
