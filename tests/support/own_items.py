"""Small items in the published format with generated images: a question, calls of any looks, an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relook.looks import LOOKS, look_turn, parse_calls, write_call


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def conversation(looks: list[str], seed: int = 0, answer: str = "a cat", image: Any = None) -> dict[str, Any]:
    """One item with the given looks and an answer. `image` is a path; an image in memory by default."""
    shown = picture(seed) if image is None else image
    trigger = LOOKS[looks[0]].trigger if looks else ""
    turns = [("user", f"<image>\nWhat is this? {trigger}".strip())]
    images: dict[str, list[Any]] = {spec.item_key: [] for spec in LOOKS.values()}
    images["images"].append(shown)
    for look in looks:
        call = write_call(look, (1, 2, 3, 4)) if look == "region" else write_call(look)
        turns += [("assistant", call), ("user", look_turn(parse_calls(call)))]
        crop = f"{shown}_8,12,32,30" if isinstance(shown, str) else (shown, (8, 12, 32, 30))
        images[LOOKS[look].item_key].append(crop if look == "region" else shown)
    turns.append(("assistant", answer))
    return {"messages": [{"role": r, "content": c} for r, c in turns], **images}


def write_items_of(path: Path, looks: list[str], count: int, answers: tuple[str, ...] = ("a cat", "two dogs")) -> Path:
    """Write a file of `count` items that use `looks` in turn, and their images beside it."""
    items = []
    for number in range(count):
        name = f"{path.stem}-{number}.png"
        picture(number).save(path.parent / name)
        answer = answers[number % len(answers)]
        items.append(conversation([looks[number % len(looks)]], seed=number, answer=answer, image=name))
    path.write_text(json.dumps(items))
    return path
