"""`scaled_run.py` as `accelerate launch --config_file recipes/launch/... launched_run.py FOLDER ITEMS [FAULT]` runs it.

accelerate shards on GPUs only. Here it is told that two CPU processes are two GPUs, over gloo; all else is as shipped.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedType
from scaled_run import attempt, recipe

from relook.train import ranks, runner

VALIDATION = {"items": 4, "examples": 2, "questions": 0}


def pretend_gpus() -> None:
    state, arguments = accelerate.PartialState, runner.TrainingArguments
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    accelerate.PartialState = lambda cpu: state(cpu=False)
    runner.TrainingArguments = lambda **given: arguments(**{**given, "use_cpu": False})


def sharded(items: str) -> Any:
    return recipe(items, evaluate_every=2, validation=VALIDATION)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for minutes; gloo will do
    torch.set_num_threads(1)
    pretend_gpus()
    folder, items, *fault = sys.argv[1:]
    attempt(sharded(items), folder, *fault)
    assert ranks.count() == 1
