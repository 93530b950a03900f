"""What can be known of a recipe before anything is trained or written; a run and a dry run both begin with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn

from relook.errors import UserError
from relook.model.start import StartInfo, describe_start
from relook.plugins import find
from relook.train import distributed
from relook.train.lora import check_lora
from relook.train.metrics import check_reporters
from relook.train.objective import find_objective
from relook.train.optim import PARTS, in_part
from relook.train.recipe import Data, Recipe, Stage


def check(recipe: Recipe) -> StartInfo:
    """Check every stage of a recipe against the model it starts from; returns what is known of that model.

    Raises:
        UserError: an objective or an option that there is none of, a part or a layer that the model does not have, a
            package that is not installed, a step that cannot be divided over the processes, what cannot be sharded.
    """
    check_reporters(recipe.report_to)
    distributed.check_sharding(recipe)
    for stage in recipe.stages:
        distributed.divided(stage.batch, stage.accumulate, distributed.count())
        data = stage.data or recipe.data
        find_objective(stage).check(stage, data.source == "json")
        find_source(data)
    info = describe_start(recipe.model, seed=recipe.seed, domain=recipe.domain)
    model = info.meta_model()
    check_parts(model, recipe.stages)
    for stage in recipe.stages:
        if stage.lora is not None:
            check_lora(model, stage.lora)
    return info


def find_source(data: Data) -> Any:
    """The synthetic dataset of a recipe's data, a function of the seed; None where data are items.

    Raises:
        UserError: there is none of that name.
    """
    if data.source != "world" or not data.world:
        return None
    return find("source", data.world, {}, "data.world", callable)


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
