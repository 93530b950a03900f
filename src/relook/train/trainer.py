"""transformers' Trainer for one stage: what it counts, checks, saves and evaluates more than the library's own.

The Trainer writes its checkpoints (model, optimizer, schedule, random states) into a folder aside; `StageCallback`
gives them their record and name, decides when to save, evaluate and stop, and keeps track of the best one. A run that
goes on from a checkpoint starts at the very example that came next. Where several processes train, each takes its share
of every step, the main one writes, and what one of them meets ends the run for all.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from relook.errors import RelookError
from relook.train import distributed
from relook.train.checkpoints import Checkpoints, Record, StageModel, writing
from relook.train.metrics import Metrics, Tally, reporters
from relook.train.objective import Examples, Objective, run_batch
from relook.train.optim import build_optimizer, schedule
from relook.train.recipe import Recipe, Stage
from relook.train.skipped import SkippedReport
from relook.train.validation import Validator


@dataclass
class StageRun:
    """A stage as it runs: what its trainer and callbacks share.

    Attributes:
        seed: of examples and of the Trainer.
        steps: optimizer steps.
        share: the batch of this process, and its batches per step (`distributed.divided`).
        skipped: counts samples that are left out.
        tally: counts samples, tokens, loss and time.
    """

    recipe: Recipe
    stage: Stage
    seed: int
    steps: int
    share: tuple[int, int]
    checkpoints: Checkpoints
    signals: distributed.Signals
    objective: Objective
    trained: StageModel
    skipped: SkippedReport
    tally: Tally


class StageTrainer(Trainer):
    """A Trainer of a stage's module on its objective's examples; the order of examples is the objective's."""

    def __init__(self, stage_run: StageRun) -> None:
        self.stage_run, self.checkpoints, self.metrics = stage_run, stage_run.checkpoints, Metrics()
        recipe, stage, objective = stage_run.recipe, stage_run.stage, stage_run.objective
        self.validator = Validator(objective, stage_run.trained, recipe.validation, stage_run.checkpoints)
        samples = stage_run.steps * stage.batch * stage.accumulate
        super().__init__(
            model=stage_run.trained.module,
            args=_arguments(stage_run),
            train_dataset=Examples(objective.train.__getitem__, samples),
            data_collator=objective.collate,
        )
        stage_run.trained.model.config.__dict__.pop("use_cache", None)  # which the Trainer sets
        self.model_accepts_loss_kwargs = False  # a loss is a mean over its batch
        self.parts = stage.batch // stage_run.share[0]  # processes that share a batch
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        distributed.prepare_zero3(stage_run.trained.model, self)
        self.add_callback(StageCallback(stage_run, distributed.optimizer_form(self)))

    # -- learning

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            self.optimizer = build_optimizer(module.named_parameters(remove_duplicate=False), self.stage_run.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            found: Any = self.optimizer if optimizer is None else optimizer
            bare = found if self.is_deepspeed_enabled else getattr(found, "optimizer", found)  # not accelerate's
            factor = schedule(self.stage_run.stage, self.stage_run.steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(bare, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        info = inputs.get("info", {})
        self.stage_run.skipped.add(info.get("taught", 0), info.get("left_out", ""))
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(distributed.mean(loss))
        if not math.isfinite(value):
            raise self._stopped_at_step(f"the loss of step {{}} is {value}. Lower lr, or look at its examples")
        self.stage_run.tally.add(value, inputs)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        weight = self._weight(inputs)
        loss, figures = run_batch(self.stage_run.objective, model, inputs)
        self.metrics.add(figures)
        return loss if weight is None else weight * loss

    def _weight(self, inputs: Any) -> torch.Tensor | None:
        """Where a batch is split, the mean over its tokens is that of the parts' means, each by its share of tokens."""
        if self.parts == 1 or "labels" not in inputs:
            return None
        counts = distributed.gather(int((inputs["labels"][:, 1:] >= 0).sum()))
        first = distributed.number() // self.parts * self.parts
        whole = max(1, sum(counts[first : first + self.parts]))
        return torch.tensor(counts[distributed.number()] * self.parts / whole, device=inputs["labels"].device)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm, limit = float(found), self.stage_run.recipe.max_grad
        if not math.isfinite(norm):
            raise self._stopped_at_step(f"the gradient of step {{}} has norm {norm}. Lower lr, or look at its examples")
        if limit is not None and norm > limit:
            said = f"the gradient of step {{}} exploded: its norm is {norm:.3g}, over max_grad={limit:g}. "
            raise self._stopped_at_step(f"{said}Lower lr, or raise max_grad")
        return found

    def _stopped_at_step(self, why: str) -> RelookError:
        return RelookError(f"{why.format(self.state.global_step + 1)}; {self.checkpoints.say_last()}")

    # -- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Sharded processes exchange weights as they write: who fails cannot tell the others, its launcher ends them.
        sharded = distributed.optimizer_form(self) is not None
        with nullcontext() if sharded else distributed.together(), self.checkpoints.written():
            super()._save_checkpoint(model, trial)
        distributed.wait()  # all have written their part: `StageCallback.on_save` comes next

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            self.stage_run.trained.save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's own is not strict, and checkpoints have the published names of weights: it would load none."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.stage_run.trained.load(resume_from_checkpoint)

    # -- evaluating and logging

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        with self.stage_run.tally.pause(), torch.random.fork_rng():  # evaluating changes nothing about the run
            with distributed.together():
                figures = self.validator(self.state.global_step, self._prepare_inputs)
            figures = distributed.from_main(figures)  # on which all decide what is best
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            figures = self.metrics.take_from_all()
            logs |= {**figures, **(self.stage_run.tally.rates_of_all() if figures else {})}
        with distributed.together(), writing(self.checkpoints.place, self.checkpoints):
            super().log(logs, start_time)


def _arguments(run: StageRun) -> TrainingArguments:
    """The Trainer's arguments for a stage; when to save and evaluate is the callback's to say."""
    recipe, stage = run.recipe, run.stage
    return TrainingArguments(
        output_dir=str(run.checkpoints.aside),
        run_name=f"{recipe.name}/{stage.name}",
        max_steps=run.steps,
        per_device_train_batch_size=run.share[0],
        gradient_accumulation_steps=run.share[1],
        max_grad_norm=stage.clip,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a loss that is no number stops the run
        train_sampling_strategy="sequential",  # the examples are drawn at random already; order is part of the recipe
        save_strategy="no",
        eval_strategy="no",
        report_to=reporters(recipe.report_to),
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=run.seed,
        bf16=stage.precision == "bfloat16",
        activation_checkpointing=stage.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=True,  # which encoders run depends on the examples
        use_cpu=not torch.cuda.is_available(),
    )


class StageCallback(TrainerCallback):
    """When to save, evaluate and stop; and the records of what was saved.

    Args:
        form: in which a checkpoint keeps the optimizer (`distributed.optimizer_form`).
    """

    def __init__(self, run: StageRun, form: str | None) -> None:
        self.run, self.form = run, form
        best = run.checkpoints.best()
        self.best = math.inf if best is None else float(best["eval_loss"])
        self.evaluated: tuple[int, float | None] = (0, None)  # step, validation loss

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        recipe, signal = self.run.recipe, self._exchange()
        step, more = state.global_step, state.global_step < state.max_steps
        if recipe.save_every and step % recipe.save_every == 0 and more:
            control.should_save = True
        if recipe.evaluate_every and (step % recipe.evaluate_every == 0 or not more):
            control.should_evaluate = True
        if signal is not None and more:
            control.should_save = control.should_training_stop = True
        return control

    def _exchange(self) -> int | None:
        """Let all processes have what single ones met in this step: samples that were left out, a signal."""
        counted = distributed.gather(self.run.skipped.own())
        with distributed.together():
            self.run.skipped.settle(counted)
        return self.run.signals.agree()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> Any:
        loss = metrics["eval_loss"]
        self.evaluated = state.global_step, loss
        if loss < self.best:
            self.best = loss
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, (at, loss) = state.global_step, self.evaluated
        record: Record = {"stage": self.run.stage.name, "step": step, **self.run.tally.total()}
        if at == step:
            record["eval_loss"] = loss
        if self.form is not None:
            record["form"] = self.form
        with distributed.together(), self.run.checkpoints.written():
            if distributed.main():
                self.run.checkpoints.publish(record)
