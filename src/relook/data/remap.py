"""Sets of items written again: with one's own image paths (`remap`), and as Parquet (`convert`).

Both go through the file item by item. `remap` leaves out and counts items with an image that was not found; above a set
share of them nothing is written. `convert` writes a folder of files of the same number of items, `part-00000.parquet`
and on, and `convert.json`, which says what they were made from, so that a rerun keeps the files that are there. Their
columns are those of the published JSON; the other keys of a record are JSON text in `extra`. Images stay files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from relook.boxes import parse_units, write_box
from relook.data.build import BuildReport, things
from relook.data.faults import Context, refuse
from relook.data.forms import Source
from relook.data.images import ImageFinder, relative, with_file
from relook.data.items import IMAGE_KEYS, Item, Question, read_items, write_items
from relook.data.placing import Placer
from relook.data.published import dataset_of
from relook.data.reader import EXTRA, folder_of, import_pyarrow, open_input, write_records
from relook.data.settings import LOCATED
from relook.errors import RelookError, UserError
from relook.io import replacing, replacing_file

UNKNOWN = "(no known set)"
ROWS = 50_000  # items of a Parquet file
STATE = "convert.json"
_BATCH = 1000  # items held at a time
_ENDS = 1 << 20  # bytes at either end of a source by which it is recognized


@dataclass
class RemapReport:
    """What was found: items, items left out, and by dataset the distinct images asked for and those missing."""

    items: int = 0
    left_out: int = 0
    estimated: int = 0  # items kept whose crops were cut for an estimated size (see `forms.chat`)
    asked: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    missing: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def share(self) -> float:
        """Share of the items that have an image missing."""
        return self.left_out / self.items if self.items else 0.0

    def to_dict(self) -> dict[str, Any]:
        rows = {n: {"images": len(p), "missing": len(self.missing[n])} for n, p in sorted(self.asked.items())}
        return {"items": self.items, "left_out": self.left_out, "estimated": self.estimated, "datasets": rows}

    def __str__(self) -> str:
        lines = [f"{self.items} items, {self.left_out} left out for a missing image"]
        for name, asked in sorted(self.asked.items()):
            missing = sorted(self.missing[name])
            first = f"  first: {missing[0]}" if missing else ""
            lines.append(f"{len(asked):8d} images of {name}, {len(missing)} missing{first}")
        if self.estimated:
            lines.append(
                f"{self.estimated} items have crops for an estimated size; exact: `relook data build --images`"
            )
        return "\n".join(lines)


def remap(
    src: str | Path,
    dst: str | Path,
    folders: Mapping[str, Path],
    *,
    max_missing: float = 0.0,
    missing_list: str | Path | None = None,
) -> RemapReport:
    """Write the items of `src` to `dst` with paths that hold from the folder of `dst`.

    Args:
        folders: image folders by dataset (`published.parse_folders`).
        max_missing: share of the items that may be left out; above it the work stops and nothing is written.
        missing_list: where every missing path goes, a line each: dataset, tab, path. Written also when the work stops.

    Raises:
        UserError: unreadable source, or more missing than allowed; the message counts them by dataset.
    """
    if Path(src).resolve() == Path(dst).resolve():
        raise UserError(f"{dst} is the source itself; give another place for the items")
    report, finder = RemapReport(), ImageFinder(folders)

    def mapped() -> Iterator[Item]:
        for item in read_items(src):
            report.items += 1
            moved = _moved(item, finder, Path(dst).parent, report)
            if moved is None:
                report.left_out += 1
            else:
                report.estimated += "estimated_size" in moved.extra
                yield moved
        if missing_list is not None:
            with replacing(missing_list) as file:
                file.writelines(
                    f"{name}\t{path}\n" for name in sorted(report.missing) for path in sorted(report.missing[name])
                )
        if report.share > max_missing or report.left_out == report.items:
            raise UserError(_refusal(report, max_missing, folders))

    write_items(dst, mapped())
    return report


def _moved(item: Item, finder: ImageFinder, target: Path, report: RemapReport) -> Item | None:
    """The item with its own paths, or None where one is missing; all of its paths are looked for and counted."""
    lost: list[str] = []

    def own(path: str) -> str:
        name, found = dataset_of(path, tuple(finder.folders)) or UNKNOWN, finder.find(path)
        report.asked[name].add(path)
        if found is None:
            report.missing[name].add(path)
            lost.append(path)
        return path if found is None else relative(found, target)

    moved = item.map_images(lambda ref: with_file(ref, own))
    return None if lost else moved


def _refusal(report: RemapReport, allowed: float, folders: Mapping[str, Path]) -> str:
    if not report.items:
        return "the source holds no items; nothing was written"
    parts = ", ".join(
        f"{name} {len(paths)} of {len(report.asked[name])}{'' if name in folders else ' (no folder given)'}"
        for name, paths in sorted(report.missing.items(), key=lambda row: -len(row[1]))
    )
    return (
        f"{report.left_out} of {report.items} items have an image missing ({report.share:.1%}, allowed {allowed:.1%}): "
        f"{parts}; give the folders with --images, or allow more with --max-missing; nothing was written"
    )


def mover(source: Path, target: Path) -> Callable[[Item], Item]:
    """Rewrites the relative image paths of items, given from folder `source`, so that they hold from `target`."""
    start, end = source.resolve(), target.resolve()
    if start == end:
        return lambda item: item

    def moved(file: str) -> str:
        return file if os.path.isabs(file) else os.path.relpath(os.path.join(start, file), end)

    return lambda item: item.map_images(lambda ref: with_file(ref, moved))


# -- questions


def convert_questions(
    src: str | Path,
    dst: str | Path,
    *,
    image_root: str | Path | None = None,
    units: str | None = None,
    to: str = "pixels",
    **reading: Any,
) -> BuildReport:
    """Write the questions of any form as plain ones (`.json`: an array, else JSON lines), with paths as `build` does.

    Args:
        units: dialect of the boxes of `src` (`relook.boxes`), where its form does not say it.
        to: dialect of the boxes of `dst`.
        reading: of `forms.Source`: format, columns, ask, split.

    Raises:
        UserError: as `build`; a record that is an item.
    """
    kind, order = parse_units(to)
    if kind in ("resized", "stored"):
        raise UserError(
            f"boxes are not written as {to}, which depends on the file; give pixels, 0-1, 0-1000 or the like"
        )
    source = Source(src, image_root=image_root, units=units, **reading)
    report = BuildReport(fit=source.fit)
    home = Path(dst).parent if source.form.name == "hub" else folder_of(source.path)
    place = Placer(home, Path(dst), image_root, None, report)

    def lines() -> Iterator[dict[str, Any]]:
        for thing in things(source, Path(dst), report):
            if not isinstance(thing, Question):
                raise UserError(f"{thing.where}: an item, whose boxes stay as they are; convert files of questions")
            question = place(thing)
            if isinstance(question, Question):
                report.items += 1
                yield question_line(question, kind, order)
        report.fit.refuse(src)

    write_records(dst, lines())
    return report


def question_line(question: Question, units: str = "pixels", order: str = "xyxy") -> dict[str, Any]:
    """The JSON object of a question."""
    size, answers = question.size or (1, 1), [*question.answers]
    line = {"image": question.image, "question": question.text, "answer": answers if len(answers) > 1 else answers[0]}
    line |= {} if question.size is None else {"width": size[0], "height": size[1]}
    line |= {} if question.field is None else {"field": question.field}
    boxes = [write_box(box, size, units, order) for box in question.boxes]
    found = {} if question.located is None else {LOCATED: dict(question.located)}
    return line | ({"bboxs": boxes} if boxes else {}) | found


# -- Parquet


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
    import_pyarrow()
    src, dst = Path(src), Path(dst)
    state = {"source": src.name, "fingerprint": _fingerprint(src), "rows": rows, "moved": image_root is None}
    before, items = _resume(dst, state)
    if items is not None:
        return Converted(str(dst), items, before, before)
    move = mover(src.parent, dst) if image_root is None else (lambda item: _inside(item, image_root))
    source, files, items = (move(item) for item in islice(read_items(src), before * rows, None)), before, before * rows
    while written := _write(dst / f"part-{files:05d}.parquet", islice(source, rows), items, progress):
        files, items = files + 1, items + written
        if written < rows:
            break
    if not files:
        raise UserError(f"{src}: holds no items; build some with `relook data build`")
    _save_state(dst, state | {"items": items, "files": files})
    return Converted(str(dst), items, files, before)


def _save_state(dst: Path, state: dict[str, Any]) -> None:
    with replacing(dst / STATE) as file:
        json.dump(state, file, indent=1)


def _resume(dst: Path, state: dict[str, Any]) -> tuple[int, int | None]:
    """How many whole files there are, and the number of items where all are there; writes the state at the start."""
    parts = [path.name for path in sorted(dst.glob("*.parquet"))]
    if not (dst / STATE).is_file():
        if parts:
            raise UserError(f"{dst}: holds Parquet files of something else; give a new or empty folder")
        _save_state(dst, state)
        return 0, None
    try:
        known = dict(json.loads((dst / STATE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        known = {}
    if any(known.get(key) != value for key, value in state.items()):
        raise UserError(f"{dst}: was made from another source or with other options; give a new or empty folder")
    for number, part in enumerate(parts):
        if part != (wanted := f"part-{number:05d}.parquet"):
            raise UserError(f"{dst}: {wanted} is not there, but later files are; remove the folder and convert again")
    return len(parts), known["items"] if known.get("files") == len(parts) else None


def _inside(item: Item, root: str | Path) -> Item:
    """The item as it is; an error where an image path leaves the root."""
    item.under(root, strict=True)
    return item


def _row(item: Item) -> dict[str, Any]:
    refuse(item, Context(), ("half-character",))  # which Parquet cannot hold
    known = item.to_dict()
    extra = json.dumps(item.extra) if item.extra else None
    return {key: known[key] for key in ("messages", *IMAGE_KEYS)} | {EXTRA: extra}


def _write(path: Path, items: Iterator[Item], start: int, progress: Callable[[int], None] | None) -> int:
    """One file of items; returns how many, and writes none for none."""
    arrow, parquet = import_pyarrow()
    turn = arrow.struct([("role", arrow.string()), ("content", arrow.string())])
    lists = [(key, arrow.list_(arrow.string())) for key in IMAGE_KEYS]
    schema = arrow.schema([("messages", arrow.list_(turn)), *lists, (EXTRA, arrow.string())])
    rows, count = map(_row, items), 0
    batch = list(islice(rows, _BATCH))
    if not batch:
        return 0
    try:
        with replacing_file(path) as aside, parquet.ParquetWriter(aside, schema, compression="zstd") as writer:
            while batch:
                writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema=schema))
                count += len(batch)
                if progress is not None:
                    progress(start + count)
                batch = list(islice(rows, _BATCH))
    except (OSError, arrow.ArrowException) as error:
        raise RelookError(
            f"{path}: could not be written ({error}); see to the disk and run the command again"
        ) from error
    return count


def _fingerprint(path: Path) -> str:
    """Size and a digest of both ends: enough to see that a source is another one, without reading it all."""
    with open_input(path) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(digest_size=16)
        for start in (0, max(size - _ENDS, 0)):
            file.seek(start)
            digest.update(file.read(_ENDS))
    return f"{size}-{digest.hexdigest()}"
