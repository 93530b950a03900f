"""`distributed_run.py` launched by a shipped accelerate configuration.

    accelerate launch --config_file recipes/launch/... launched_run.py FOLDER ITEMS PRECISION [FAULT]

accelerate shards on GPUs only: here two CPU processes with gloo are presented to it as two GPUs. The rest is
as shipped.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import accelerate
import torch
import transformers.training_args
from accelerate.utils import DistributedType

from relook.train import trainer
from support.distributed_run import attempt, recipe

VALIDATION = {"items": 4, "examples": 2, "questions": 0}


def pretend_gpus() -> None:
    state, arguments = accelerate.PartialState, trainer.TrainingArguments
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    accelerate.PartialState = lambda cpu: state(cpu=False)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    trainer.TrainingArguments = lambda **given: arguments(**{**given, "use_cpu": False})


def sharded(items: str, precision: str) -> Any:
    stage = {"precision": precision, "checkpointing": precision == "bfloat16"}  # as in the published models' recipes
    return recipe(items, evaluate_every=2, validation=VALIDATION, stage=stage)


def two_stages(items: str) -> Any:
    """The run of `sharded`, with a second stage that trains other parts at another rate."""
    whole = sharded(items, "float32")
    first = whole.stages[0].model_dump(exclude_defaults=True)
    second = first | {"name": "again", "lr": 5e-4, "samples": 16, "freeze": ["visual"], "mask": 1, "mask_ratio": 1.0}
    return whole.model_validate({**whole.model_dump(exclude_defaults=True), "stages": [first, second]})


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for minutes; gloo suffices
    torch.set_num_threads(1)
    pretend_gpus()
    folder, items, precision, *fault = sys.argv[1:]
    if fault == ["two stages"]:
        attempt(two_stages(items), folder)
    else:
        attempt(sharded(items, precision), folder, *fault)
