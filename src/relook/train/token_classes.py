"""Which kind of token went wrong: the classes of what an assistant writes, and how many of each came out right.

A class is a set of control tokens; all else is text. The two columns of a region (`x0`, `x1`) share their tokens, as do
its two rows: they are told apart by their place in the call. Knows token ids; not what they mean to a model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from relook.looks import LOOKS, x_token, y_token

CLASSES = ("x0", "y0", "x1", "y1", "start", "end", "action", "text")


class TokenClasses:
    """The classes of a vocabulary.

    Args:
        tokens: control token -> id, those the model has (`processor.tokens`).
        grid: cells a side.
    """

    def __init__(self, tokens: Mapping[str, int], grid: int) -> None:
        members = {
            "x0": [x_token(i) for i in range(grid)],
            "y0": [y_token(i) for i in range(grid)],
            "start": [spec.start for spec in LOOKS.values()],
            "end": [spec.end for spec in LOOKS.values()],
            "action": [spec.action for spec in LOOKS.values() if spec.action],
        }
        self._class_of = {tokens[t]: CLASSES.index(name) for name, ts in members.items() for t in ts if t in tokens}

    def of(self, labels: Tensor) -> Tensor:
        """Class of each label, as an index into `CLASSES`; -1 where nothing is learnt. (B, L) to (B, L).

        Example: the labels of a region call <start> <x_1> <y_2> <x_3> <y_4> <end> are start, x0, y0, x1, y1, end.
        """
        table = torch.full((max([*self._class_of, int(labels.max())]) + 1,), CLASSES.index("text"))
        for token, number in self._class_of.items():
            table[token] = number
        found = table.to(labels.device)[labels.clamp(min=0)]
        found[labels < 0] = -1
        for first, second in (("x0", "x1"), ("y0", "y1")):
            mine = found == CLASSES.index(first)
            again = mine.clone()
            again[:, :2] = False
            again[:, 2:] &= mine[:, :-2]  # x y x y: a second of its kind stands two places after the first
            found[again] = CLASSES.index(second)
        return found

    def shares(self, right: Tensor, labels: Tensor) -> dict[str, float]:
        """`token_<class>` -> share of its tokens that are right; nan for a class without tokens. Both (B, L)."""
        found = self.of(labels)
        return {f"token_{name}": right[found == i].float().mean().item() for i, name in enumerate(CLASSES)}
