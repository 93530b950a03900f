"""The command group `relook`, which turns every error into one line on stderr and an exit code."""

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from relook.cli import ask, bench, data, evaluate, models, serve, train
from relook.cli.common import ListOptions
from relook.errors import RelookError

INTERRUPTED = 130  # as shells have it for SIGINT


class _Group(TyperGroup):
    """A command group that reports what a command raises as one line on stderr and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "relook",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        code = self._run(args, prog_name, complete_var, windows_expand_args, extra)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, args: Any, prog_name: Any, complete_var: Any, expand: bool, extra: dict[str, Any]) -> int:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # texts from outside may hold what no encoding has
        try:
            # An Exit comes back as its code, Ctrl-C as 130; a command's own return value is None.
            code = super().main(args, prog_name, complete_var, False, expand, **extra) or 0
            return _say("interrupted", code) if code == INTERRUPTED else code
        except typer.Abort:
            return _say("interrupted", INTERRUPTED)
        except typer.TyperException as error:  # a usage error: unknown option, missing argument, ...
            return _say(_usage_line(error), error.exit_code)
        except RelookError as error:
            return error.exit_code if error.quiet else _say(str(error), error.exit_code)
        except BrokenPipeError:  # `relook ... | head`
            sys.stdout = None  # nothing left to flush at exit
            return 0


def _usage_line(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "relook"
    return f"{error.format_message().rstrip('.')}; see '{command} --help'"


def _say(message: str, code: int) -> int:
    print("relook: " + " ".join(message.split()), file=sys.stderr)
    return code


app = typer.Typer(
    cls=_Group,
    help="Let a vision-language model look again.",
    rich_markup_mode=None,  # plain text: quick to print, and docs/cli.md holds the same
    pretty_exceptions_enable=False,
    add_completion=False,
    invoke_without_command=True,
)
app.command("ask")(ask.ask)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("evaluate", cls=ListOptions)(evaluate.evaluate)
app.command("matter", cls=ListOptions)(evaluate.matter)
app.command("judge")(evaluate.judge)
app.command("report")(evaluate.report)
app.command("serve")(serve.serve)
app.add_typer(bench.app, name="bench")


@app.callback()
def _top(context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from relook import __version__

        print(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The `relook` command."""
    import os

    if not sys.stderr.isatty():  # no progress bars of the hub in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
