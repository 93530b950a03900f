"""Questions on a receipt beyond its fields: the price of an item, the number of items, whether it was paid in cash.

`ask(script, spots, random)` chooses a wording for each question that the receipt answers. Printed answers are upper
case; yes and no are "YES" and "NO".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relook.regions import union
from zoo.worlds.base import QA, Box
from zoo.worlds.receipts_text import Part, Script

if TYPE_CHECKING:
    import numpy as np

WORDINGS: dict[str, tuple[str, ...]] = {  # {} is the name of an item as printed
    "price": ("What is the price of {}?", "How much is {}?", "What was charged for {}?"),
    "items": ("How many items are on this receipt?", "How many items were bought?", "What is the number of items?"),
    "cash": ("Was it paid in cash?", "Did the customer pay in cash?"),
}

Spots = dict[Part, list[Box]]  # part of an item or of the payment -> boxes of its printed pieces
Answer = tuple[str, str, tuple[Box, ...]]  # item name in the wording, answer, boxes


def phrases() -> tuple[str, ...]:
    """The question wordings without item names."""
    return tuple(wording.replace(" {}", "") for wordings in WORDINGS.values() for wording in wordings)


def ask(script: Script, spots: Spots, random: np.random.Generator) -> list[QA]:
    """One question each of "price", "items" and "cash", if the receipt has the answer printed whole."""
    found = {
        "price": _price(script, spots, random),
        "items": _items(script, spots),
        "cash": _cash(script, spots),
    }
    qas = []
    for name, answer in found.items():
        if answer is not None:
            item, text, boxes = answer
            wording = WORDINGS[name][int(random.integers(len(WORDINGS[name])))]
            qas.append(QA(wording.format(item), text, boxes, field=name))
    return qas


def _price(script: Script, spots: Spots, random: np.random.Generator) -> Answer | None:
    """The price of a random item with an unambiguous price; the box is that of the amount."""
    items = [n for n in script.prices if ("name", n) in spots and ("amount", n) in spots]
    if not items:
        return None
    chosen = items[int(random.integers(len(items)))]
    name, amount = script.prices[chosen]
    return name, amount, (union(spots["amount", chosen]),)


def _items(script: Script, spots: Spots) -> Answer | None:
    """The number of items; boxes: the printed count if there is one, else one box per item."""
    count = script.answers["items"]
    if ("count", 0) in spots:
        return "", count, (union(spots["count", 0]),)
    if any((part, n) not in spots for n in range(int(count)) for part in ("name", "amount")):
        return None
    parts = ("name", "rest", "amount")
    return "", count, tuple(union([b for p in parts for b in spots.get((p, n), [])]) for n in range(int(count)))


def _cash(script: Script, spots: Spots) -> Answer | None:
    """Whether it was paid in cash; the box is the line with the means of payment."""
    if "cash" not in script.answers or ("method", 0) not in spots or ("payment", 0) not in spots:
        return None
    return "", script.answers["cash"], (union(spots["method", 0] + spots["payment", 0]),)
