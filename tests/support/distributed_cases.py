"""Distributed training cases, run as a script under torchrun: `distributed_cases.py FOLDER CASE...`.

Each process trains on its own half of every step's conversations (`ROWS`); rank 0 saves the losses of all steps,
averaged over processes, and the gradients of the first step. `alone` does the same in one process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from relook.model.segments import synchronised_ranks
from relook.train import distributed
from support import ROOT
from support.tiny_model import conversation, stack, tiny_config, tiny_model

LOOKS = ("clip", "detection")
# Per step, the looks of the two conversations of process 0 and of process 1, chosen to be dissimilar.
ROWS = [
    [[("clip", "clip"), ("region",)], [(), ()]],
    [[("clip",), ("clip", "detection", "region")], [("detection",), ()]],
    [[(), ()], [("detection", "clip"), ("clip",)]],
    [[(), ()], [(), ("region",)]],
]
LR = 0.2


def model(masked: int = 0, checkpointing: bool = False, **config: Any) -> Any:
    made = tiny_model(looks=LOOKS, para_mask_id=masked, para_mask_ratio=1.0, **config).train()
    if checkpointing:
        made.activation_checkpointing_enable({"use_reentrant": False})
    return made


def batch(step: int, process: int) -> dict[str, torch.Tensor]:
    config = tiny_config(LOOKS)
    seeds = (10 * step + 2 * process, 10 * step + 2 * process + 1)
    rows = [conversation(looks, seed=s, config=config) for looks, s in zip(ROWS[step][process], seeds, strict=True)]
    return stack(rows)


def alone(**kind: Any) -> dict[str, Any]:
    """Losses of all steps and gradients of the first; a step's loss is the mean over its two batches."""
    made = model(**kind)
    optimizer = torch.optim.SGD(made.parameters(), lr=LR)
    losses, gradients = [], {}
    for step in range(len(ROWS)):
        parts = [made(**batch(step, process), use_cache=False).loss for process in (0, 1)]
        loss = sum(parts) / 2
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {n: p.detach() for n, p in made.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def report(losses: list[torch.Tensor], gradients: dict, weights: dict, out: str) -> None:
    told = torch.stack([loss.detach() for loss in losses])
    dist.all_reduce(told)
    if dist.get_rank() == 0:
        losses = (told / dist.get_world_size()).tolist()
        torch.save({"losses": losses, "gradients": gradients, "weights": weights}, out)


def ddp(out: str, **kind: Any) -> None:
    """DistributedDataParallel around a model without rank synchronization."""
    made = torch.nn.parallel.DistributedDataParallel(model(**kind), find_unused_parameters=True)
    train(made, torch.optim.SGD(made.parameters(), lr=LR), out)


def fsdp(out: str, **kind: Any) -> None:
    """Each decoder layer is its own FSDP unit, gathered anew for each segment; the rest belongs to the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made, mesh = model(**kind), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in made.model.language_model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(made, mesh=mesh)
    train(made, torch.optim.SGD(made.parameters(), lr=LR), out)


def zero(out: str, settings: str, **kind: Any) -> None:
    """DeepSpeed with the `zero_optimization` section of a config in recipes/launch."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for minutes; gloo suffices
    made = model(**kind)
    shipped = json.loads((ROOT / "recipes" / "launch" / settings).read_text())
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # default: 1.0
        "zero_optimization": {k: v for k, v in shipped["zero_optimization"].items() if v != "auto"},
    }
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else nothing is partitioned
    with distributed.gathering_by_layer(made):
        engine, *_ = deepspeed.initialize(
            model=made, optimizer=torch.optim.SGD(made.parameters(), lr=LR), config=config
        )
    losses, gradients = [], {}
    for step in range(len(ROWS)):
        loss = engine(**batch(step, dist.get_rank()), use_cache=False).loss
        engine.backward(loss)
        found = {n: safe_get_full_grad(p) for n, p in made.named_parameters()}
        gradients = gradients or {n: g.clone() for n, g in found.items() if g is not None}
        engine.step()
        losses.append(loss)
    distributed.unshard(made)
    report(losses, gradients, {n: p.detach().clone() for n, p in made.named_parameters()}, out)


def train(made: torch.nn.Module, optimizer: torch.optim.Optimizer, out: str) -> None:
    losses, gradients = [], {}
    for step in range(len(ROWS)):
        loss = made(**batch(step, dist.get_rank()), use_cache=False).loss
        loss.backward()
        gradients = gradients or whole(made)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    bare = getattr(made, "module", made)
    distributed.unshard(bare)
    report(losses, gradients, {n: p.detach().clone() for n, p in bare.named_parameters()}, out)


def whole(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, gathered if sharded."""
    named = {n.removeprefix("module."): p.grad for n, p in made.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in named.items()}


CASES = {
    "ddp": (ddp, {}),
    "fsdp": (fsdp, {}),
    "fsdp-masked": (fsdp, {"masked": 1}),
    "fsdp-checkpointing": (fsdp, {"checkpointing": True}),
    "zero2": (zero, {"settings": "zero2.json"}),
    "zero2-masked": (zero, {"settings": "zero2.json", "masked": 1}),
    "zero3": (zero, {"settings": "zero3.json"}),
    "zero3-masked": (zero, {"settings": "zero3.json", "masked": 1}),
    "zero3-checkpointing": (zero, {"settings": "zero3.json", "checkpointing": True}),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        run, kind = CASES[case]
        with synchronised_ranks(case != "ddp"):
            run(str(folder / f"{case}.pt"), **kind)
        if os.environ["RANK"] == "0":
            print(json.dumps(case), flush=True)
    dist.destroy_process_group()
