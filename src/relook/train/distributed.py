"""Several processes that train one model: the main process, decisions that all take alike, and sharded weights.

`torchrun` and `accelerate launch` start a process for each device and say so through its environment; in a single
process nothing here does anything. Whatever ends a run may be seen by one process only; the others wait for it in the
next exchange of gradients, so all agree on it before any leaves. What shards (FSDP2, DeepSpeed's ZeRO) is chosen in
accelerate's configuration (recipes/launch).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import gcd
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from relook.errors import RelookError, UserError
from relook.train.recipe import Recipe

STOPPED_BY = (signal.SIGTERM, signal.SIGINT)  # from a scheduler; Ctrl-C
SHARDED_BY = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0; also before and after they are joined."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return dist.get_rank() if count() > 1 else 0 if alone else int(os.environ.get("RANK", "0"))


def main() -> bool:
    """Whether this is the process that writes and speaks."""
    return number() == 0


def say(text: str) -> None:
    """A line on stderr, once for all processes."""
    if main():
        print(text, file=sys.stderr)


@contextmanager
def joined() -> Iterator[None]:
    """While it lasts, this process is one of those that were started with it, if any were."""
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if ours:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    try:
        yield
        wait()
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The value of every process, in order, for every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The main process's value, for every process."""
    return gather(value)[0]


def mean(value: Tensor) -> Tensor:
    """Mean over all processes of a tensor that is of one shape everywhere."""
    if count() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / count()


def for_all(error: RelookError) -> RelookError:
    """An error of all processes, to raise in each: only the main one says it."""
    error.quiet = not main()
    return error


@contextmanager
def together() -> Iterator[None]:
    """Around what may fail in one process alone: where it does, all of them raise what it raised.

    Inside, processes must not exchange anything: the one that failed would not take part.
    """
    error = None
    try:
        yield
    except RelookError as caught:
        if count() == 1:
            raise
        error = caught
    first = next((one for one in gather(error) if one is not None), None)
    if first is not None:
        raise for_all(first)


def divided(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """A step's `accumulate` batches of `batch`, divided: the batch and the batches per step of each process.

    Whole batches are dealt out as far as they go, then a batch is split: 4 x 8 over 8 processes is 4 x 1 each, over 16
    it is 2 x 1 each, over 3 it cannot be.

    Raises:
        UserError: it does not come out even.
    """
    shares = gcd(accumulate, processes)
    parts = processes // shares  # of each batch
    if batch % parts:
        raise UserError(
            f"a step of {batch} x {accumulate} examples (batch x accumulate) cannot be divided over {processes} "
            f"processes; let accumulate be a multiple of {processes}, or batch of {parts}"
        )
    return batch // parts, accumulate // shares


# -- signals ----------------------------------------------------------------------------------------------------------


class Stopped(RelookError):
    """A run that a signal stopped, saved where it was. `exit_code` is what a shell makes of the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Signals:
    """Within this context a first SIGTERM or Ctrl-C is kept in `seen` and not obeyed; a second one is.

    Dataloader workers inherit it and ignore both: they end with the process that trains. Outside the main thread Python
    allows no handlers.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        self._noted = False  # `seen` may be another process's
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Signals:
        with suppress(ValueError):  # not the main thread
            self._before = {number: signal.signal(number, self._note) for number in STOPPED_BY}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agree(self) -> int | None:
        """The signal that any process has seen, the same for all of them; None while none has."""
        seen = next((one for one in gather(self.seen) if one is not None), None)
        self.seen = self.seen if seen is None else seen  # one may have come meanwhile
        return seen

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self._noted:
            self.__exit__()
            if signal.getsignal(number) is signal.SIG_IGN:  # a script's `command &` has SIGINT ignored: not twice
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(self._process, number)
            return
        self._noted, self.seen = True, number
        name = signal.Signals(number).name
        say(f"{name}: saving and stopping after this step (once more: at once)")


# -- sharding ---------------------------------------------------------------------------------------------------------


def sharded_by() -> str | None:
    """What accelerate is configured to shard with; None for nothing."""
    return next((name for name, key in SHARDED_BY.items() if os.environ.get(key, "").lower() == "true"), None)


def check_sharding(recipe: Recipe) -> None:
    """Raises UserError where a recipe cannot be sharded as accelerate is configured; names what is in the way."""
    refuse_sharding("lora:", any(stage.lora is not None for stage in recipe.stages))
    refuse_sharding("optimizer: muon", any(stage.optimizer == "muon" for stage in recipe.stages))
    refuse_sharding("remember:", any(stage.remember for stage in recipe.stages))
    if sharded_by() == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP 1 is not supported; say fsdp_version: 2, as recipes/launch/fsdp2.yaml does")


def refuse_sharding(what: str, there: bool) -> None:
    """Raises UserError where something that does not go with sharding is there, and accelerate is to shard."""
    if there and sharded_by() is not None:
        raise UserError(f"{sharded_by()} does not go with {what}; train it with recipes/launch/ddp.yaml")


def optimizer_form(trainer: Any) -> str | None:
    """In what form a checkpoint keeps the optimizer; None for the form that any number of processes can read."""
    if trainer.is_fsdp_enabled:
        return "FSDP"
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return f"ZeRO {stage} over {count()} processes"
    return None


def check_optimizer_form(wrote: str | None, now: str | None, place: Path) -> None:
    """Raises UserError where this launch cannot read the optimizer of a checkpoint; names both forms."""
    if wrote != now:
        names = [name or "no sharding" for name in (wrote, now)]
        raise UserError(
            f"{place} was written under {names[0]} and cannot go on under {names[1]}: its optimizer has another form. "
            "Launch it as before, or remove the stage's checkpoints to begin the stage again"
        )


def prepare_zero3(model: Any, trainer: Any) -> None:
    """Let the trainer's accelerator set up ZeRO 3 as `gathering_by_layer` says, where it is used."""
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        prepare = trainer.accelerator.prepare

        def prepared(*what: Any, **how: Any) -> Any:
            with gathering_by_layer(model):
                return prepare(*what, **how)

        trainer.accelerator.prepare = prepared


def forget_sharding() -> None:
    """Reset what accelerate and transformers keep between two trainers: the next stage shards a model of its own."""
    if sharded_by() is not None:
        from accelerate.state import AcceleratorState, GradientState
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
        GradientState._reset_state()


@contextmanager
def gathering_by_layer(model: Any) -> Iterator[None]:
    """While DeepSpeed sets up ZeRO 3 for a model: layers gather their weights when they run, all others once a pass.

    DeepSpeed gathers weights module by module, and insists that all processes run the same modules in the same order.
    The decoder's layers do (`relook.model.segments`); which encoders and projectors run depends on the examples. So
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


def unshard(model: Any) -> None:
    """Make the model whole again, in place, on the CPU of every process (hooks of what sharded it stay).

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
