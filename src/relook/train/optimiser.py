"""Who learns how fast: optimisers and schedules by name, built from a recipe's stage.

Muon takes the matrices inside the layers of the two transformers and leaves the rest (embeddings, heads, projectors,
norms, biases) to AdamW; on the vision tower of receipts-tiny it reads as much after 200 s as AdamW after 400 s
(docs/log.md). Knows parameters and their names; not objectives, not files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from relook.errors import UserError
from relook.train.learnable import in_part
from relook.train.recipe import Stage

LAYERS = (".blocks.", ".layers.")  # of the vision tower and of the language model


class Together(torch.optim.Optimizer):
    """Several optimisers as one: their parameter groups in one list (the very dicts, so a schedule reaches them)."""

    def __init__(self, parts: Iterable[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([p for part in self.parts for g in part.param_groups for p in g["params"]], {"lr": 0.0})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimiser(named: Iterable[tuple[str, nn.Parameter]], stage: Stage) -> torch.optim.Optimizer:
    """The stage's optimiser over the parameters that learn: decay on matrices only, `lr_scale` by part.

    A parameter that comes under two names (tied weights) goes by either.

    Raises:
        UserError: nothing learns.
    """
    matrices: dict[tuple[float, float], list[nn.Parameter]] = {}
    rest: dict[tuple[float, float], list[nn.Parameter]] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named:
        names.setdefault(parameter, []).append(name)
    for parameter, called in names.items():
        if parameter.requires_grad:
            factor = next((f for part, f in stage.lr_scale.items() if any(in_part(n, part) for n in called)), 1.0)
            decay = stage.weight_decay if parameter.ndim > 1 else 0.0
            inner = stage.optimiser == "muon" and parameter.ndim == 2 and any(part in called[0] for part in LAYERS)
            (matrices if inner else rest).setdefault((factor, decay), []).append(parameter)
    parts: list[torch.optim.Optimizer] = []
    slow = stage.lr if stage.optimiser == "adamw" else stage.lr_rest or stage.lr / 4
    if matrices:  # rates as AdamW's: each update is scaled to the root mean square that AdamW's would have
        parts.append(torch.optim.Muon(_groups(matrices, stage.lr), adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(torch.optim.AdamW(_groups(rest, slow), betas=stage.betas))
    if not parts:
        raise UserError(f"Stage {stage.name!r} freezes everything; nothing would learn.")
    return parts[0] if len(parts) == 1 else Together(parts)


def _groups(found: dict[tuple[float, float], list[nn.Parameter]], lr: float) -> list[dict[str, Any]]:
    return [{"params": p, "lr": lr * factor, "weight_decay": decay} for (factor, decay), p in found.items()]


def schedule(stage: Stage, steps: int) -> Callable[[int], float]:
    """Factor on the learning rate by step: linear warm-up, then as the recipe says.

    Example: "linear_tail" over 100 steps without warm-up gives 1 at step 50, 0.5 near step 87, 0 at step 100.
    """
    warm = int(stage.warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        share = (step - warm) / max(1, steps - warm)
        if stage.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        if stage.schedule == "linear_tail":
            return min(1.0, max(0.0, (1 - share) / 0.25))
        return 1.0

    return factor
