"""`relook data`: training items from questions with boxes."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

app = typer.Typer(help="Training items: build them from questions with boxes, check them.")


@app.command("build")
def build(
    source: Annotated[
        Path, Argument(metavar="SOURCE", help="JSON (lines) of {image, question, answer, bboxs, width, height}.")
    ],
    target: Annotated[Path, Argument(metavar="TARGET", help="Where the items go: .json (an array) or .jsonl.")],
    look: Annotated[
        str, Option(metavar="LOOK", help="region, clip, detection, seg, or none (direct answers).")
    ] = "region",
    grid: Annotated[int, Option(metavar="N", help="Cells per side.")] = 8,
    margin: Annotated[int, Option(metavar="N", help="Cells by which each crop is widened.")] = 0,
    free_choice: Annotated[bool, Option(help="Leave out the sentence that asks for the look.")] = False,
    answer_prefix: Annotated[bool, Option(help="Open answers with 'Now answer the question.'.")] = False,
    boxes: Annotated[str, Option(metavar="RULE", help="each box a region, or their union one.")] = "each",
    no_box: Annotated[str, Option(metavar="RULE", help="A question without a box: skip, direct or error.")] = "skip",
    image_root: Annotated[
        Path | None, Option(metavar="FOLDER", help="Folder of the images; of SOURCE unless told.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="Stop after this many items.")] = None,
) -> None:
    """Build items in the published format from questions with boxes in pixels."""
    from relook.data.builder import build as build_file

    report = build_file(
        source, target, look=look, grid=grid, margin=margin, free_choice=free_choice, answer_prefix=answer_prefix,
        boxes=boxes, no_box=no_box, image_root=image_root, limit=limit,
    )  # fmt: skip
    print(report)
    print(f"written: {target}")


@app.command("check")
def check(
    items: Annotated[Path, Argument(metavar="ITEMS", help="A JSON or JSON-lines file of items.")],
    grid: Annotated[int, Option(metavar="N", help="Cells per side.")] = 8,
    as_json: Annotated[bool, Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Find faults in items by rule (malformed calls, wrong crops, missing images, ...); exit 1 where there are any."""
    from relook.data.check import check as check_file

    report = check_file(items, grid=grid)
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not report.ok:
        raise typer.Exit(1)
