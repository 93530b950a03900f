"""A published set of items with its image paths replaced by those of one's own files.

Goes through the file item by item. An item with an image that was not found is left out and counted by dataset; above a
set share of such items nothing is written at all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook.data.images import ImageFinder, dataset_of
from relook.data.items import Item, read_items, split_ref, write_items
from relook.errors import UserError
from relook.io import replacing
from relook.regions import join_crop_suffix

UNKNOWN = "(no known set)"


@dataclass
class RemapReport:
    """What was found: items, items left out, and by dataset the distinct images asked for and those missing."""

    items: int = 0
    left_out: int = 0
    estimated: int = 0  # items kept whose crops were cut for an estimated size (see `viscot`)
    asked: dict[str, set[str]] = field(default_factory=dict)
    missing: dict[str, set[str]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the items that have an image missing."""
        return self.left_out / self.items if self.items else 0.0

    def to_dict(self) -> dict[str, Any]:
        counts = {name: [len(paths), len(self.missing.get(name, ()))] for name, paths in self.asked.items()}
        rows = {name: {"images": asked, "missing": missing} for name, (asked, missing) in sorted(counts.items())}
        return {"items": self.items, "left_out": self.left_out, "estimated": self.estimated, "datasets": rows}

    def __str__(self) -> str:
        lines = [f"{self.items} items, {self.left_out} left out for a missing image"]
        for name, asked in sorted(self.asked.items()):
            missing = sorted(self.missing.get(name, ()))
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
        folders: image folders by dataset (`images.parse_folders`).
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
            _write_list(missing_list, report)
        if report.share > max_missing or report.left_out == report.items:
            raise UserError(_refusal(report, max_missing, folders))

    write_items(dst, mapped())
    return report


def _moved(item: Item, finder: ImageFinder, target: Path, report: RemapReport) -> Item | None:
    """The item with its own paths, or None where one is missing; all of its paths are looked for and counted."""
    whole, images = True, {}
    for key, refs in item.images.items():
        own = []
        for ref in refs:
            path, box = split_ref(str(ref))
            found = finder.find(path)
            name = dataset_of(path, tuple(finder.folders)) or UNKNOWN
            report.asked.setdefault(name, set()).add(path)
            if found is None:
                report.missing.setdefault(name, set()).add(path)
                whole = False
                continue
            file = relative(found, target)
            own.append(file if box is None else join_crop_suffix(file, box))
        images[key] = tuple(own)
    return replace(item, images=images) if whole else None


def relative(path: str, folder: Path) -> str:
    """A path from here as one from `folder`, with "/" on every system."""
    return Path(os.path.relpath(path, folder)).as_posix()


def _write_list(path: str | Path, report: RemapReport) -> None:
    with replacing(path) as file:
        for name in sorted(report.missing):
            file.writelines(f"{name}\t{each}\n" for each in sorted(report.missing[name]))


def _refusal(report: RemapReport, allowed: float, folders: Mapping[str, Path]) -> str:
    if not report.items:
        return "the source holds no items; nothing was written"
    rows = Counter({name: len(paths) for name, paths in report.missing.items()})
    parts = ", ".join(
        f"{name} {count} of {len(report.asked[name])}{'' if name in folders else ' (no folder given)'}"
        for name, count in rows.most_common()
    )
    return (
        f"{report.left_out} of {report.items} items have an image missing ({report.share:.1%}, allowed {allowed:.1%}): "
        f"{parts}; give the folders with --images, or allow more with --max-missing; nothing was written"
    )
