"""A short training run to interrupt: two stages, the second with random numbers, two optimizers, auxiliary heads.

As a script (`interrupted_run.py FOLDER N`) it kills itself at its N-th event: a batch, a write or a rename.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from relook.train import checkpoints
from relook.train.recipe import Recipe
from relook.train.runner import run
from relook.train.trainer import StageTrainer
from support.synthetic import OBJECTIVE, SIZE, SOURCE, DialogueHeads, Dialogues


class Noisy(Dialogues):
    """Adds random numbers to the loss, so that resuming is exact only if the generator's state is restored."""

    def wrap(self, model):
        return NoisyHeads(model, self.setup.heads, self.options.place)


class NoisyHeads(DialogueHeads):
    def forward(self, **batch):
        outputs = super().forward(**batch)
        bias = self.model.model.language_model.norm.weight
        return {**outputs, "loss": outputs["loss"] + (torch.randn(bias.shape) * bias).mean()}


def recipe(**changes) -> Recipe:
    stages = [
        {"name": "see", "objective": OBJECTIVE, "samples": 1, "batch": 1, "options": {"place": 1.0}},
        {"name": "noisy", "objective": "support.interrupted_run:Noisy", "samples": 12, "batch": 1, "accumulate": 2,
         "optimizer": "muon", "lr": 1e-3, "lr_scale": {"visual": 0.5}, "options": {"place": 1.0}},
    ]  # fmt: skip
    base = {"name": "r", "model": {"size": SIZE}, "data": {"world": SOURCE}, "stages": stages}
    return Recipe.model_validate(base | {"save_every": 2, "log_every": 1, "save_dtype": "float32"} | changes)


def count_events(patch, at) -> None:
    """Call `at(n)` before the n-th batch, write of the Trainer, sync or rename of a run; `patch` is a setattr."""
    seen = 0

    def watched(owner, name):
        inner = getattr(owner, name)

        def counted(*args, **kwargs):
            nonlocal seen
            seen += 1
            at(seen)
            return inner(*args, **kwargs)

        patch(owner, name, counted)

    for owner, name in ((StageTrainer, "training_step"), (torch, "save"), (checkpoints, "_sync"), (os, "replace")):
        watched(owner, name)


if __name__ == "__main__":
    sys.modules["support.interrupted_run"] = sys.modules["__main__"]
    fatal = int(sys.argv[2])
    count_events(setattr, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == fatal else None)
    run(recipe(), out=Path(sys.argv[1]))
