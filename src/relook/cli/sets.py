"""`relook data check`, `preview`, `stats`, `convert`: what is done with items once they are there."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from relook.cli.work import progress

Items = Annotated[Path, Argument(metavar="ITEMS", help="Items: a JSON array, JSON lines, or Parquet.")]
Grid = Annotated[int, Option(min=1, metavar="N", help="Cells per side.")]
Root = Annotated[
    Path | None,
    Option(metavar="FOLDER", help="Folder of the images, which no path may leave; that of ITEMS unless told."),
]
AsJson = Annotated[bool, Option("--json", help="Print as JSON.")]


def check(
    items: Items,
    grid: Grid = 8,
    images: Annotated[bool, Option(help="Decode every image; without, only what the items say is checked.")] = True,
    image_root: Root = None,
    against: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE", help="Evaluation items or questions whose images must not be in ITEMS; may be repeated."
        ),
    ] = None,
    fix: Annotated[bool, Option("--fix", help="Write a mended copy; ITEMS itself is never changed.")] = False,
    out: Annotated[
        Path | None, Option(metavar="TARGET", help="Where --fix writes; NAME.fixed.json(l) beside ITEMS unless told.")
    ] = None,
    report: Annotated[Path | None, Option(metavar="FILE", help="Also write the report as JSON here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find faults in items (labels off the grid, wrong crops, bad images, duplicates, ...); exit 1 where there are any.

    With --fix, faults are mended in a copy, or their items left out of it; exit 1 where some are still in the copy.
    """
    from relook.data.check import check as check_file
    from relook.errors import UserError
    from relook.io import replacing

    if out is not None and not fix:
        raise UserError(f"--out {out} without --fix: nothing would be written there; add --fix")
    target = (out or _fixed(items)) if fix else None
    found = check_file(
        items, grid, images=images, image_root=image_root, against=against or (), fix=target, progress=_count
    )
    progress("")
    told = json.dumps(found.to_dict(), indent=2)
    if report is not None:
        with replacing(report) as file:
            file.write(told + "\n")
    print(told if as_json else found)
    if not found.ok:
        raise typer.Exit(1)


def preview(
    items: Items,
    page: Annotated[Path, Argument(metavar="PAGE.html", help="Where the page goes.")],
    n: Annotated[int, Option("--n", min=1, metavar="N", help="Items to show, drawn from all.")] = 24,
    seed: Annotated[int, Option(metavar="N", help="Of the draw.")] = 0,
    grid: Grid = 8,
    image_root: Root = None,
) -> None:
    """Write a page of sampled items to look at: image, grid, regions, crops, turns, faults. One file."""
    from relook.data.preview import preview as write

    print(f"written: {write(items, page, n=n, seed=seed, grid=grid, image_root=image_root)}")


def stats(
    items: Items,
    grid: Grid = 8,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Also draw it: .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count looks, region sizes, cells used (a heat map) and lengths."""
    from relook.data.stats import plot as draw
    from relook.data.stats import stats as count

    found = count(items, grid, _count)
    progress("")
    if plot is not None:
        draw(found, plot)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def convert(
    items: Items,
    target: Annotated[Path, Argument(metavar="FOLDER", help="Where the Parquet files go.")],
    image_root: Root = None,
    rows: Annotated[int, Option(min=1, metavar="N", help="Items of a file.")] = 50_000,
) -> None:
    """Write items as Parquet files, which load faster; a rerun after a stop goes on where it was."""
    from relook.data.remap import convert as write

    done = write(items, target, image_root=image_root, rows=rows, progress=_count)
    progress("")
    print(f"written: {done}")


def _fixed(items: Path) -> Path:
    suffix = items.suffix if items.suffix in (".json", ".jsonl") else ".jsonl"
    return items.with_name(f"{items.stem}.fixed{suffix}")


def _count(items: int) -> None:
    progress(f"{items} items")
