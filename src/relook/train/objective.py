"""What a stage learns: a table of objectives, each an nn.Module around the model that makes its own examples and loss.

An objective has three parts, and nothing else knows what they are: `example(index)` draws one training example (from
the seed and the index alone, so that a run can be repeated and continued), `collate(examples)` batches them, and
`forward(**batch)` returns the loss and what to log. Throwaway heads live in the objective, not in the model.

Objectives know a world, a processor and a model; optimisers and files are `run`'s business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from relook import plugins
from relook.data.dataset import SampledItems
from relook.data.items import Question
from relook.errors import UserError
from relook.io import rng, validate
from relook.model.adapters import Adapter
from relook.train.recipe import Stage, Strict, Validation
from relook.train.skipped import SkippedReport


class Objective(nn.Module, ABC):
    """Base of all objectives: relook's own (`OBJECTIVES`) and those that `plugins` finds.

    Args:
        model: the VPT model that learns.
        processor: its processor (views, tokens, pixels).
        source: the synthetic dataset that examples are drawn from; None when the stage reads items from files.
        stage: the stage of the recipe; `stage.options` must fit the class's `Options`.
        seed: of the examples.
        items: `SampledItems` of a stage whose data source is json; None with a synthetic source.
        held: items of that source that are not taught (see `held_out`).
    """

    converses: ClassVar[bool] = False  # whether the model learns conversations, so that it can be asked as it learns
    accepts_loss_kwargs: ClassVar[bool] = False  # transformers' Trainer: the loss is already a mean over the batch

    class Options(Strict):
        """What a recipe may set under `options:`; subclasses extend it."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        source: Any,
        stage: Stage,
        seed: int,
        items: Any = None,
        held: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.processor, self.source, self.stage, self.seed = processor, source, stage, seed
        self.items, self.held = items, held
        self.options: Any = validate(self.Options, stage.options, f"stage {stage.name}: options")
        self.adapter: Adapter | None = None  # low-rank updates in the model, while a stage with lora: trains
        self.log: dict[str, list[float]] = {}
        sampled = isinstance(items, SampledItems)
        self.skipped = SkippedReport(items.data.max_broken, items.unreadable) if sampled else SkippedReport(0.0)

    @abstractmethod
    def example(self, index: int) -> Any:
        """One training example, a function of the seed, the stage and `index` only."""

    def held_out(self, index: int) -> Any:
        """Example `index` for validation, which no training gets to."""
        raise UserError(f"stage {self.stage.name!r}: {self.stage.objective} holds no examples out for validation")

    def count_held_out(self, plan: Validation) -> int:
        """How many examples there are for validation."""
        return len(self.held)

    def questions(self, plan: Validation) -> Iterator[Question]:
        """Questions for validation, where the recipe names no file of them."""
        return iter(())

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Examples to the keyword arguments of `forward`."""

    @abstractmethod
    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """`{"loss": scalar}`; figures to log go through `note`."""

    def throwaway(self, name: str, make: Callable[[], nn.Module]) -> Any:
        """A head that a stage needs and nobody ships: made afresh, or as an earlier stage of the run left it.

        Heads that start afresh send a trained model noise for a while, so they are handed from stage to stage beside
        the model (`run` keeps them with each stage's weights). One of another shape starts afresh all the same.
        """
        head, kept = make(), self.model.__dict__.setdefault("_throwaway", {})
        before = kept.get(name, {})
        before = before.state_dict() if isinstance(before, nn.Module) else before
        if {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in head.state_dict().items()}:
            head.load_state_dict(before)
        kept[name] = head
        return head

    def random(self, index: int) -> np.random.Generator:
        """The generator of example `index` (apart from the page's own)."""
        return rng(self.seed, self.stage.name, index)

    def note(self, **figures: float) -> None:
        """Remember figures of this batch; `run` logs their means."""
        for key, value in figures.items():
            self.log.setdefault(key, []).append(float(value))

    def figures(self) -> dict[str, float]:
        """Means since the last call (entries that were nan, e.g. no example of a kind, are left out)."""
        means = {k: float(np.nanmean(v)) for k, v in self.log.items() if not np.all(np.isnan(v))}
        self.log = {}
        return means


# relook's own; others are found by entry point (group `relook.objectives`) or dotted path, see `plugins`.
OBJECTIVES: dict[str, str] = {"instruct": "relook.train.instruct:Instruct"}


def make_objective(
    model: Any,
    processor: Any,
    source: Any,
    stage: Stage,
    seed: int,
    items: Any,
    held: Sequence[Any] = (),
) -> Objective:
    """The objective of a stage.

    Raises:
        UserError: no such objective, or options it does not have.
    """
    made = plugins.find("objective", stage.objective, OBJECTIVES, f"stage {stage.name}")
    return made(model, processor, source, stage, seed, items, held)
