"""Training: recipes in, models out. `relook.train.run("recipes/own-data.yaml")` is what `relook train` calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(
    recipe: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Carry out a recipe; see `relook.train.runner.run`. Imports torch only when called."""
    from relook.train.runner import run as carry_out

    return carry_out(recipe, overrides, out, overwrite)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read and check a recipe without running it."""
    from relook.train.recipe import load_recipe as load

    return load(path, overrides)


__all__ = ["load_recipe", "run"]
