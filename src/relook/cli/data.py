"""`relook data`: published sets, image paths, and training items from questions with boxes."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from relook.cli import sets
from relook.cli.work import ListOptions

app = typer.Typer(help="Training items: where they come from, building and checking them.")


@app.command("sources")
def sources(as_json: Annotated[bool, Option("--json", help="Print as JSON.")] = False) -> None:
    """List the published sets and the forms of file that can be read, with sizes, licences and image sets."""
    from relook.data.forms import FORMATS
    from relook.data.published import listing, table

    formats = {row.name: row.what for row in FORMATS.values()}
    print(json.dumps(listing(formats), indent=2) if as_json else table(formats))


@app.command("images")
def images(
    copies: Annotated[
        list[str] | None, Argument(metavar="NAME=FOLDER", help="Copies of image sets to check, such as gqa=/data/gqa.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print as JSON.")] = False,
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
    source: Annotated[Path, Argument(metavar="ITEMS", help="Published items, with somebody else's image paths.")],
    target: Annotated[Path, Argument(metavar="TARGET", help="Where the items with your paths go.")],
    images: Annotated[
        list[str] | None,
        Option(metavar="NAME=FOLDER...", help="Your folders of images; `relook data images` has names."),
    ] = None,
    max_missing: Annotated[
        float, Option(min=0, max=1, metavar="SHARE", help="Share of items that may be left out for a missing image.")
    ] = 0.0,
    missing: Annotated[Path | None, Option(metavar="FILE", help="Write every missing path here, by dataset.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Replace the image paths of published items by yours, found by dataset and file name."""
    from relook.data.published import parse_folders
    from relook.data.remap import remap as remap_file

    report = remap_file(source, target, parse_folders(images or []), max_missing=max_missing, missing_list=missing)
    print(json.dumps(report.to_dict(), indent=2) if as_json else f"{report}\nwritten: {target}")


@app.command("build", cls=ListOptions)
def build(
    source: Annotated[
        str, Argument(metavar="SOURCE", help="A file, a dataset or a published set (`relook data sources`).")
    ],
    target: Annotated[Path, Argument(metavar="TARGET", help="Where the items go: .json (an array) or .jsonl.")],
    look: Annotated[
        str,
        Option(metavar="LOOK", help="region, clip, detection, seg, none (direct), or shares: region=0.6,clip=0.4."),
    ] = "region",
    grid: Annotated[int, Option(metavar="N", help="Cells per side.")] = 8,
    margin: Annotated[int, Option(metavar="N", help="Cells by which each crop is widened.")] = 0,
    free_choice: Annotated[bool, Option(help="Leave out the sentence that asks for the look.")] = False,
    answer_prefix: Annotated[bool, Option(help="Open answers with 'Now answer the question.'.")] = False,
    question_first: Annotated[bool, Option(help="Question before image, as the tiny models were trained.")] = False,
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
    seed: Annotated[int, Option(metavar="N", help="Of shares and of the split.")] = 0,
    val: Annotated[
        float, Option(metavar="SHARE", help="Share of the images whose items go to TARGET's .val file.")
    ] = 0.0,
    images: Annotated[
        list[str] | None, Option(metavar="NAME=FOLDER...", help="Your folders of images, to find published paths in.")
    ] = None,
    image_root: Annotated[
        Path | None, Option(metavar="FOLDER", help="Folder of the images; of SOURCE unless told.")
    ] = None,
    format: Annotated[
        str | None, Option(metavar="FORM", help="The form of SOURCE; seen from the file unless told.")
    ] = None,
    split: Annotated[
        str | None, Option(metavar="NAME", help="Split of a dataset of the hub; train unless told.")
    ] = None,
    columns: Annotated[
        list[str] | None, Option(metavar="OURS=THEIRS", help="Columns of a dataset, such as question=prompt.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="Stop after this many items.")] = None,
    paper: Annotated[
        str | None,
        Option(
            metavar="LOOK",
            help="SOURCE and TARGET are folders: build the paper's evaluation splits, with LOOK "
            "(clip, detection, seg) for those that re-encode.",
        ),
    ] = None,
) -> None:
    """Build items in the published format from any source: boxes become region turns, shares or rules other looks."""
    from relook.data.published import parse_folders

    options: dict[str, Any] = {
        "grid": grid, "margin": margin, "free_choice": free_choice, "answer_prefix": answer_prefix,
        "question_first": question_first, "boxes": boxes, "no_box": no_box, "whole": whole, "seed": seed,
        "images": parse_folders(images or []), "image_root": image_root, "limit": limit,
    }  # fmt: skip
    if paper is not None:
        from relook.data.build import build_splits

        told = {"--look": look != "region", "--align": align, "--outside": outside != "drop", "--val": val,
                "--format": format, "--split": split, "--columns": columns}  # fmt: skip
        refuse([name for name, given in told.items() if given], "--paper, which says itself how each split is made")
        print(build_splits(source, target, action=paper, **options))
    else:
        from relook.data.build import build as build_file

        options |= {"look": look, "align": align, "outside": outside, "val": val, "format": format, "split": split}
        print(build_file(source, target, columns=pairs(columns or []), **options))
    print(f"written: {target}")


def refuse(options: list[str], beside: str) -> None:
    """Raise where options were given that would have no effect."""
    from relook.errors import UserError

    if options:
        raise UserError(f"{', '.join(options)} beside {beside}; leave one of the two out")


def pairs(texts: list[str]) -> dict[str, str]:
    """`["question=prompt"]` as {"question": "prompt"}."""
    from relook.errors import UserError

    for text in texts:
        if "=" not in text:
            raise UserError(f"--columns {text!r}: expected OURS=THEIRS, such as question=prompt")
    return {ours: theirs for ours, _, theirs in (text.partition("=") for text in texts)}


app.command("check")(sets.check)
app.command("preview")(sets.preview)
app.command("stats")(sets.stats)
app.command("convert")(sets.convert)
