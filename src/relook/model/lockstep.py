"""Processes that hold a part of each weight (FSDP, ZeRO): all must gather the same weights equally often.

A layer's weights are gathered when it runs, by all processes at once. Looks break that: a batch with two looks in a row
runs the layers three times, one without runs them once, and a projector that one process needs another does not. So
processes agree on the most looks a conversation has anywhere and run the missing stretches on a column of padding, and
every weight that only some of them use is added, times zero, everywhere. Losses and gradients stay as they
are; but where all processes leave a weight alone, its gradient is zero and not absent (an optimiser's momentum moves
it).

Knows tensors and torch.distributed; not looks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist


def most(depth: int, device: torch.device) -> int:
    """The largest `depth` of all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return depth
    found = torch.tensor(depth, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def held(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Zero, with every parameter that learns in its graph.

    Made before anything else and added to the embeddings, it comes last in the backward pass: gradients are then done
    in the same order everywhere, which is the order in which ZeRO puts them side by side.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    return sum((0 * parameter.sum() for parameter in learning), torch.zeros(()))
