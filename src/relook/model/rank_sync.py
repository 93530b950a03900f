"""Rank synchronisation: equally many forwards on every rank, where ranks hold a part of each weight (FSDP, ZeRO).

A layer's weights are gathered when it runs, by all ranks at once. Looks break that: a batch with two looks a row runs
the layers three times, one without runs them once, and a projector that one rank needs another does not. So ranks agree
on the most calls of a conversation and run the missing segments on a column of padding, and every conditionally used
weight is added, times zero, on all of them. Losses and gradients stay as they are; but the gradient of a weight that no
rank uses is zero instead of None (an optimizer's momentum then moves it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

_SYNCHRONISED: ContextVar[bool] = ContextVar("ranks_synchronised", default=False)


@contextmanager
def synchronised_ranks(enabled: bool = True) -> Iterator[None]:
    """Within, every forward runs an equal number of segments on all ranks."""
    token = _SYNCHRONISED.set(enabled)
    try:
        yield
    finally:
        _SYNCHRONISED.reset(token)


def ranks_synchronised() -> bool:
    """Whether `synchronised_ranks` is in force."""
    return _SYNCHRONISED.get()


def max_over_ranks(depth: int, device: torch.device) -> int:
    """The largest `depth` of all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return depth
    found = torch.tensor(depth, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def zero_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """A scalar zero with every trainable parameter in its graph.

    Computed before anything else and added to the embeddings, it comes last in the backward pass. Gradients are then
    ready in the same order on all ranks, which is the order in which ZeRO lays them out.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return sum((0 * parameter.sum() for parameter in trainable), torch.zeros(()))
