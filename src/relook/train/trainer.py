"""transformers' Trainer for one stage: what it counts, checks, saves and evaluates more than the library's own.

The Trainer writes its checkpoints (model, optimiser, schedule, random states) into a folder aside; `Keeper` gives them
their record and name, decides when to save, evaluate and stop, and knows the best one. Where a run goes on from a
checkpoint, the Trainer puts all of it back and starts at the very example that came next. Where several processes
train, each takes its share of every step, the main one writes, and what one of them meets ends the run for all.

Knows Trainer; not recipes as a whole, nor what a stage learns.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from relook.train import ranks, sharding
from relook.train.checkpoints import Checkpoints, Record, read_weights, write_weights
from relook.train.faults import Signals, check_gradient, check_loss, writing
from relook.train.recipe import Recipe, Stage
from relook.train.skipped import SkippedReport
from relook.train.watch import Tally, together

Validate = Callable[["StageTrainer"], dict[str, float]]


class Examples(torch.utils.data.Dataset):
    """An objective's examples as a map-style dataset: entry i is `objective.example(i)`, whoever asks and whenever."""

    def __init__(self, objective: Any, samples: int) -> None:
        self.objective, self.samples = objective, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        if torch.utils.data.get_worker_info() is not None:  # a scheduler tells every process to stop: only one decides
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return self.objective.example(index)


class StageTrainer(Trainer):
    """A Trainer whose model is an objective.

    Args:
        checkpoints: of the stage.
        tally: counts what is learnt.
        max_grad: the recipe's.
        parts: how many processes share a batch.
        optimiser: makes that of the objective's parameters; factor: on its learning rates, by step.
        validate: figures (`eval_*`) of the model as it is; called by `evaluate`.
        kwargs: the Trainer's own.
    """

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        tally: Tally,
        max_grad: float | None,
        parts: int,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        factor: Callable[[int], float],
        validate: Validate,
        **kwargs: Any,
    ) -> None:
        self.make_optimiser, self.factor = optimiser, factor
        super().__init__(**kwargs)
        self.checkpoints, self.tally, self.max_grad, self.validate = checkpoints, tally, max_grad, validate
        self.parts = parts

    # -- learning

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimiser(self.model if model is None else model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            found: Any = self.optimizer if optimizer is None else optimizer
            bare = found if self.is_deepspeed_enabled else getattr(found, "optimizer", found)  # not accelerate's
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(bare, self.factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(ranks.mean(loss))
        check_loss(value, self.state.global_step + 1, self.checkpoints.say_last)
        self.tally.add(value, inputs)
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self._weight(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss if weight is None else weight * loss

    def _weight(self, inputs: Any) -> torch.Tensor | None:
        """Where a batch is split, the mean over its tokens is that of the parts' means, each by its share of tokens."""
        if self.parts == 1 or "labels" not in inputs:
            return None
        counts = ranks.gather(int((inputs["labels"][:, 1:] >= 0).sum()))
        first = ranks.number() // self.parts * self.parts
        whole = max(1, sum(counts[first : first + self.parts]))
        return torch.tensor(counts[ranks.number()] * self.parts / whole, device=inputs["labels"].device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        check_gradient(float(norm), self.state.global_step + 1, self.max_grad, self.checkpoints.say_last)
        return norm

    # -- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Sharded processes exchange weights as they write: who fails cannot tell the others, its launcher ends them.
        with nullcontext() if sharding.form(self) else ranks.together(), self.checkpoints.written():
            super()._save_checkpoint(model, trial)
        ranks.wait()  # all have written their part: `Keeper.on_save` comes next

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            write_weights(self.model, output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_weights(self.model, resume_from_checkpoint)

    # -- watching

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        with self.tally.pause(), torch.random.fork_rng():  # evaluating changes nothing about the run
            with ranks.together():
                metrics = self.validate(self)
            metrics = ranks.from_main(metrics)  # on which all decide what is best
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs |= self._figures()
        with ranks.together(), writing(self.checkpoints.place, self.checkpoints.say_last):
            super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        """What the objective noted since the last time, and rates; of all processes."""
        objective: Any = self.model
        noted = ranks.gather(objective.log)
        if len(noted) > 1:
            objective.log = {key: [v for log in noted for v in log.get(key, [])] for log in noted for key in log}
        figures: dict[str, float] = objective.figures()
        return {**figures, **(together(ranks.gather(self.tally.rates())) if figures else {})}


class Keeper(TrainerCallback):
    """When to save, evaluate and stop; and the records of what was saved."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        recipe: Recipe,
        stage: Stage,
        tally: Tally,
        signals: Signals,
        skipped: SkippedReport,
        form: str | None,
    ) -> None:
        self.checkpoints, self.recipe, self.stage, self.tally, self.signals = checkpoints, recipe, stage, tally, signals
        self.skipped, self.form = skipped, form
        best = checkpoints.best()
        self.best = math.inf if best is None else float(best["eval_loss"])
        self.evaluated: tuple[int, float | None] = (0, None)  # step, validation loss

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        told = self._call_roll()
        step, more = state.global_step, state.global_step < state.max_steps
        if self.recipe.save_every and step % self.recipe.save_every == 0 and more:
            control.should_save = True
        if self.recipe.evaluate_every and (step % self.recipe.evaluate_every == 0 or not more):
            control.should_evaluate = True
        if told is not None and more:
            control.should_save = control.should_training_stop = True
        return control

    def _call_roll(self) -> int | None:
        """What single processes met in this step, all know after it: examples that were left out, a signal."""
        counted = ranks.gather(self.skipped.own())
        with ranks.together():
            self.skipped.settle(counted)
        return self.signals.agree()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> Any:
        loss = metrics["eval_loss"]
        self.evaluated = state.global_step, loss
        if loss < self.best:
            self.best = loss
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, (at, loss) = state.global_step, self.evaluated
        record: Record = {"stage": self.stage.name, "step": step, **self.tally.total()}
        if at == step:
            record["eval_loss"] = loss
        if self.form is not None:
            record["form"] = self.form
        with ranks.together(), self.checkpoints.written():
            if ranks.main():
                self.checkpoints.publish(record)
