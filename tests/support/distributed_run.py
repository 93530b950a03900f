"""A training run for `torchrun ... distributed_run.py FOLDER [FAULT]`: two steps of four accumulated batches of two.

FAULT occurs in one process, in the first batch of the second step: a signal or a NaN loss in the last process, a full
disk in rank 0, which writes.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch

from relook.train import distributed
from relook.train.recipe import Recipe
from relook.train.runner import run
from relook.train.trainer import StageTrainer
from support.synthetic import OBJECTIVE, SIZE, SOURCE


def recipe(items: str | None = None, **changes) -> Recipe:
    """A recipe on synthetic pages with region or clip looks, or on a file of items."""
    world = {"looks": {"region": 0.5, "clip": 0.5}, "place": 1.0}
    stage = {"name": "talk", "objective": "instruct" if items else OBJECTIVE,
             "samples": 24, "batch": 2, "accumulate": 4, "lr": 1e-3,
             "options": world if items is None else {"max_length": 400}}  # fmt: skip
    data = {"world": SOURCE} if items is None else {"path": items, "max_broken": 0.9}
    base = {"name": "r", "model": {"size": SIZE}, "data": data, "stages": [stage | changes.pop("stage", {})]}
    small = {"save_every": 1, "log_every": 1, "save_dtype": "float32", "validation": {"examples": 2, "questions": 1}}
    return Recipe.model_validate(base | small | ({"evaluate_every": 2} if items is None else {}) | changes)


def stop(_: StageTrainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def spoil(trainer: StageTrainer) -> None:
    trainer.trained.model.lm_head.weight.data.fill_(torch.nan)


def fill(_: StageTrainer) -> None:
    """Limit files to 100 kB, so that the kernel aborts a write in the middle."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAULTS = {"signal": (1, stop), "nan": (1, spoil), "disk": (0, fill)}  # (rank, fault)


def failing(fault: str) -> None:
    inner, fired = StageTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        number, happen = FAULTS[fault]
        if self.state.global_step == 1 and not fired and distributed.number() == number:
            fired.append(fault)
            happen(self)
        return inner(self, *args, **kwargs)

    StageTrainer.training_step = training_step


def attempt(made: Recipe, folder: str, fault: str | None = None) -> None:
    """Train, and write the outcome to a file per process."""
    from relook.errors import RelookError

    if fault is not None:
        failing(fault)
    try:
        run(made, out=folder)
    except RelookError as error:
        Path(folder, f"process-{os.environ['RANK']}.txt").write_text(f"{error.exit_code} {error.quiet} {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    changes = {"stage": {"batch": 8, "accumulate": 1}} if os.environ.get("SPLIT") else {}
    attempt(recipe(os.environ.get("ITEMS"), **changes), *sys.argv[1:])
