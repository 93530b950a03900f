"""Synthetic datasets by name. Add one as a module with a class that fits `base.World` and a row here.

Modules are imported on first use.
"""

from __future__ import annotations

import importlib

from relook.errors import UserError
from zoo.worlds.base import QA, Area, Box, Glyph, Page, World

WORLDS: dict[str, tuple[str, str]] = {
    "cards": ("zoo.worlds.cards", "Cards"),
    "receipts": ("zoo.worlds.receipts", "Receipts"),
    "receipts-lookalikes": ("zoo.worlds.receipts", "Lookalikes"),
    "receipts-a4": ("zoo.worlds.receipts", "A4Receipts"),
    "notes": ("zoo.worlds.notes", "Notes"),
}


def world_class(name: str) -> type[World]:
    """Return the class of a synthetic dataset.

    Raises:
        UserError: unknown name.
    """
    if name not in WORLDS:
        raise UserError(f"There is no world called {name!r}; the worlds are {', '.join(sorted(WORLDS))}.")
    module, attribute = WORLDS[name]
    return getattr(importlib.import_module(module), attribute)


def make_world(name: str, seed: int) -> World:
    """Create a synthetic dataset: `make_world("cards", 1).sample(0)`."""
    return world_class(name)(seed)


__all__ = ["QA", "WORLDS", "Area", "Box", "Glyph", "Page", "World", "make_world", "world_class"]
