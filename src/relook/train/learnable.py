"""What learns, by name: parts of the model as the paper and its configs call them, switched through requires_grad.

A part is a row of `PARTS` or whole dotted pieces of a parameter's name ("language_model.layers.0"). Published names
(`detection_model`, `clip_projector`) are taken for what they are called here. A weight that two parts share (a tied
lm_head and embed_tokens) goes by either name.

Knows names of parameters and what a stage says of its forward pass; not optimisers, not adapters (`lora`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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
ROWS: dict[str, tuple[str, ...]] = {
    "LoRA": ("lora_A", "lora_B"),
    "visual": ("visual",),
    "embed_tokens": ("embed_tokens",),
    "language_model": ("language_model",),
    "lm_head": ("lm_head",),
    "detection_model": ("encoders.detection",),
    "seg_model": ("encoders.seg",),
    "clip_projector": ("projectors.clip",),
    "detection_projector": ("projectors.detection",),
    "seg_projector": ("projectors.seg",),
}

HEADS = "throwaway heads"  # of an objective; they do not ship

# keys of a stage -> fields of the model's config
FORWARD = {
    "passes": "num_inner_forward_run",
    "mask": "para_mask_id",
    "mask_ratio": "para_mask_ratio",
    "mask_draw": "para_mask_draw",
    "input_grads": "input_grads",
    "position_mode": "position_mode",
}


def in_part(parameter: str, part: str) -> bool:
    """Whether a parameter's name holds the part as whole dotted pieces: "model.visual.blocks.0" is in "visual"."""
    return f".{PARTS.get(part, part)}." in f".{parameter}."


def names_of(model: nn.Module) -> Iterator[tuple[nn.Parameter, list[str]]]:
    """Every parameter once, with all its names (two, where weights are tied)."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield from found.values()


def never_used(model: nn.Module) -> set[int]:
    """Ids of parameters that published projectors carry and no forward pass touches; they never learn."""
    unused: set[int] = set()
    for module in model.modules():
        kind = getattr(module, "feature_map", None)
        for layer, idle in (("linear_feature", ("identity", "conv")), ("layernorm_feature", ("identity",))):
            if kind in idle:
                unused |= {id(parameter) for parameter in getattr(module, layer).parameters()}
    return unused


def let_learn(model: nn.Module, freeze: Sequence[str] = (), train: Sequence[str] | None = None) -> None:
    """Let every parameter learn but those of the parts of `freeze`; or, given `train`, those of its parts alone."""
    unused = never_used(model)
    for parameter, names in names_of(model):
        frozen = any(in_part(name, part) for name in names for part in freeze)
        chosen = train is None or any(in_part(name, part) for name in names for part in train)
        parameter.requires_grad_(chosen and not frozen and id(parameter) not in unused)


def check_parts(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Refuse stages that name parts the model does not have.

    Raises:
        UserError: names the part, the nearest there is, and all there are.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = [part for part in PARTS if any(in_part(name, part) for name in names)]
    for stage in stages:
        saved = stage.lora.modules_to_save if stage.lora is not None else []
        for part in [*stage.freeze, *(stage.train or ()), *stage.lr_scale, *saved]:
            if not any(in_part(name, part) for name in names):
                near = difflib.get_close_matches(part, [*known, *PARTS], n=1, cutoff=0.5)
                hint = f" (did you mean {near[0]!r}?)" if near and near[0] in known else ""
                raise UserError(
                    f"Stage {stage.name!r}: the model has no part {part!r}{hint}; parts are {', '.join(known)}, "
                    "or pieces of parameter names such as layers.0"
                )


def set_forward(config: Any, stage: Stage) -> None:
    """Write what a stage says of the forward pass into the model's config; what it leaves open stays as it is."""
    for key, field in FORWARD.items():
        value = getattr(stage, key)
        if value is not None:
            setattr(config, field, value)
    if stage.passes is not None:
        config.alignment = stage.passes == 1


def by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters that learn, all its parameters), by the rows of `ROWS`; tied weights count once.

    Example: `{"visual": (0, 675759104), "embed_tokens": (...), ...}`.
    """
    counts: dict[str, tuple[int, int]] = {}
    for parameter, names in names_of(model):
        row = next((r for r, parts in ROWS.items() if any(in_part(names[0], part) for part in parts)), HEADS)
        learns, total = counts.get(row, (0, 0))
        size = parameter.numel()
        counts[row] = learns + size * parameter.requires_grad, total + size
    return {row: counts[row] for row in [*ROWS, HEADS] if row in counts}
