"""`relook ask`: answer one question about one image, and print each look."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from relook.cli.common import BaseUrl, Device, Dialect, Dtype, Model, Processor, goes_on, open_model, progress_bars
from relook.errors import UserError

if TYPE_CHECKING:
    from relook.trace import Answer, Look


def ask(
    image: Annotated[
        str | None,
        Argument(
            metavar="IMAGE",
            help="An image file (a page of a PDF or TIFF: scan.pdf#page=2), a data URL, or - for stdin.",
        ),
    ] = None,
    question: Annotated[str | None, Argument(metavar="QUESTION", help="What to ask about it.")] = None,
    model: Model = None,
    look: Annotated[
        str, Option(metavar="LOOK", help="auto (the model decides), none, region, clip, detection or seg.")
    ] = "auto",
    region: Annotated[str | None, Option(metavar="X0,Y0,X1,Y1", help="Look at these grid cells (inclusive).")] = None,
    box: Annotated[
        str | None, Option(metavar="X1,Y1,X2,Y2", help="Look at this box, in pixels of the upright image.")
    ] = None,
    max_looks: Annotated[
        int | None,
        Option(min=0, metavar="N", help="At most this many second looks; by default as the model was taught."),
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, metavar="N", help="At most this many tokens per turn.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    base_url: BaseUrl = None,
    processor: Processor = None,
    dialect: Dialect = None,
    fetch: Annotated[bool, Option("--fetch", help="Download IMAGE where it is an http(s) address.")] = False,
    save: Annotated[
        Path | None, Option(metavar="PNG", help="Draw grid, box, crop, map and answer into this PNG.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the whole trace as JSON.")] = False,
    batch: Annotated[
        Path | None, Option(metavar="FILE", help="Ask every question of this file (image, question), in place of one.")
    ] = None,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="With --batch: where a line goes for each answer; a rerun continues.")
    ] = None,
) -> None:
    """Ask a question about an image, or those of a file; print the answer and each look (cells and pixel box).

    Warnings, such as what a small model was trained on, go to stderr.
    """
    # Check everything that needs no model before loading one.
    from relook.options import AskOptions
    from relook.views import open_image

    given = {"look": look, "region": region, "box": box, "max_looks": max_looks, "max_new_tokens": max_new_tokens}
    options = AskOptions.of({name: value for name, value in given.items() if value is not None})
    if (batch is None) != (out is None) or (batch is None) == (image is None) or (image is None) != (question is None):
        raise UserError("give IMAGE and QUESTION, or --batch FILE and --out FILE; see 'relook ask --help'")
    if batch is not None and out is not None:
        if save is not None or as_json:
            raise UserError("--save and --json are for one question; leave them out with --batch")
        vlm = open_model(model, base_url, processor, dialect, device=device, dtype=dtype)
        _ask_file(vlm, batch, out, options.model_dump(exclude_unset=True) | ({"fetch": True} if fetch else {}))
        return
    if image is None or question is None or not question.strip():
        raise UserError("the question is empty; say what to find out about the image, in quotes")
    if save is not None:
        check_writable(save)
    picture = open_image(sys.stdin.buffer if image == "-" else image, fetch)

    vlm = open_model(model, base_url, processor, dialect, device=device, dtype=dtype)
    answer = vlm.ask(picture, question, **options.model_dump(exclude_unset=True))
    if save is not None:
        answer.save(save)
    for warning in answer.warnings:  # a model's name and domain are its author's words: one printable line
        print(f"relook: {printable(' '.join(warning.split()))}", file=sys.stderr)
    print(json.dumps(answer.to_dict(), ensure_ascii=False) if as_json else describe(answer, save))


def _ask_file(vlm: Any, batch: Path, out: Path, options: dict[str, Any]) -> None:
    from relook.perceive.batch import ask_file

    for warning in vlm.warnings:
        print(f"relook: {printable(' '.join(warning.split()))}", file=sys.stderr)
    with goes_on(out), progress_bars() as progress:
        done, failed = ask_file(vlm, batch, out, progress, **options)
    print(f"written: {out}: {done} answers" + (f", {failed} of them errors" if failed else ""))


def describe(answer: "Answer", save: Path | None = None) -> str:
    """Format an answer: its text on the first line, then one line per look and one for the saved picture."""
    lines = [
        answer.text or "(empty answer)",
        *(f"look {i}: {describe_look(each, answer)}" for i, each in enumerate(answer.looks, 1)),
    ]
    if not answer.looks:
        lines.append("no second look")
    if save is not None:
        lines.append(f"saved: {save}")
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Replace control characters, so that generated text cannot move a terminal's cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def describe_look(look: "Look", answer: "Answer") -> str:
    """Format a look with its cells as `--region` takes them, and its box as x1,y1,x2,y2 in pixels.

    For example 'region, cells 2,5,6,6, box 117,800,409,1120 (x1,y1,x2,y2 pixels)'; for cells of a view before it
    'region, cells 0,1,7,3 of the last view, box ...'.
    """
    parts = [look.kind]
    if look.cells is not None:
        parts.append("cells " + ",".join(map(str, look.cells)) + (" of the last view" if answer.nests(look) else ""))
    if look.box is not None:
        parts.append("box " + ",".join(map(str, look.box)) + " (x1,y1,x2,y2 pixels)")
    if look.problem:
        parts.append(f"not taken: {look.problem}")
    return ", ".join(parts)


def check_writable(path: Path) -> None:
    """Raise UserError if a picture cannot be written to `path`, before any time is spent on the answer."""
    from relook.trace import picture_format

    picture_format(path)
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"--save: cannot write {path} ({error.strerror}); choose another place") from None
