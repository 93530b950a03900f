"""Instruction tuning: next-token loss on whole conversations with looks, read from files of items.

The loss is the language model's on the assistant's tokens. Beside it are logged the share of conversations whose last
assistant turn is right under teacher forcing, and the share of right tokens by class (`TokenClasses`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from relook.data.collate import IGNORED, EncodedDataset, SkippedSample, join_packed, join_rows, pack_up
from relook.data.dataset import SampledItems
from relook.data.items import Question
from relook.errors import UserError
from relook.looks import LOOKS, x_token, y_token
from relook.train.objective import Examples, Objective, Setup
from relook.train.recipe import Stage

CLASSES = ("x0", "y0", "x1", "y1", "start", "end", "action", "text")


class Conversations(Objective):
    """Next-token loss on conversations; a subclass says where they come from.

    An example is what `processor.encode_item` makes, with `kind` (the name under which its figures are logged) and
    `answer_from` (the position of the last assistant turn).
    """

    converses = True
    packed = 0  # tokens of a row that several conversations share; 0: a row each

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.classes = TokenClasses(self.processor.tokens, self.processor.grid_size)

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        left_out = [row for row in examples if isinstance(row, SkippedSample)]
        rows = [row for row in examples if not isinstance(row, SkippedSample)]
        pad, taught = self.processor.tokenizer.pad_token_id, len(rows)
        if not rows:  # nothing to learn: a batch all the same, so that processes stay in step
            rows = [{"input_ids": [pad] * 2, "labels": [IGNORED] * 2, "kind": "items", "answer_from": 0}]
        apart = ("kind", "answer_from", "prompt_ids")
        tensors = [{k: v for k, v in row.items() if k not in apart} for row in rows]
        batch = join_packed(tensors, pad, self.packed) if self.packed else join_rows(tensors, pad)
        starts = [0] * len(batch["input_ids"]) if self.packed else [row["answer_from"] for row in rows]
        info = {"kind": rows[0]["kind"], "answer_from": torch.tensor(starts)}
        return {**batch, "use_cache": False, "info": {**info, "taught": taught, "left_out": pack_up(left_out)}}

    def metrics(self, outputs: Any, batch: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, float]:
        """Share of rows whose last assistant turn is all right, under teacher forcing; and of the turns before it.

        And, for each class of tokens (`TokenClasses`), the share that is right.
        """
        labels, kind = batch["labels"][:, 1:], info["kind"]
        right = (outputs["logits"][:, :-1].argmax(-1) == labels) | (labels < 0)
        figures = self.classes.shares(right, labels)
        columns = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        last = columns >= info["answer_from"].to(labels.device)[:, None]
        said = last & (labels >= 0)
        if not self.packed:  # else a row is several conversations
            figures[kind] = (right | ~last).all(1).float().mean().item()
        figures[f"{kind}_tokens"] = right[said].float().mean().item()
        if kind in ("region", "clip"):
            figures[f"{kind}_call"] = (right | last).all(1).float().mean().item()
        return {**figures, **super().metrics(outputs, batch, info)}


class Instruct(Conversations):
    """Conversations of the stage's files of items (`data.path`, `data.sources`)."""

    class Options(Conversations.Options):
        max_length: int | None = None  # cutoff in tokens: longer items are left out, and named
        group: int = 0  # batches that are made of items alike in length, at a time; 0: items come as they are drawn
        pack: int = 0  # tokens of a row that several conversations share; 0: a row each

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
        items = setup.items if isinstance(setup.items, SampledItems) else SampledItems.of(setup.items, self.seed)
        options = self.options
        self.items, self.packed = items, options.pack
        self.dataset = EncodedDataset(items, self.processor, options.max_length, options.group, self.stage.batch)
        self.train, self.eval = Examples(self.example), Examples(self.held_out, len(items.validation))

    def example(self, index: int) -> dict[str, Any] | SkippedSample:
        """Example `index`, a function of the seed and `index` only; or why it is left out."""
        return _named(self.dataset[index])

    def held_out(self, index: int) -> dict[str, Any] | SkippedSample:
        """Example `index` for validation."""
        return _named(self.dataset.validation[index])

    def questions(self) -> Iterator[Question]:
        """The questions of the items that are held out; those that cannot be read, or ask nothing, are left out."""
        from relook.train.validation import from_item

        for number in range(len(self.items.validation)):
            try:
                question = from_item(self.items.validation[number], self.processor.grid_size)
            except UserError:
                continue
            if question is not None:
                yield question


def _named(row: dict[str, Any] | SkippedSample) -> dict[str, Any] | SkippedSample:
    return row if isinstance(row, SkippedSample) else row | {"kind": "items", "answer_from": 0}


class TokenClasses:
    """Classes of the tokens that an assistant writes, and the share of each that is right.

    A class is a set of control tokens; all else is text. The two columns of a region (`x0`, `x1`) share their tokens,
    as do its two rows: their place in the call tells them apart.

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
