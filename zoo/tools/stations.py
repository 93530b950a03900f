"""Count the stations of a recipe: calls from one module of relook into another on the way to the last weights.

Printed are the distinct calls (module that calls -> function of another module) in the order in which they are first
made, their number, and the number of distinct pairs of modules.

    python zoo/tools/stations.py                       # of the tree that is imported
    PYTHONPATH=/other/tree/src:/other/tree python zoo/tools/stations.py

A recipe of two stages on a few items is trained as `relook train` does it, in this process (no workers, no validation).
Calls count as long as the caller is a module of `relook.train`; what other packages do among themselves does not, nor
what an import runs. Calls that a library makes in between (the Trainer calls `training_step`) belong to the module of
relook that called the library.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

RECIPE = """
name: stations
model: {start: cards-tiny}
data: {path: items.json}
save_every: 0
stages:
  - {name: one, objective: instruct, steps: 2, batch: 2}
  - {name: two, objective: instruct, steps: 2, batch: 2, freeze: [visual]}
"""
SKIPPED = ("<module>", "<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")
IMPORTED = "frozen importlib"


def caller(frame: FrameType | None) -> str:
    """The nearest module of relook up the stack; "" where an import, or none, stands in between."""
    while frame is not None:
        if IMPORTED in frame.f_code.co_filename:
            return ""
        name = frame.f_globals.get("__name__", "")
        if name.startswith("relook."):
            return name
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def followed(found: dict[tuple[str, str], int]) -> Iterator[None]:
    """Within, edges are added to `found`, with the order in which they were first met."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        code = frame.f_code
        if event != "call" or not name.startswith("relook.") or code.co_name in SKIPPED or name == code.co_name:
            return
        before = caller(frame.f_back)
        if before.startswith("relook.train") and before != name:
            found.setdefault((before, f"{name}:{code.co_qualname}"), len(found))

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def main() -> None:
    from relook.train import run

    found: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Image.new("RGB", (64, 64), "red").save("red.png")
        turns = [("user", "<image>\nWhich color?"), ("assistant", "red")]
        item = {"messages": [{"role": role, "content": text} for role, text in turns], "images": ["red.png"]}
        Path("items.json").write_text(json.dumps([item] * 4))
        Path("recipe.yaml").write_text(RECIPE)
        with contextlib.redirect_stderr(io.StringIO()), followed(found):
            run("recipe.yaml")
        os.chdir("/")
    for before, called in found:
        print(f"{before.removeprefix('relook.'):22} -> {called.removeprefix('relook.')}")
    modules = {(before, called.partition(":")[0]) for before, called in found}
    print(f"{len(found)} calls; {len(modules)} pairs of modules")


if __name__ == "__main__":
    main()
