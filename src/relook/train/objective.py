"""What a stage learns: the interface of objectives, relook's own and those of users.

An objective gives examples and batches, and the module that the Trainer trains: the model itself, or the model with
auxiliary heads around it. It is a row of `OBJECTIVES`, an entry point or a dotted path (`relook.plugins`):

    class Captions(Objective):
        class Options(Objective.Options):          # what a recipe may set under `options:`
            weight: float = 1.0

        def __init__(self, setup):
            super().__init__(setup)
            self.train = Examples(self.example)    # entry i is a function of the seed and i alone

        def example(self, index):
            return self.processor.encode_item(...)

        def collate(self, examples):               # keyword arguments of the model's forward
            return join_rows(examples, self.processor.tokenizer.pad_token_id)
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from relook import plugins
from relook.data.items import Question
from relook.io import rng, validate
from relook.train.recipe import Stage, Strict, Validation

# relook's own; others are found by entry point (group `relook.objectives`) or dotted path, see `plugins`.
OBJECTIVES: dict[str, str] = {"instruct": "relook.train.instruct:Instruct"}


@dataclass(frozen=True)
class Setup:
    """What an objective is made from.

    Attributes:
        stage: of the recipe; `stage.options` must fit the objective's `Options`.
        config, processor: of the model that will learn.
        seed: of the examples.
        source: the synthetic dataset that examples are drawn from; None when the stage reads items from files.
        items: the items of a stage whose data source is json, with those held out for validation; else None.
        validation: of the recipe.
        heads: tensors of auxiliary heads as the stages before left them, by name in the wrapping module.
    """

    stage: Stage
    config: Any
    processor: Any
    seed: int
    source: Any = None
    items: Any = None
    validation: Validation = field(default_factory=lambda: Validation.model_validate({}))
    heads: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Base of all objectives.

    Attributes:
        train: map-style dataset of training examples; its length does not matter. Entry i must depend on the seed, the
            stage and i alone, so that a run can be repeated and resumed.
        eval: the same, of examples for validation; its length does.
        converses: whether the model learns conversations, so that it can be asked questions while it learns.
    """

    class Options(Strict):
        """What a recipe may set under `options:`; subclasses extend it."""

    converses: ClassVar[bool] = False
    train: Any
    eval: Any = ()

    def __init__(self, setup: Setup) -> None:
        self.setup, self.stage, self.seed = setup, setup.stage, setup.seed
        self.config, self.processor, self.source = setup.config, setup.processor, setup.source
        self.options: Any = self.check(setup.stage, setup.items is not None)

    @classmethod
    def check(cls, stage: Stage, from_items: bool) -> Any:
        """The options as a stage sets them; called for every stage before any trains.

        Args:
            from_items: whether the stage's data are items, else pages of a synthetic dataset.

        Raises:
            UserError: an option or data that the objective cannot use.
        """
        return validate(cls.Options, stage.options, f"stage {stage.name}: options")

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        """A batch: keyword arguments of the module's forward, and under "info" what else `metrics` needs."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module that is trained: the model itself, or one around it that returns the same kind of output."""
        return model

    def metrics(self, outputs: Any, batch: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, float]:
        """Figures of a batch to log (floats, or a `Share`); their means are logged, entries that are nan left out."""
        return outputs.get("metrics", {})

    def questions(self) -> Iterator[Question]:
        """Questions for validation, where the recipe names no file of them."""
        return iter(())

    def random(self, index: int) -> np.random.Generator:
        """The generator of example `index`."""
        return rng(self.seed, self.stage.name, index)


class Share(float):
    """A share of `count` cases, by which means over batches weigh it; a plain float weighs 1."""

    count: int

    def __new__(cls, value: float, count: int = 1) -> Share:
        self = super().__new__(cls, value)
        self.count = count
        return self

    @classmethod
    def of(cls, right: Tensor) -> Share:
        """The share of a bool tensor that is true; nan where it has no entries."""
        return cls(right.float().mean().item(), right.numel())


class Examples(torch.utils.data.Dataset):
    """A map-style dataset of the values of a function of the index."""

    def __init__(self, example: Callable[[int], Any], length: int = 0) -> None:
        self.example, self.length = example, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None:  # a scheduler signals every process: only one decides
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return self.example(index)


class AuxiliaryHeads(nn.Module):
    """A model with heads that a stage needs and nobody ships, as one module to train.

    They are handed from stage to stage (heads.safetensors): a head starts as the stages before left it (`saved`, which
    is `Setup.heads`), or new where there was none of its shape.
    """

    def __init__(self, model: nn.Module, saved: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model: Any = model
        self.heads = nn.ModuleDict()
        self._saved = saved

    def add_head(self, name: str, head: nn.Module) -> nn.Module:
        """Register a head, with the weights of an earlier stage where they fit."""
        prefix = f"heads.{name}."
        before = {k.removeprefix(prefix): v for k, v in self._saved.items() if k.startswith(prefix)}
        if {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in head.state_dict().items()}:
            head.load_state_dict(before)
        self.heads[name] = head
        return head

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """For the Trainer: of the model inside."""
        self.model.activation_checkpointing_enable(**kwargs)


def find_objective(stage: Stage) -> type[Objective]:
    """The class of a stage's objective; UserError where there is none of that name, or it cannot be imported."""
    fits = lambda row: isinstance(row, type) and issubclass(row, Objective)  # noqa: E731
    return plugins.find("objective", stage.objective, OBJECTIVES, f"stage {stage.name}", fits)


def learnt_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are learnt: its weight in the loss of a step. Without labels all batches weigh 1."""
    return int((batch["labels"][:, 1:] >= 0).sum()) if "labels" in batch else 1


def run_batch(objective: Objective, module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of a batch that `objective.collate` made."""
    inputs = {key: value for key, value in batch.items() if key != "info"}
    outputs: Any = module(**inputs)
    loss, labels = outputs["loss"], inputs.get("labels")
    if labels is not None and not (labels >= 0).any():  # every sample was skipped; processes stay in step all the same
        loss = 0 * outputs["logits"].sum()
    with torch.no_grad():
        return loss, objective.metrics(outputs, inputs, batch.get("info", {}))
