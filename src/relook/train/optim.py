"""What learns and how fast: the trainable parameters of a stage by name, its optimizer and its schedule.

A part is a row of `PARTS` or whole dotted pieces of a parameter's name ("language_model.layers.0"). Published names
(`detection_model`, `clip_projector`) stand for what they are called here. A weight that two parts share (a tied lm_head
and embed_tokens) goes by either name.

Muon takes the matrices inside the layers of the two transformers and leaves the rest (embeddings, heads, projectors,
norms, biases) to AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from relook.errors import UserError
from relook.train.recipe import Stage

# part -> whole dotted pieces of the names of its parameters
PARTS: dict[str, str] = {
    "visual": "visual",
    "merger": "visual.merger",
    "detection_model": "encoders.detection",
    "seg_model": "encoders.seg",
    "encoders": "encoders",
    "projectors": "projectors",
    "clip_projector": "projectors.clip",
    "detection_projector": "projectors.detection",
    "seg_projector": "projectors.seg",
    "language_model": "language_model",
    "layers": "language_model.layers",
    "embed_tokens": "embed_tokens",
    "lm_head": "lm_head",
}

# The finest parts, in the order of a table; everything of a model is in one of them. LoRA's own weights go first.
ROWS = (
    *("visual", "embed_tokens", "language_model", "lm_head", "detection_model", "seg_model"),
    *("clip_projector", "detection_projector", "seg_projector"),
)
LORA = "LoRA"
HEADS = "auxiliary heads"  # of an objective; they do not ship

LAYERS = (".blocks.", ".layers.")  # of the vision encoder and of the language model


# -- trainable parameters ---------------------------------------------------------------------------------------------


def in_part(parameter: str, part: str) -> bool:
    """Whether a parameter's name holds the part as whole dotted pieces: "model.visual.blocks.0" is in "visual"."""
    return f".{PARTS.get(part, part)}." in f".{parameter}."


def named_once(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all its names (two, where weights are tied)."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    yield from names.items()


def unused_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that published projectors carry and no forward pass touches; they never learn."""
    unused: set[int] = set()
    for module in model.modules():
        kind = getattr(module, "feature_map", None)
        for layer, idle in (("linear_feature", ("identity", "conv")), ("layernorm_feature", ("identity",))):
            if kind in idle:
                unused |= {id(parameter) for parameter in getattr(module, layer).parameters()}
    return unused


def set_trainable(model: nn.Module, freeze: Sequence[str] = (), train: Sequence[str] | None = None) -> None:
    """Make all parameters trainable but those of the parts of `freeze`; or, given `train`, those of its parts alone."""
    unused = unused_parameters(model)
    for parameter, names in named_once(model):
        frozen = any(in_part(name, part) for name in names for part in freeze)
        chosen = train is None or any(in_part(name, part) for name in names for part in train)
        parameter.requires_grad_(chosen and not frozen and id(parameter) not in unused)


def by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters that learn, all its parameters), by the rows of `ROWS`; tied weights count once.

    Example: `{"visual": (0, 675759104), "embed_tokens": (...), ...}`.
    """
    counts: dict[str, tuple[int, int]] = {}
    for parameter, names in named_once(model):
        row = next((row for row in ROWS if in_part(names[0], row)), HEADS)
        row = LORA if in_part(names[0], "lora_A") or in_part(names[0], "lora_B") else row
        learns, total = counts.get(row, (0, 0))
        counts[row] = learns + parameter.numel() * parameter.requires_grad, total + parameter.numel()
    return {row: counts[row] for row in (LORA, *ROWS, HEADS) if row in counts}


# -- optimizer and schedule -------------------------------------------------------------------------------------------


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: their parameter groups in one list (the very dicts, so a schedule reaches them)."""

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


def build_optimizer(model: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """The stage's optimizer over the trainable parameters: decay on matrices only, `lr_scale` by part.

    Raises:
        UserError: nothing learns.
    """
    matrices: dict[tuple[float, float], list[nn.Parameter]] = {}
    rest: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, names in named_once(model):
        if parameter.requires_grad:
            factor = next((f for part, f in stage.lr_scale.items() if any(in_part(n, part) for n in names)), 1.0)
            decay = stage.weight_decay if parameter.ndim > 1 else 0.0
            inner = stage.optimizer == "muon" and parameter.ndim == 2 and any(part in names[0] for part in LAYERS)
            (matrices if inner else rest).setdefault((factor, decay), []).append(parameter)
    parts: list[torch.optim.Optimizer] = []
    slow = stage.lr if stage.optimizer == "adamw" else stage.lr_rest or stage.lr / 4
    if matrices:  # rates as AdamW's: each update is scaled to the root mean square that AdamW's would have
        parts.append(torch.optim.Muon(_groups(matrices, stage.lr), adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(torch.optim.AdamW(_groups(rest, slow), betas=stage.betas))
    if not parts:
        raise UserError(f"Stage {stage.name!r} freezes everything; nothing would learn.")
    return parts[0] if len(parts) == 1 else CombinedOptimizer(parts)


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
