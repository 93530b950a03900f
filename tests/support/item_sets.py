"""Small item files and the examples that the sampler makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from relook.data.items import Item
from relook.train.recipe import Data

LOOKS = ["region", "clip", "none"]


def said(item: Item) -> str:
    return item.messages[-1].content


def numbered(folder: Path, name: str, count: int) -> Path:
    """Items without images whose answers are their names: "a0", "a1", ..."""
    path = folder / f"{name}.jsonl"
    turns = lambda n: [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"{name}{n}"}]  # noqa: E731
    path.write_text("".join(json.dumps({"messages": turns(n)}) + "\n" for n in range(count)))
    return path


def data(**values) -> Data:
    return Data.model_validate(values)


def relative(path: Path) -> str:
    return os.path.relpath(path)
