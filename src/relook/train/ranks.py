"""Processes that train one model together: who writes and speaks, and how all of them come to one decision.

`torchrun` and `accelerate launch` start a process for each device and tell it so through its environment. Alone,
nothing here does anything. Whatever ends a run (a signal, a loss that is no number, a full disk) may be seen by one
process only; the others wait for it in the next exchange of gradients, so it is agreed on before anybody leaves.

Knows torch.distributed; not models, not files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from relook.errors import RelookError, UserError


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0; also before and after they are joined."""
    return dist.get_rank() if count() > 1 else int(os.environ.get("RANK", "0")) * (started() > 1)


def started() -> int:
    """How many processes were started to train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    ours = started() > 1 and not dist.is_initialized()
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


class Elsewhere(RelookError):
    """What ended the work is said by the main process; this one only leaves with it."""

    quiet = True

    def __init__(self, error: RelookError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code


@contextmanager
def together() -> Iterator[None]:
    """Around what may fail in one process alone: where it does, all of them raise what it raised.

    Inside, processes must not exchange anything: the one that failed would not take part.

    Raises:
        RelookError: in the main process the very error; in the others `Elsewhere`.
    """
    if count() == 1:
        yield
        return
    error = None
    try:
        yield
    except RelookError as caught:
        error = caught
    first = next((one for one in gather(error) if one is not None), None)
    if first is not None:
        raise first if main() else Elsewhere(first)


def divided(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """A step's `accumulate` batches of `batch`, divided: the batch and the batches per step of each process.

    Whole batches are dealt out as far as they go; only then a batch is split.

    Example: 4 x 8 over 8 processes is 4 x 1 each, over 16 it is 2 x 1 each, over 3 it cannot be.

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
