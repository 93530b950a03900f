"""`relook train`, `evaluate`, `report`, `bench`: the commands that take their time. Progress goes to stderr."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from relook.cli.ask import DEFAULT_MODEL
from relook.errors import UserError

LISTS = ("--tasks", "--looks", "--images")


class ListOptions(TyperCommand):
    """A command whose `--tasks a b c` reads as `--tasks a --tasks b --tasks c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(args: list[str]) -> list[str]:
    """Repeat a list option before each of its values.

    >>> spread(["--tasks", "cards", "receipts", "--json"])
    ['--tasks', 'cards', '--tasks', 'receipts', '--json']
    """
    out: list[str] = []
    current = None  # the list option whose values we are among, None outside
    fresh = False  # it has had no value yet
    for arg in args:
        if arg.startswith("-"):
            out += [current] if current and fresh else []  # a list option without a value: the parser says so
            current, fresh = (arg, True) if arg in LISTS else (None, False)
            out += [] if current else [arg]
        else:
            out += [current, arg] if current else [arg]
            fresh = False
    return out + ([current] if current and fresh else [])


def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE.yaml", help="A recipe; recipes/ holds those of the models.")],
    overrides: Annotated[
        list[str] | None, Argument(metavar="KEY=VALUE", help="Keys to change, such as seed=2 or out=FOLDER.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check data and model; say what learns, tokens, steps, memory and time.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print the dry run as JSON.")] = False,
) -> None:
    """Train a model by a recipe; a rerun goes on where the run was cut. SIGTERM and Ctrl-C save first."""
    from relook.train import ranks, run

    if dry_run:
        _try_out(recipe, overrides or [], as_json)
        return

    done = run(recipe, overrides or [])
    if ranks.main():
        print(f"written: {done}")


def _try_out(recipe: Path, overrides: list[str], as_json: bool) -> None:
    from relook.train.dryrun import dry_run

    found = dry_run(recipe, overrides, progress)
    progress("")
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
    if not found.ok:
        counts = [f"{n} x {kind}" for stage in found.stages if stage.items for kind, n in stage.items.problems.items()]
        raise UserError(f"the data will not do: {', '.join(dict.fromkeys(counts))}; see above, or relook data check")


def evaluate(
    model: Annotated[
        str, Option("--model", "-m", metavar="NAME", help="A shipped model, a folder, or a hub id.")
    ] = DEFAULT_MODEL,
    tasks: Annotated[
        list[str] | None,
        Option(metavar="TASK...", help="cards, receipts, receipts-real, docvqa, gqa, ..., or files of questions."),
    ] = None,
    looks: Annotated[
        list[str] | None,
        Option(
            metavar="LOOK...",
            help="auto, none, region, clip, detection, seg, oracle (annotated), random, blank, clip-unconditioned, ...",
        ),
    ] = None,
    n: Annotated[int | None, Option("--n", "--limit", min=1, metavar="N", help="Questions of each task.")] = None,
    out: Annotated[Path | None, Option(metavar="FOLDER", help="Where results and a record of each answer go.")] = None,
    seed: Annotated[int, Option(metavar="N", help="Of pages drawn, random regions, intervals.")] = 0,
    batch: Annotated[
        str, Option(metavar="N", help="Questions asked side by side; auto: as many as is fastest, by trying.")
    ] = "8",
    dtype: Annotated[str | None, Option(metavar="DTYPE", help="float32, bfloat16 or float16.")] = None,
    engine: Annotated[
        str | None,
        Option(metavar="NAME", help="local, ray (needs relook[ray]), or under torchrun processes; found unless told."),
    ] = None,
    replicas: Annotated[
        int | None, Option(min=1, metavar="N", help="Of the model, with ray; one for each GPU or CPU unless told.")
    ] = None,
    protocol: Annotated[
        str, Option(metavar="NAME", help="default (greedy, all items), or as published: paper, paper-224.")
    ] = "default",
    data: Annotated[
        Path | None, Option(metavar="FOLDER", help="With Visual-CoT's benchmark files, for docvqa, gqa, ...")
    ] = None,
    images: Annotated[
        list[str] | None, Option(metavar="SET=FOLDER...", help="Where the images of a set lie, as `relook data remap`.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure a model: tasks x ways to look, with 95 % intervals."""
    from relook.data.published import parse_folders
    from relook.evaluate import Places
    from relook.evaluate import evaluate as run
    from relook.evaluate.executors import is_main_process

    places = Places(data, parse_folders(images or []))
    with bars() as progress:
        done = run(model, tasks or [], looks or ["auto", "none"], n=n, out=out, seed=seed,
                   batch=_batch(batch), protocol=protocol, places=places, dtype=dtype, engine=engine, replicas=replicas,
                   progress=progress)  # fmt: skip
    if is_main_process():
        print(json.dumps(done.to_dict(), indent=2, ensure_ascii=False) if as_json else done)


def _batch(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch {text}: expected a number from 1 on, or auto")
    return int(text)


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function that draws, on stderr, how much of each task is done and when it will be; in a log it is silent."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not sys.stderr.isatty()
    shown = Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True, disable=quiet,
                     speed_estimate_period=3600)  # fmt: skip
    known: dict[str, Any] = {}

    def progress(name: str, done: int, total: int) -> None:
        if name not in known:
            known[name] = shown.add_task(name, total=total)
        shown.update(known[name], completed=done)

    with shown:
        yield progress


def report(
    sources: Annotated[
        list[Path],
        Argument(metavar="SOURCE...", help="A YAML file of rows (zoo/receipts/arms.yaml), or folders of evaluations."),
    ],
    out: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Where table.md, table.csv, cost.png, fields.png and report.html go."),
    ] = None,
    keep: Annotated[
        Path | None, Option(metavar="FOLDER", help="Also keep the folders' records here, in a small form.")
    ] = None,
    images: Annotated[int, Option(min=0, metavar="N", help="Pictures in report.html, some 50 kB each.")] = 100,
    no_images: Annotated[bool, Option("--no-images", help="No pictures in report.html.")] = False,
    no_page: Annotated[bool, Option("--no-page", help="No report.html.")] = False,
) -> None:
    """Compare evaluations: tables, figures, a page to browse the records; without --out, only print the tables."""
    from relook.evaluate.records import keep_all
    from relook.evaluate.report import collect, table_md, write

    found = collect(sources)
    written = write(found, out, None if no_page else 0 if no_images else images) if out else []
    written += keep_all(found.folders, keep) if keep else []
    print("\n".join(f"written: {path}" for path in written) if written else table_md(found))


def bench(
    repeats: Annotated[int, Option(min=1, metavar="N", help="Rounds; each measures every case once.")] = 7,
    seed: Annotated[int, Option(metavar="N", help="Of the random weights, the image and the intervals.")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure what a look costs, as ratios within one run on this machine (some minutes)."""
    from relook.bench import run

    done = run(repeats, seed, note=progress)
    progress("")
    print(json.dumps(done.to_dict(), indent=2) if as_json else done)


def progress(text: str) -> None:
    """One line on stderr that is written over, where a person is watching; nothing in a log."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
