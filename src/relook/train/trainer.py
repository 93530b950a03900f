"""transformers' Trainer for one stage: what it counts, checks, saves and evaluates more than the library's own.

The Trainer writes its checkpoints into a folder aside; `StageCallback` gives them their record and name, and decides
when to save, evaluate and stop. Where several processes train, each takes its share of every step; the main one writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from relook.errors import RelookError
from relook.looks import LOOKS
from relook.model.encoders import image_encoder
from relook.model.segments import synchronised_ranks
from relook.train import distributed
from relook.train.checkpoints import Checkpoints, Record, StageModel
from relook.train.feature_cache import feature_cache
from relook.train.metrics import LOG, LogWriter, Metrics, SkippedReport, logging_to
from relook.train.objective import Examples, Objective, learnt_tokens, run_batch
from relook.train.optim import build_optimizer, schedule
from relook.train.recipe import Recipe, Stage, reset_forward
from relook.train.validation import Validator

POINTS = 20  # lines of the log that a stage has at least, where it has as many steps


class StageTrainer(Trainer):
    """A Trainer of a stage's module on its objective's examples; the order of examples is the objective's.

    Args:
        steps: optimizer steps.
        record: of the checkpoint that the stage goes on from; None from the beginning.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        trained: StageModel,
        objective: Objective,
        steps: int,
        checkpoints: Checkpoints,
        skipped: SkippedReport,
        record: Record | None,
    ) -> None:
        self.recipe, self.stage, self.trained, self.steps = recipe, stage, trained, steps
        self.objective: Objective = objective
        self.checkpoints, self.skipped, self.record = checkpoints, skipped, record
        self.samples, processes = steps * stage.batch * stage.accumulate, distributed.count()
        batch, accumulate = distributed.divided(stage.batch, stage.accumulate, processes)
        self.parts = stage.batch // batch  # processes that share a batch
        self.weights = iter(list[float]())  # of the batches of a step
        self.metrics = Metrics(batch * processes, record)
        tokens = getattr(trained.processor, "tokens", {})
        self.starts = {tokens[spec.start]: name for name, spec in LOOKS.items() if spec.start in tokens}
        self.validator = Validator(objective, trained, recipe.validation, checkpoints)
        super().__init__(
            model=trained.module,
            args=_arguments(recipe, stage, checkpoints, batch, accumulate, steps),
            train_dataset=Examples(objective.train.__getitem__, self.samples),
            data_collator=objective.collate,
        )
        trained.model.config.__dict__.pop("use_cache", None)  # which the Trainer sets
        self.model_accepts_loss_kwargs = False  # a loss (with heads: a sum of several) is weighted as a whole
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        distributed.prepare_zero3(trained.model, self)
        self.form = distributed.optimizer_form(self)
        if record is not None:
            distributed.check_optimizer_form(record.get("form"), self.form, checkpoints.path(record))

    def run(self, signals: distributed.Signals) -> None:
        """Train to the last step, or to the end of the step in which a signal comes."""
        with distributed.together(), torch.random.fork_rng():
            if self.recipe.evaluate_every:
                _ = self.validator.batches  # nothing to validate on is refused before hours of training
        self.add_callback(StageCallback(self, signals))
        if not distributed.main():  # else all processes would draw the same masks
            torch.manual_seed(self.args.seed + distributed.number())
        place, folder = self.checkpoints.place, self.checkpoints.place.parents[1]
        writer = LogWriter(folder / LOG, self.stage.name, self.steps, self.metrics)
        items = getattr(self.objective, "items", None)
        cache = feature_cache(self.trained.model.model, self.stage, self.samples, items, self.form is not None)
        step, start = (self.record["step"], str(self.checkpoints.path(self.record))) if self.record else (0, None)
        with logging_to(folder, place, writer, step) as callbacks:
            for callback in callbacks:
                self.add_callback(callback)
            with synchronised_ranks(self.form is not None), image_encoder(cache) if cache else nullcontext():
                self.train(resume_from_checkpoint=start)

    # -- learning

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            found: Any = self.model if model is None else model
            self.optimizer = build_optimizer(found, self.stage)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            found: Any = self.optimizer if optimizer is None else optimizer
            bare = found if self.is_deepspeed_enabled else getattr(found, "optimizer", found)  # not accelerate's
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(bare, schedule(self.stage, self.steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        info = inputs.get("info", {})
        self.skipped.add(info.get("taught", 0), info.get("left_out", ""))
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(distributed.mean(loss))
        if not math.isfinite(value):
            raise self._stopped_at_step(f"the loss of step {{}} is {value}. Lower lr, or look at its examples")
        self.metrics.add(value, inputs)
        if "labels" in inputs:
            self.metrics.looks |= {self.starts[i] for i in self.starts.keys() & {*inputs["labels"].unique().tolist()}}
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = distributed.gather([learnt_tokens(batch) for batch in batches])
        parts = self.parts if self.stage.average == "batches" else None
        self.weights = iter(step_weights(counts, distributed.number(), parts))
        return batches, None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss, figures = run_batch(self.objective, model, inputs)
        self.metrics.figures.append(figures)
        return next(self.weights) * loss  # the Trainer takes the mean over a step's batches and processes

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm, limit = float(found), self.recipe.max_grad_norm
        if not math.isfinite(norm):
            raise self._stopped_at_step(f"the gradient of step {{}} has norm {norm}. Lower lr, or look at its examples")
        if limit is not None and norm > limit:
            said = f"the gradient of step {{}} exploded: its norm is {norm:.3g}, over max_grad_norm={limit:g}. "
            raise self._stopped_at_step(f"{said}Lower lr, or raise max_grad_norm")
        return found

    def _stopped_at_step(self, why: str) -> RelookError:
        return RelookError(f"{why.format(self.state.global_step + 1)}; {self.checkpoints.say_last()}")

    # -- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Sharded processes exchange weights as they write: who fails cannot tell the others, its launcher ends them.
        with nullcontext() if self.form else distributed.together(), self.checkpoints.writing(self.checkpoints.folder):
            super()._save_checkpoint(model, trial)
        distributed.wait()  # all have written their part: `StageCallback.on_save` comes next

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        if self.args.should_save:
            done = {"stage": self.stage.name, "step": self.state.global_step, **self.metrics.record()}
            with self.described({key: value for key, value in done.items() if key != "loss_sum"}):
                self.trained.save(output_dir, state_dict)

    @contextmanager
    def described(self, record: Record) -> Iterator[None]:
        """Within, the model's config says what its weights are and how they are asked, not how the stage trains them.

        Args:
            record: of the stage so far.
        """
        import transformers

        from relook import __version__

        recipe, config, stages = self.recipe, self.trained.model.config, [*self.checkpoints.before(), record]
        before = dict(config.__dict__)
        reset_forward(config, recipe.stages[: len(stages)])
        config.domain = recipe.domain  # not that of the weights it started from
        config.provenance = {
            **({"start": self.trained.origin} if self.trained.origin else {}),
            "recipe": recipe.name,
            "seed": recipe.seed,
            "samples": sum(each["samples"] for each in stages),
            "seconds": round(sum(each["seconds"] for each in stages), 1),
            "stages": stages,
            "relook": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        try:
            yield
        finally:
            config.__dict__.clear()
            config.__dict__.update(before)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's own is not strict, and checkpoints have the published names of weights: it would load none."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.trained.load(resume_from_checkpoint)

    # -- evaluating and logging

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        with self.metrics.pause(), torch.random.fork_rng():  # evaluating changes nothing about the run
            with distributed.together():
                figures = self.validator(self.state.global_step, self._prepare_inputs)
            figures = distributed.from_main(figures)  # on which all decide what is best
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs |= self.metrics.take()
        with distributed.together(), self.checkpoints.writing():
            super().log(logs, start_time)


def step_weights(counts: Sequence[Sequence[int]], number: int, parts: int | None = None) -> list[float]:
    """Factors on the losses of one process's batches in a step: their mean over all processes is the step's loss.

    Args:
        counts: learnt tokens of every batch of every process.
        number: of the process.
        parts: for the mean over batches: how many processes share a batch; None for the mean over tokens.

    Example: two batches of 1 and 3 tokens weigh 0.5 and 1.5 by tokens, 1 and 1 by batches. One without any weighs 0.
    """
    weights = np.asarray(counts, dtype=float)  # (processes, batches of one)
    if parts is not None:
        shared = weights.reshape(-1, parts, weights.shape[1])
        weights = (shared / shared.sum(1, keepdims=True).clip(1)).reshape(weights.shape)
    return (weights[number] / (weights.mean() or 1.0)).tolist()


def _arguments(
    recipe: Recipe, stage: Stage, checkpoints: Checkpoints, batch: int, accumulate: int, steps: int
) -> TrainingArguments:
    """The Trainer's arguments for a stage; when to save and evaluate is the callback's to say."""
    return TrainingArguments(
        output_dir=str(checkpoints.aside),
        run_name=f"{recipe.name}/{stage.name}",
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=stage.clip,
        logging_steps=max(1, min(recipe.log_every, steps // POINTS)),
        logging_nan_inf_filter=False,  # a loss that is no number stops the run
        train_sampling_strategy="sequential",  # the examples are drawn at random already; order is part of the recipe
        save_strategy="no",
        eval_strategy="no",
        report_to=[name for name in recipe.report_to if name != "tensorboard"] or ["none"],  # written anyway
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=recipe.seed_of(stage),
        bf16=stage.precision == "bfloat16",
        activation_checkpointing=stage.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=True,  # which encoders run depends on the examples
        use_cpu=not torch.cuda.is_available(),
    )


class StageCallback(TrainerCallback):
    """When to save, evaluate and stop; and the records of what was saved."""

    def __init__(self, trainer: StageTrainer, signals: distributed.Signals) -> None:
        self.trainer, self.signals, self.checkpoints = trainer, signals, trainer.checkpoints
        self.best = (trainer.checkpoints.best() or {"eval_loss": math.inf})["eval_loss"]
        self.evaluated = (0, math.inf)  # step, validation loss

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        step, more = state.global_step, state.global_step < state.max_steps
        self.trainer.skipped.settle(last=not more)
        recipe, signal = self.trainer.recipe, self.signals.agree()
        if recipe.save_every and step % recipe.save_every == 0 and more:
            control.should_save = True
        if recipe.evaluate_every and (step % recipe.evaluate_every == 0 or not more):
            control.should_evaluate = True
        if signal is not None and more:
            control.should_save = control.should_training_stop = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> Any:
        loss = metrics["eval_loss"]
        self.evaluated = state.global_step, loss
        if loss < self.best:
            self.best = loss
            control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, (at, loss) = state.global_step, self.evaluated
        record: Record = {"stage": self.trainer.stage.name, "step": step, **self.trainer.metrics.record()}
        if at == step:
            record["eval_loss"] = loss
        if self.trainer.form is not None:
            record["form"] = self.trainer.form
        with distributed.together(), self.checkpoints.writing(self.checkpoints.folder):
            if distributed.main():
                self.checkpoints.publish(record)
