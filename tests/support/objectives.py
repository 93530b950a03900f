"""Objectives of stages, made around a model as a run makes them."""

from __future__ import annotations

from typing import Any

import torch

from relook.train.objective import Objective, Setup, find_objective, run_batch
from relook.train.recipe import Stage, Validation


def objective_of(
    built: tuple[Any, Any], stage: Stage, source: Any = None, seed: int = 5, items: Any = None, **validation: int
) -> Objective:
    """The objective of a stage for a (model, processor)."""
    model, processor = built
    plan = Validation.model_validate(validation)
    return find_objective(stage)(Setup(stage, model.config, processor, seed, source, items, plan))


def loss_of(objective: Objective, module: torch.nn.Module, examples: list[Any]) -> torch.Tensor:
    """The loss of a batch of examples."""
    return run_batch(objective, module, objective.collate(examples))[0]
