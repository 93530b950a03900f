"""Instruction tuning: next-token loss on whole conversations with looks, read from files of items.

The loss is the language model's on the assistant's tokens. Beside it are logged the share of conversations whose last
assistant turn is right under teacher forcing, and the share of right tokens by class (`token_classes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from relook.data.collate import IGNORED, EncodedDataset, SkippedSample, join_packed, join_rows, pack_up
from relook.data.dataset import SampledItems
from relook.data.items import Question
from relook.errors import UserError
from relook.train.objective import Objective
from relook.train.recipe import Validation
from relook.train.token_classes import TokenClasses


class Conversations(Objective):
    """Next-token loss on conversations; where they come from is a subclass's business.

    A row is what `processor.encode_item` makes, with `kind` (the name under which its figures are logged) and
    `answer_from` (the position of the last assistant turn).
    """

    converses = True
    packed = 0  # tokens of a row that several conversations share; 0: a row each

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.classes = TokenClasses(self.processor.tokens, self.processor.grid_size)

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        left_out = [row for row in examples if isinstance(row, SkippedSample)]
        rows = [row for row in examples if not isinstance(row, SkippedSample)]
        pad, taught = self.processor.tokenizer.pad_token_id, len(rows)
        if not rows:  # nothing to learn: a batch all the same, so that steps stay in step
            rows = [{"input_ids": [pad] * 2, "labels": [IGNORED] * 2, "kind": "items", "answer_from": 0}]
        kind = rows[0]["kind"]
        apart = ("kind", "answer_from", "prompt_ids")
        tensors = [{k: v for k, v in row.items() if k not in apart} for row in rows]
        batch = join_packed(tensors, pad, self.packed) if self.packed else join_rows(tensors, pad)
        starts = [0] * len(batch["input_ids"]) if self.packed else [row["answer_from"] for row in rows]
        more = {"kind": kind, "answer_from": torch.tensor(starts)}
        return {**batch, **more, "taught": taught, "left_out": pack_up(left_out)}

    def forward(self, kind, answer_from, taught=0, left_out="", **batch) -> dict[str, Tensor]:  # type: ignore[override]
        if self.training:
            self.skipped.add(taught, left_out)
        out = self.model(**batch, use_cache=False)
        loss = out.loss if (batch["labels"] >= 0).any() else 0 * out.logits.sum()
        self._note_tokens(kind, out.logits, batch["labels"], answer_from)
        return {"loss": loss}

    @torch.no_grad()
    def _note_tokens(self, kind: str, logits: Tensor, labels: Tensor, answer_from: Tensor) -> None:
        """Share of rows whose last assistant turn is all right, under teacher forcing; and of the turns before it.

        And, for each class of tokens (`token_classes`), the share that is right.
        """
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] < 0)
        self.note(**self.classes.shares(right, labels[:, 1:]))
        columns = torch.arange(1, labels.shape[1], device=labels.device)
        last = columns >= answer_from.to(labels.device)[:, None]
        said = last & (labels[:, 1:] >= 0)
        if not self.packed:  # else a row is several conversations
            self.note(**{kind: (right | ~last).all(1).float().mean().item()})
        self.note(**{f"{kind}_tokens": right[said].float().mean().item()})
        if kind in ("region", "clip"):
            self.note(**{f"{kind}_call": (right | last).all(1).float().mean().item()})


class Instruct(Conversations):
    """Conversations of the stage's files of items (`data.path`, `data.sources`)."""

    class Options(Conversations.Options):
        max_length: int | None = None  # cutoff in tokens: longer items are left out, and named
        group: int = 0  # batches that are made of items alike in length, at a time; 0: items come as they are drawn
        pack: int = 0  # tokens of a row that several conversations share; 0: a row each

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.items is None:
            raise UserError(
                f"stage {self.stage.name!r}: instruct learns from items; set data.path (or data.sources). On pages of "
                "a synthetic dataset the objective is called pages"
            )
        if not isinstance(self.items, SampledItems):
            self.items = SampledItems.of(self.items, self.seed)
        self.dataset = EncodedDataset(
            self.items, self.processor, self.options.max_length, self.options.group, self.stage.batch
        )
        self.packed = self.options.pack

    def example(self, index: int) -> dict[str, Any] | SkippedSample:
        return _named(self.dataset[index])

    def held_out(self, index: int) -> dict[str, Any] | SkippedSample:
        return _named(self.dataset.validation[index])

    def questions(self, plan: Validation) -> Iterator[Question]:
        """The questions of the items that are held out; those that cannot be read, or ask nothing, are left out."""
        from relook.train.validation import from_item

        for number in range(len(self.held)):
            try:
                question = from_item(self.held[number], self.processor.grid_size)
            except UserError:
                continue
            if question is not None:
                yield question


def _named(row: dict[str, Any] | SkippedSample) -> dict[str, Any] | SkippedSample:
    return row if isinstance(row, SkippedSample) else row | {"kind": "items", "answer_from": 0}
