"""Writes docs/cli.md from the help of the commands: `python -m relook.cli.reference > docs/cli.md` (or `make docs`).

A test compares the file with this output.
"""

from collections.abc import Iterator
from typing import Any

import typer

WIDTH = 100  # columns of the help texts, whatever the terminal


def reference() -> str:
    """Return docs/cli.md: an introduction and the help of every command."""
    from relook.cli.app import app

    parts = [
        "# Command line",
        "Written by `make docs` from the commands themselves; a test keeps it current. Exit codes: 0 done, 1 the work "
        "failed, 2 the input was wrong (one line: what was found, what to do), 130 interrupted. Results go to stdout, "
        "everything else to stderr.",
    ]
    for path, text in _helps(typer.main.get_command(app), "relook", None):
        parts.append(f"## {path}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _helps(command: Any, name: str, parent: Any) -> Iterator[tuple[str, str]]:
    context = command.context_class(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context.command_path, command.get_help(context).rstrip()
    for sub, child in getattr(command, "commands", {}).items():
        yield from _helps(child, sub, context)


if __name__ == "__main__":
    print(reference(), end="")
