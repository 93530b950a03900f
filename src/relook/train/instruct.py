"""Instruction tuning: next-token loss on whole conversations with looks, read from files of items.

The loss is the language model's on the assistant's tokens. Beside it are logged the share of conversations whose last
assistant turn is right under teacher forcing, and the share of right tokens by class (`TokenClasses`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from relook.data.collate import Collator, EncodedDataset, SkippedSample, pack_up
from relook.data.dataset import SampledItems
from relook.data.items import Question, item_question
from relook.errors import UserError
from relook.looks import LOOKS, x_token, y_token
from relook.train.objective import Examples, Objective, Setup, Share
from relook.train.recipe import Stage

CLASSES = ("x0", "y0", "x1", "y1", "start", "end", "action", "text")


class Conversations(Objective):
    """Next-token loss on conversations; a subclass says where they come from.

    An example is what `processor.encode_item` makes; it may have `kind` (the name under which its figures are logged)
    and `answer_from` (the position of the last assistant turn).
    """

    converses = True
    packed = 0  # tokens of a row that several conversations share; 0: a row each

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.classes = TokenClasses(self.processor.tokens, self.processor.grid_size)

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        rows = [row for row in examples if not isinstance(row, SkippedSample)]
        left_out = [row for row in examples if isinstance(row, SkippedSample)]
        batch = Collator(self.processor, pack=self.packed)(examples)
        starts = [row.get("answer_from", 0) for row in rows]
        if self.packed or not rows:
            starts = [0] * len(batch["input_ids"])
        info = {"kind": rows[0].get("kind", "items") if rows else "items", "answer_from": torch.tensor(starts)}
        return {**batch, "use_cache": False, "info": {**info, "taught": len(rows), "left_out": pack_up(left_out)}}

    def metrics(self, outputs: Any, batch: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, float]:
        """Share of rows whose last assistant turn is all right, under teacher forcing; and of the turns before it.

        And, for each class of tokens (`TokenClasses`), the share that is right.
        """
        labels, kind = batch["labels"][:, 1:], info["kind"]
        right = (outputs["logits"][:, :-1].argmax(-1) == labels) | (labels < 0)
        figures: dict[str, float] = {**self.classes.shares(right, labels)}
        columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        last = columns >= info["answer_from"].to(labels.device)[:, None]
        said = last & (labels >= 0)
        if not self.packed:  # else a row is several conversations
            figures[kind] = Share.of((right | ~last).all(1))
        figures[f"{kind}_tokens"] = Share.of(right[said])
        if kind in ("region", "clip"):
            figures[f"{kind}_call"] = Share.of((right | last).all(1))
        return {**figures, **super().metrics(outputs, batch, info)}


class Instruct(Conversations):
    """Conversations of the stage's files of items (`data.path`, `data.sources`)."""

    class Options(Conversations.Options):
        max_length: int | None = Field(None, gt=0)  # cutoff in tokens: longer items are left out, and named
        group: int = Field(0, ge=0)  # batches made of items alike in length, at a time; 0: items come as they are drawn
        pack: int = Field(0, ge=0)  # tokens of a row that several conversations share; 0: a row each

    @classmethod
    def check(cls, stage: Stage, from_items: bool) -> Any:
        if not from_items:
            raise UserError(
                f"stage {stage.name!r}: instruct learns from items; set data.path (or data.sources). On pages of "
                "a synthetic dataset the objective is called pages"
            )
        return super().check(stage, from_items)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.items = setup.items if isinstance(setup.items, SampledItems) else SampledItems.of(setup.items, self.seed)
        options, self.packed = self.options, self.options.pack
        rows = EncodedDataset(self.items, self.processor, options.max_length, options.group, self.stage.batch)
        self.example = rows.__getitem__
        self.train, self.eval = Examples(self.example), Examples(rows.validation.__getitem__, len(rows.validation))

    def questions(self) -> Iterator[Question]:
        """The questions of the items that are held out; those that cannot be read, or ask nothing, are left out."""
        for number in range(len(self.items.validation)):
            try:
                question = item_question(self.items.validation[number], self.processor.grid_size)
            except UserError:
                continue
            if question is not None:
                yield question


class TokenClasses:
    """Classes of the tokens that an assistant writes (control tokens, text), and the share of each that is right.

    The two columns of a region (`x0`, `x1`) share their tokens, as do its two rows: their place in the call tells them
    apart.

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

    def shares(self, right: Tensor, labels: Tensor) -> dict[str, Share]:
        """`token_<class>` -> share of its tokens that are right; nan for a class without tokens. Both (B, L)."""
        found = self.of(labels)
        return {f"token_{name}": Share.of(right[found == i]) for i, name in enumerate(CLASSES)}
