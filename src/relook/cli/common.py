"""Options, argument parsing and progress display shared by several commands."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from relook.errors import RelookError, UserError

DEFAULT_MODEL = "receipts-tiny"
MODEL_HELP = "A shipped model, a folder, or a hub id."

SERVED_HELP = f"{MODEL_HELP[:-1]} (default: {DEFAULT_MODEL}); with --base-url: its id there."

Model = Annotated[str | None, Option("--model", "-m", metavar="NAME", help=SERVED_HELP)]
BaseUrl = Annotated[
    str | None,
    Option(metavar="URL", help="Ask a model behind this OpenAI-compatible endpoint (key: RELOOK_API_KEY)."),
]
Processor = Annotated[
    str | None,
    Option(metavar="NAME", help="With --base-url: the relook model that the server's was exported from."),
]
Dialect = Annotated[
    str | None,
    Option(metavar="NAME", help="With --base-url: how its model looks: tokens, relook, qwen3-vl or qwen2.5-vl."),
]
ModelArgument = Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)]
Device = Annotated[str | None, Option(metavar="DEVICE", help="cpu, cuda, ...; default: the fastest available.")]
Dtype = Annotated[str | None, Option(metavar="DTYPE", help="float32, bfloat16 or float16.")]
AsJson = Annotated[bool, Option("--json", help="Print as JSON.")]
ResultsAsJson = Annotated[bool, Option("--json", help="Print the results as JSON.")]

LIST_OPTIONS = ("--tasks", "--looks", "--images", "--columns")


class ListOptions(TyperCommand):
    """A command whose list options take several values: `--tasks a b c` equals `--tasks a --tasks b --tasks c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_list_options(args))


def repeat_list_options(args: list[str]) -> list[str]:
    """Repeat a list option before each of its values.

    >>> repeat_list_options(["--tasks", "cards", "receipts", "--json"])
    ['--tasks', 'cards', '--tasks', 'receipts', '--json']
    """
    out: list[str] = []
    option = None  # the list option that the next values belong to
    has_value = False
    for arg in [*args, "--"]:
        if not arg.startswith("-"):
            out += [option, arg] if option else [arg]
            has_value = True
            continue
        if option and not has_value:
            out.append(option)  # left without a value, which the parser reports
        option, has_value = (arg if arg in LIST_OPTIONS else None), False
        if option is None:
            out.append(arg)
    return out[:-1]


def open_model(
    name: str | None, base_url: str | None, processor: str | None, dialect: str | None, **loading: Any
) -> Any:
    """The model that the options of a command name, loaded or behind an endpoint."""
    import relook

    given = {key: value for key, value in loading.items() if value is not None}
    if base_url is None:
        for option, value in (("processor", processor), ("dialect", dialect)):
            if value is not None:
                raise UserError(f"--{option} is for --base-url; leave it out")
        return relook.load(name or DEFAULT_MODEL, **given)
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"--base-url {base_url}: expected an address such as http://127.0.0.1:8000/v1")
    return relook.load(base_url, model=name, processor=processor, dialect=dialect, **given)


def print_result(result: Any, as_json: bool, ensure_ascii: bool = True) -> None:
    """Print a result as text, or what its `to_dict` returns as JSON."""
    print(json.dumps(result.to_dict(), indent=2, ensure_ascii=ensure_ascii) if as_json else result)


def show_status(text: str) -> None:
    """Overwrite one status line on stderr; an empty text clears it. Does nothing unless stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@contextmanager
def goes_on(target: Path) -> Iterator[None]:
    """A context whose Ctrl-C says that the same command goes on with what is in `target`."""
    try:
        yield
    except KeyboardInterrupt:
        said = RelookError(f"interrupted; what is done is in {target}, and the same command goes on from there")
        said.exit_code = 130
        raise said from None


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yield `update(task, done, total)`, which draws a bar and the remaining time per task on stderr.

    Nothing is drawn unless stderr is a terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not sys.stderr.isatty()
    bars = Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True, disable=quiet,
                    speed_estimate_period=3600)  # fmt: skip
    tasks: dict[str, Any] = {}

    def update(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total)
        bars.update(tasks[name], completed=done)

    with bars:
        yield update
