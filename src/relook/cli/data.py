"""`relook data`: list sources, find images, build training items, and check, show, count or convert them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from relook.cli.common import AsJson, ListOptions, goes_on, print_result, progress_bars, show_status
from relook.errors import UserError

app = typer.Typer(help="Training items: where they come from, building and checking them.")

# -- sources


@app.command("sources")
def sources(as_json: AsJson = False) -> None:
    """List the published sets and the file formats that can be read, with sizes, licenses and image sets."""
    from relook.data.forms import FORMATS
    from relook.data.published import listing, table

    formats = {row.name: row.what for row in FORMATS.values()}
    print(json.dumps(listing(formats), indent=2) if as_json else table(formats))


@app.command("images")
def images(
    copies: Annotated[
        list[str] | None, Argument(metavar="NAME=FOLDER", help="Copies of image sets to check, such as gqa=/data/gqa.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the eleven image sets with their pages and archives, or check copies of them; exit 1 where one is faulty."""
    from relook.data.images import check_copy
    from relook.data.published import image_rows, image_table, parse_folders

    if not copies:
        print(json.dumps(image_rows(), indent=2) if as_json else image_table())
        return
    checks = [check_copy(name, folder) for name, folder in parse_folders(copies).items()]
    print(json.dumps([vars(each) for each in checks], indent=2) if as_json else "\n".join(map(str, checks)))
    if any(each.faults for each in checks):
        raise typer.Exit(1)


@app.command("remap", cls=ListOptions)
def remap(
    source: Annotated[Path, Argument(metavar="ITEMS", help="Published items, with other people's image paths.")],
    target: Annotated[Path, Argument(metavar="TARGET", help="Where the items with your paths go.")],
    images: Annotated[
        list[str] | None,
        Option(metavar="NAME=FOLDER...", help="Your folders of images; `relook data images` has names."),
    ] = None,
    max_missing: Annotated[
        float, Option(min=0, max=1, metavar="SHARE", help="Share of items that may be left out for a missing image.")
    ] = 0.0,
    missing: Annotated[Path | None, Option(metavar="FILE", help="Write every missing path here, by dataset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the image paths of published items with yours, found by dataset and file name."""
    from relook.data.published import parse_folders
    from relook.data.remap import remap as remap_file

    report = remap_file(source, target, parse_folders(images or []), max_missing=max_missing, missing_list=missing)
    print(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}\nwritten: {target}")


# -- building

ForModel = Annotated[
    str | None,
    Option("--for", metavar="MODEL", help="The model that is to learn, or its recipe: how items are built for it."),
]
Images = Annotated[
    list[str] | None, Option(metavar="NAME=FOLDER...", help="Your folders of images, to find published paths in.")
]
ImageRoot = Annotated[Path | None, Option(metavar="FOLDER", help="Folder of the images; default: that of SOURCE.")]
FormatName = Annotated[str | None, Option(metavar="FORM", help="Form of the file; detected by default.")]
Split = Annotated[str | None, Option(metavar="NAME", help="Split of a dataset; default: train.")]
Columns = Annotated[
    list[str] | None,
    Option(metavar="OURS=THEIRS...", help="Names of columns, keys or attributes, such as question=prompt label=type."),
]
Ask = Annotated[
    str | None, Option(metavar="TEXT", help="Question about an annotated region: 'What is the {label}?' by default.")
]
Units = Annotated[
    str | None,
    Option(
        metavar="DIALECT",
        help="How boxes are counted: pixels, 0-1, 0-1000, percent, ...; with xywh, cxcywh or yxyx where they are not "
        "x1, y1, x2, y2 (docs/data.md).",
    ),
]
Paper = Annotated[
    str | None,
    Option(
        metavar="LOOK",
        help="SOURCE and TARGET are folders: build the paper's evaluation splits, with LOOK "
        "(clip, detection, seg) for those that re-encode.",
    ),
]


@app.command("build", cls=ListOptions)
def build(
    ctx: typer.Context,
    source: Annotated[
        str, Argument(metavar="SOURCE", help="A file, a dataset or a published set (`relook data sources`).")
    ],
    target: Annotated[Path, Argument(metavar="TARGET", help="Where the items go: .json (an array) or .jsonl.")],
    look: Annotated[
        str, Option(metavar="LOOK", help="region, clip, detection, seg, none (direct), or shares: region=0.6,clip=0.4.")
    ] = "region",
    model: ForModel = None,
    grid: Annotated[int | None, Option(metavar="N", help="Cells per side; default: 8.")] = None,
    margin: Annotated[int | None, Option(metavar="N", help="Cells by which crops are widened; default: 0.")] = None,
    free_choice: Annotated[bool | None, Option(help="Leave out the sentence that asks for the look.")] = None,
    answer_prefix: Annotated[bool, Option(help="Open answers with 'Now answer the question.'.")] = False,
    question_first: Annotated[bool | None, Option(help="Question before image, as in tiny models' training.")] = None,
    align: Annotated[bool, Option(help="Alignment pairs: the re-encoded view alone, then the answer.")] = False,
    boxes: Annotated[
        str, Option(metavar="RULE", help="each box a region, their union one, or merge those that overlap.")
    ] = "each",
    outside: Annotated[
        str, Option(metavar="RULE", help="A box that is empty or outside the image: drop, or clamp to its edge.")
    ] = "drop",
    no_box: Annotated[
        str, Option(metavar="RULE", help="A question without a box: skip, direct, error, clip, detection or seg.")
    ] = "skip",
    whole: Annotated[
        float | None, Option(metavar="SHARE", help="Answer directly where a box covers this share of the image.")
    ] = None,
    max_looks: Annotated[
        int | None, Option(metavar="N", help="Region looks that lead to a box, each in the view before it; default: 1.")
    ] = None,
    seed: Annotated[int, Option(metavar="N", help="Seed of shares and of the split.")] = 0,
    val: Annotated[
        float, Option(metavar="SHARE", help="Share of the images whose items go to TARGET's .val file.")
    ] = 0.0,
    images: Images = None,
    image_root: ImageRoot = None,
    format: FormatName = None,
    split: Split = None,
    columns: Columns = None,
    ask: Ask = None,
    units: Units = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="Stop after this many items.")] = None,
    paper: Paper = None,
) -> None:
    """Build items in the published format from any source: boxes become region turns, shares or rules other looks."""
    from relook.data import build as build_file
    from relook.data import build_splits
    from relook.data.published import parse_folders
    from relook.data.settings import SETTINGS

    options = {name: value for name, value in ctx.params.items() if name not in ("source", "target", "paper")}
    options = {name: value for name, value in options.items() if value is not None or name not in SETTINGS}
    options |= {"images": parse_folders(images or []), "columns": _pairs(columns)}
    if paper is not None:
        options = {name: value for name, value in options.items() if name != "model" or value is not None}
        usual = {parameter.name: parameter.default for parameter in ctx.command.params} | {"columns": {}}
        fixed = ("look", "align", "outside", "val", "format", "split", "columns", "ask", "units")
        if given := [f"--{name}" for name in fixed if options.pop(name) != usual[name]]:
            raise UserError(f"{', '.join(given)} beside --paper, which says itself how splits are made; leave one out")
        print(build_splits(source, target, action=paper, **options))
    else:
        print(build_file(source, target, **options))
    print(f"written: {target}")


@app.command("locate", cls=ListOptions)
def locate(
    questions: Annotated[Path, Argument(metavar="QUESTIONS", help="Questions and answers, with or without boxes.")],
    target: Annotated[
        Path, Argument(metavar="TARGET", help="Where a line goes for each (JSON lines); a rerun continues.")
    ],
    by: Annotated[
        str, Option(metavar="NAME", help="ocr, or the folder of a detector (OWLv2, Grounding DINO) for photos.")
    ] = "ocr",
    threshold: Annotated[float, Option(min=0, max=1, metavar="SCORE", help="Least score of a detection.")] = 0.3,
    image_root: ImageRoot = None,
    format: FormatName = None,
    split: Split = None,
    columns: Columns = None,
    ask: Ask = None,
    units: Units = None,
    as_json: AsJson = False,
) -> None:
    """Find where answers stand, for questions without boxes: words of documents by OCR, objects by a detector.

    Boxes that are there stay. An answer at several equally good places is listed, and no box is chosen.
    """
    from relook.data.locate import locate as find

    with goes_on(target), progress_bars() as progress:
        report = find(questions, target, by, threshold=threshold, progress=progress, image_root=image_root,
                      format=format, split=split, columns=_pairs(columns), ask=ask, units=units)  # fmt: skip
    print_result(report, as_json)
    if not as_json:
        print(f"written: {target}")


# -- items

Items = Annotated[Path, Argument(metavar="ITEMS", help="Items: a JSON array, JSON lines, or Parquet.")]
Grid = Annotated[
    int | None, Option(min=1, metavar="N", help="Cells per side; default: as the items were built, else 8.")
]
Root = Annotated[
    Path | None,
    Option(metavar="FOLDER", help="Folder of the images, which no path may leave; default: that of ITEMS."),
]


@app.command("check", cls=ListOptions)
def check(
    items: Items,
    model: ForModel = None,
    grid: Grid = None,
    images: Annotated[bool, Option(help="Decode every image, not only check the items themselves.")] = True,
    image_root: Root = None,
    against: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE", help="Evaluation items or questions whose images must not be in ITEMS; may be repeated."
        ),
    ] = None,
    looks: Annotated[
        list[str] | None, Option(metavar="LOOK...", help="Looks of the model that is to learn; others are a fault.")
    ] = None,
    fix: Annotated[bool, Option("--fix", help="Write a corrected copy; ITEMS itself is never changed.")] = False,
    out: Annotated[
        Path | None, Option(metavar="TARGET", help="Where --fix writes; default: NAME.fixed.json(l) beside ITEMS.")
    ] = None,
    report: Annotated[Path | None, Option(metavar="FILE", help="Also write the report as JSON here.")] = None,
    format: FormatName = None,
    split: Split = None,
    columns: Columns = None,
    ask: Ask = None,
    units: Units = None,
    as_json: AsJson = False,
) -> None:
    """Find faults in items (labels off the grid, wrong crops, bad images, duplicates, ...); exit 1 where there are any.

    With --fix, write a copy in which faults are corrected or their items left out; exit 1 where faults remain in it.
    """
    from relook.data.check import check as check_file
    from relook.io import replacing

    if out is not None and not fix:
        raise UserError(f"--out {out} without --fix: nothing would be written there; add --fix")
    suffix = items.suffix if items.suffix in (".json", ".jsonl") else ".jsonl"
    target = (out or items.with_name(f"{items.stem}.fixed{suffix}")) if fix else None
    found = check_file(items, grid, model=model, images=images, image_root=image_root, against=against or (),
                       looks=looks, fix=target, progress=_count, format=format, split=split, columns=_pairs(columns),
                       ask=ask, units=units)  # fmt: skip
    show_status("")
    if report is not None:
        with replacing(report) as file:
            file.write(json.dumps(found.to_dict(), indent=2) + "\n")
    print_result(found, as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command("preview", cls=ListOptions)
def preview(
    items: Items,
    page: Annotated[Path, Argument(metavar="PAGE.html", help="Where the page goes.")],
    n: Annotated[int, Option("--n", min=1, metavar="N", help="Items to show, sampled from all.")] = 24,
    seed: Annotated[int, Option(metavar="N", help="Seed of the sample.")] = 0,
    grid: Grid = None,
    image_root: Root = None,
    format: FormatName = None,
    split: Split = None,
    columns: Columns = None,
    ask: Ask = None,
    units: Units = None,
) -> None:
    """Write a page of sampled items to look at: image, grid, regions, crops, turns, faults. One file."""
    from relook.data.preview import preview as write

    reading = {"format": format, "split": split, "columns": _pairs(columns), "ask": ask, "units": units}
    print(f"written: {write(items, page, n=n, seed=seed, grid=grid, image_root=image_root, **reading)}")


@app.command("stats", cls=ListOptions)
def stats(
    items: Items,
    grid: Grid = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Also draw it: .png, .svg or .pdf.")] = None,
    format: FormatName = None,
    split: Split = None,
    columns: Columns = None,
    ask: Ask = None,
    units: Units = None,
    as_json: AsJson = False,
) -> None:
    """Count looks, region sizes, cells used (a heat map) and lengths."""
    from relook.data.stats import plot as draw
    from relook.data.stats import stats as count

    found = count(items, grid, _count, format=format, split=split, columns=_pairs(columns), ask=ask, units=units)
    show_status("")
    if plot is not None:
        draw(found, plot)
    print_result(found, as_json)


@app.command("convert", cls=ListOptions)
def convert(
    items: Items,
    target: Annotated[
        Path, Argument(metavar="TARGET", help="Folder of the Parquet files; of questions, a .json or .jsonl file.")
    ],
    image_root: Root = None,
    rows: Annotated[int, Option(min=1, metavar="N", help="Items per file.")] = 50_000,
    format: FormatName = None,
    split: Split = None,
    columns: Columns = None,
    ask: Ask = None,
    units: Units = None,
    to: Annotated[str, Option(metavar="DIALECT", help="How the boxes of written questions are counted.")] = "pixels",
) -> None:
    """Write items as Parquet files, which load faster; a rerun continues an interrupted conversion.

    Questions of any form are written as plain ones, into one file, with their boxes in pixels.
    """
    from relook.data.remap import convert as write
    from relook.data.remap import convert_questions

    reading: dict[str, Any] = {"format": format, "split": split, "columns": _pairs(columns), "ask": ask, "units": units}
    if target.suffix in (".json", ".jsonl"):
        report = convert_questions(items, target, image_root=image_root, to=to, **reading)
        print(str(report).replace(" items", " questions", 1) + f"\nwritten: {target}")
        return
    if any(reading.values()) or to != "pixels":
        raise UserError(f"{target}: items are written as they are; other options are for questions and a .jsonl file")
    done = write(items, target, image_root=image_root, rows=rows, progress=_count)
    show_status("")
    print(f"written: {done}")


def _pairs(columns: list[str] | None) -> dict[str, str]:
    if bad := [text for text in columns or () if "=" not in text]:
        raise UserError(f"--columns {bad[0]!r}: expected OURS=THEIRS, such as question=prompt")
    return dict(text.split("=", 1) for text in columns or ())


def _count(items: int) -> None:
    show_status(f"{items} items")
