"""`relook train`, `relook evaluate`, `relook bench`: the long-running commands."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument
from typer.core import TyperCommand

LISTS = ("--tasks", "--looks")


class ListOptions(TyperCommand):
    """A command whose `--tasks a b c` reads as `--tasks a --tasks b --tasks c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, LISTS))


def spread(args: list[str], lists: tuple[str, ...]) -> list[str]:
    """Repeat a list option before each of its values.

    >>> spread(["--tasks", "cards", "receipts", "--json"], ("--tasks",))
    ['--tasks', 'cards', '--tasks', 'receipts', '--json']
    """
    out: list[str] = []
    current = None  # the list option whose values we are among
    for arg in args:
        if arg.startswith("-"):
            current = arg if arg in lists else None
            out += [] if current else [arg]
        else:
            out += [current, arg] if current else [arg]
    return out


def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE.yaml", help="A recipe (YAML); see recipes/.")],
    overrides: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Keys of the recipe to change.")] = None,
) -> None:
    """Train a model by a recipe."""
    from relook.train import run

    print(run(recipe, overrides or []))


def evaluate() -> None:
    """Measure a model."""


def bench() -> None:
    """Measure."""
