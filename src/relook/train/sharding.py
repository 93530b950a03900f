"""Runs in which every process holds a part of the weights or of the optimiser: FSDP2 and DeepSpeed's ZeRO.

Which of them is accelerate's business (`accelerate launch --config_file`, see recipes/launch); here is what a stage
must be like for it, and how its weights come together again.

Knows models and accelerate's environment; not how either shards.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from relook.errors import UserError
from relook.train.recipe import Recipe

ASKED = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


def asked() -> str | None:
    """What accelerate was told to shard with; None for nothing."""
    return next((name for name, key in ASKED.items() if os.environ.get(key, "").lower() == "true"), None)


def check(recipe: Recipe) -> None:
    """Refuse recipes that cannot be sharded.

    Raises:
        UserError: names what is in the way.
    """
    way = asked()
    if way is None:
        return
    told = {
        "more than one stage": len(recipe.stages) > 1,
        "lora:": any(stage.lora is not None for stage in recipe.stages),
        "optimiser: muon": any(stage.optimiser == "muon" for stage in recipe.stages),
        "remember:": any(stage.remember for stage in recipe.stages),
    }
    for what, there in told.items():
        if there:
            raise UserError(f"{way} does not go with {what}; train it with recipes/launch/ddp.yaml")
    if way == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 is not supported; say fsdp_version: 2, as recipes/launch/fsdp2.yaml does")


def begin(model: Any, trainer: Any) -> None:
    """Have a model run in step with those of the other processes, where they are sharded.

    Raises:
        UserError: the stage has heads beside the model; ZeRO 3.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if model.__dict__.get("_throwaway"):
        raise UserError(f"{asked()} does not go with throwaway heads; train it with recipes/launch/ddp.yaml")
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise UserError(
            "ZeRO 3 lets go of a layer's weights after its first run and cannot run it in stretches, as looks need; "
            "use recipes/launch/fsdp2.yaml, which saves the same memory, or zero2.yaml"
        )
    model.lockstep = True


def end(model: Any) -> None:
    """The model whole again, on the CPU of every process; all of them must take part."""
    model.lockstep = False
    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and hasattr(parameter, "full_tensor"):
                if id(parameter) not in made:
                    with torch.no_grad():
                        made[id(parameter)] = nn.Parameter(parameter.full_tensor().cpu(), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
