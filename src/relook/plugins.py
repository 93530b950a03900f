"""Rows of relook's tables that live elsewhere: named by dotted path, or by entry point of an installed package.

A user's own objective, task, data source or model size is never an edit of relook. It is named where relook's own are:

    objective: mypackage.losses:Contrastive        # a dotted path: module, colon, attribute
    objective: contrastive                         # an entry point of an installed package's pyproject.toml:

    [project.entry-points."relook.objectives"]
    contrastive = "mypackage.losses:Contrastive"

Groups: `relook.objectives`, `relook.tasks`, `relook.sources` (synthetic datasets), `relook.sizes` (docs/extending.md).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from relook.errors import UserError
from relook.io import nearest

# What makes and asks the shipped tiny models is in the checkout's zoo/, not in the wheel: unknown, these names say so.
ZOO = {
    *(
        "cards",
        "receipts",
        "receipts-a4",
        "receipts-lookalikes",
        "receipts-real",
        "cards-tiny",
        "receipts-tiny",
        "assemble",
    ),
    *("dense", "align", "lines", "documents", "read", "locate", "pages"),
}

OF_THE_ZOO = "it belongs to the zoo of a relook checkout, which `make setup` installs"


def find(
    kind: str, name: str, table: Mapping[str, Any], where: str = "", fits: Callable[[Any], bool] = lambda row: True
) -> Any:
    """The row called `name`: of relook's own table, of an installed package, or at a dotted path.

    Args:
        kind: singular of the group: "objective", "task", "source", "size".
        name: a key of `table`, the name of an entry point in the group `relook.<kind>s`, or `module:attribute`.
        table: relook's own rows; one that is text is a dotted path, imported on use.
        where: what asked for it ("stage dense: objective"), for the message.
        fits: whether what was found is of the right kind.

    Raises:
        UserError: no such row; a module or attribute that cannot be imported, or is something else.
    """
    if not isinstance(table.get(name, ""), str):
        return table[name]
    installed = {entry.name: entry.value for entry in entry_points(group=f"relook.{kind}s")}
    path = name if ":" in name else table.get(name) or installed.get(name)
    before = f"{where}: " if where else ""
    if path is None:
        known = [*table, *installed]
        hint = OF_THE_ZOO if name in ZOO else nearest(name, known) if known else "none is installed"
        raise UserError(f"{before}there is no {kind} called {name!r} ({hint}); your own is written module:attribute")
    module, _, attribute = path.partition(":")
    if ":" in name and os.getcwd() not in sys.path:  # a module beside the recipe is found by `relook`, too
        sys.path.append(os.getcwd())
    try:
        row = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        hint = OF_THE_ZOO if name in ZOO else "expected module:attribute"
        raise UserError(f"{before}{kind} {name!r} cannot be imported ({error}); {hint}") from error
    if not fits(row):
        raise UserError(f"{before}{path} is a {type(row).__name__} and no {kind}; see docs/extending.md")
    return row


def names(kind: str, table: Mapping[str, Any]) -> list[str]:
    """All names that `find` takes besides dotted paths, relook's own first."""
    return [*table, *sorted({entry.name for entry in entry_points(group=f"relook.{kind}s")} - set(table))]
