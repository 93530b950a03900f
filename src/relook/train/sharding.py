"""Runs in which every process holds a part of the weights or of the optimiser: FSDP2 and DeepSpeed's ZeRO.

Which of them is accelerate's business (`accelerate launch --config_file`, see recipes/launch); here is what a stage
must be like for it, what ZeRO 3 is shown of a model, and how the weights come together again.

Knows models, accelerate's environment, and where DeepSpeed sets its hooks; not how either shards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.errors import UserError
from relook.train import ranks
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


def form(trainer: Any) -> str | None:
    """In what form a checkpoint keeps the optimiser; None for the form that any number of processes can read."""
    if trainer.is_fsdp_enabled:
        return "FSDP"
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return f"ZeRO {stage} over {ranks.count()} processes"
    return None


def check_form(record: dict[str, Any], place: Path, trainer: Any) -> None:
    """Refuse to go on from a checkpoint whose optimiser this launch cannot read.

    Raises:
        UserError: names both.
    """
    if record.get("form") != form(trainer):
        wrote, now = (name or "no sharding" for name in (record.get("form"), form(trainer)))
        raise UserError(
            f"{place} was written under {wrote} and cannot go on under {now}: its optimiser has another form. Launch "
            "it as before, or remove the stage's checkpoints to begin the stage again"
        )


def begin(model: Any, trainer: Any) -> None:
    """Have a model run in step with those of the other processes, where they are sharded.

    Raises:
        UserError: the stage has heads beside the model.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return
    if model.__dict__.get("_throwaway"):
        raise UserError(f"{asked()} does not go with throwaway heads; train it with recipes/launch/ddp.yaml")
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        prepare = trainer.accelerator.prepare

        def prepared(*what: Any, **how: Any) -> Any:
            with gathering_by_layer(model):
                return prepare(*what, **how)

        trainer.accelerator.prepare = prepared


@contextmanager
def gathering_by_layer(model: Any) -> Iterator[None]:
    """While DeepSpeed sets up ZeRO 3 for a model: layers gather their weights when they run, all others once a pass.

    DeepSpeed gathers weights module by module, and insists that all processes run the same modules in the same order.
    The decoder's layers do (`relook.model.rank_sync`); which encoders and projectors run depends on the examples. So
    DeepSpeed is shown no other modules than the layers (it hooks what `children()` gives), and the weights of the
    rest as the model's own ("external parameters"), which are there from the beginning of a pass to its end.
    """
    from deepspeed import zero
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    layers = model.model.language_model.layers
    hook, by_layer = DeepSpeedZeRoOffload.setup_zero_stage3_hooks, {id(p) for p in layers.parameters()}

    def hook_layers(self: Any) -> None:
        for parameter in model.parameters():
            if id(parameter) not in by_layer:
                zero.register_external_parameter(model, parameter)
        model.children = lambda: iter(layers)
        try:
            hook(self)
        finally:
            del model.children

    DeepSpeedZeRoOffload.setup_zero_stage3_hooks = hook_layers
    try:
        yield
    finally:
        DeepSpeedZeRoOffload.setup_zero_stage3_hooks = hook


def end(model: Any) -> None:
    """The model whole again, on the CPU of every process, to be saved (the hooks of what sharded it are still there).

    All processes must take part. All weights become new ones: ZeRO 2 leaves them as views into one buffer.
    """
    from torch.distributed.fsdp import FSDPModule

    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a class made of that mixin and the module's own
            module.__class__ = type(module).__bases__[1]
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_whole(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]


def _whole(parameter: Any) -> torch.Tensor:
    with torch.no_grad():
        if hasattr(parameter, "full_tensor"):  # FSDP's
            return parameter.full_tensor().cpu()
        if hasattr(parameter, "ds_id"):  # ZeRO 3's
            from deepspeed import zero

            with zero.GatheredParameters([parameter]):
                return parameter.detach().cpu().clone()
        return parameter.detach().cpu().clone()
