"""Carrying out a recipe: stage after stage through transformers' Trainer, with a checkpoint after each and inside.

A run is a folder: `recipe.yaml` as used, `log.jsonl`, `tensorboard/`, `stages/<nr>-<name>/` with the weights after
every stage (and, while it runs, its checkpoints), `curves.png`, and `final/` with the model as it ships. A rerun skips
the stages whose recipe (and everything before them) has not changed, and goes on inside the one that was cut.

Knows the order of things; what a stage learns is `stages`' business, files are `checkpoints`', figures `watch`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from relook.data.dataset import open_items
from relook.data.records import records
from relook.io import replacing, replacing_folder
from relook.model.rank_sync import synchronised_ranks
from relook.model.start import open_start
from relook.plugins import find
from relook.train import lora, ranks, sharding, watch
from relook.train.checkpoints import Checkpoints, Record, digest, finished, keep_stage, restore_stage
from relook.train.faults import GO_ON, Signals, Stopped, writing
from relook.train.frozen import remembering
from relook.train.learnable import check_parts, let_learn, set_forward
from relook.train.objective import Objective, make_objective
from relook.train.optimiser import build_optimiser, schedule
from relook.train.recipe import Data, Recipe, Stage, load_recipe
from relook.train.trainer import Examples, Keeper, StageTrainer
from relook.train.validation import Validator


def run(recipe: str | Path | Recipe, overrides: Sequence[str] = (), out: str | Path | None = None) -> Path:
    """Train what a recipe says and return the folder of the finished model.

    Args:
        recipe: a YAML file, or a recipe already checked.
        overrides: `key=value`, see `recipe.load_recipe`; `out=FOLDER` among them is taken as `out`.
        out: the run's folder; `runs/<recipe name>` unless given.

    Raises:
        UserError: the recipe does not hold together, before any training.
    """
    given = [o for o in overrides if not o.startswith("out=")]
    for o in overrides:
        if o.startswith("out="):
            out = o.removeprefix("out=")
    with ranks.joined():
        with ranks.together():
            if not isinstance(recipe, Recipe):
                recipe = load_recipe(recipe, given)
            folder = Path(out) if out is not None else Path("runs") / recipe.name
            model, processor = _begun(recipe)
        with Signals() as signals:
            try:
                history = run_stages(model, processor, recipe, folder, signals)
            except Stopped:
                if ranks.main():
                    watch.draw_curves(folder)
                raise
        with ranks.together(), writing(folder, lambda: GO_ON):
            if ranks.main():
                watch.draw_curves(folder)
                save_final(model, processor, recipe, history, folder / "final")
    return folder / "final"


def _begun(recipe: Recipe) -> tuple[Any, Any]:
    """The model and processor a run begins with, once all that can be known of it now is right."""
    watch.check_reporters(recipe.report_to)
    sharding.check(recipe)
    for stage in recipe.stages:
        ranks.divided(stage.batch, stage.accumulate, ranks.count())
    torch.set_num_threads(recipe.threads)
    model, processor = open_start(recipe.model, seed=recipe.seed, domain=recipe.domain)
    check_parts(model, recipe.stages)
    if any((stage.data or recipe.data).free_choice for stage in recipe.stages):
        processor.free_choice = True
    return model, processor


def run_stages(model: Any, processor: Any, recipe: Recipe, folder: Path, signals: Signals) -> list[Record]:
    """All stages that are not done yet, in place; returns the records of all."""
    history, name = [], ""
    for number, stage in enumerate(recipe.stages):
        name = digest(name, recipe, stage)
        checkpoints = Checkpoints(folder / "stages" / f"{number:02d}-{stage.name}", name, recipe.keep_last)
        record = ranks.from_main(finished(checkpoints.place, name))
        if record is None:
            with ranks.together():
                _find_data(recipe, recipe.stages[number:])
            record = run_stage(model, processor, recipe, stage, folder, checkpoints, signals)
            with ranks.together(), writing(checkpoints.place, checkpoints.say_last):
                if ranks.main():
                    keep_stage(model, checkpoints.place, {**record, "digest": name})
                    checkpoints.close()
            told = signals.agree()
            if told is not None and number + 1 < len(recipe.stages):
                _stop(f"stopped after stage {stage.name}, which is kept in {checkpoints.place}; {GO_ON}", told)
        else:
            ranks.say(f"{stage.name}: already done, taken from {checkpoints.place}")
            restore_stage(model, checkpoints.place)
            set_forward(model.config, stage)
        history.append({k: v for k, v in record.items() if k != "digest"})
    return history


def run_stage(
    model: Any,
    processor: Any,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    checkpoints: Checkpoints,
    signals: Signals,
) -> Record:
    """One stage of training in place, from its last checkpoint where it has one; returns its record.

    Raises:
        Stopped: a signal asked for it; all is saved.
        RelookError: the loss or the gradient is no number, or too large; the disk is full.
    """
    seed = recipe.seed if stage.seed is None else stage.seed
    with ranks.together():
        objective, taught = _made_ready(model, processor, recipe, stage, seed)
    with ranks.together():
        if ranks.main():
            _write_recipe(recipe, folder)  # not before: a run that is refused leaves no folder
    steps = steps_of(stage, taught)
    stage = stage.model_copy(update={"samples": steps * stage.batch * stage.accumulate})
    if ranks.main():
        checkpoints.clear_aside()
    record = ranks.from_main(checkpoints.last())
    if record is not None:
        ranks.say(f"{stage.name}: goes on from step {record['step']} of {steps}")
    objective.skipped.open(
        checkpoints.place / "left_out.jsonl", record["step"] * stage.batch * stage.accumulate if record else 0
    )
    batch, accumulate = ranks.divided(stage.batch, stage.accumulate, ranks.count())
    tally = watch.Tally(batch * ranks.count(), record)
    trainer = _trainer(objective, recipe, stage, seed, steps, checkpoints, tally, (batch, accumulate))
    if record is not None:
        sharding.check_form(record, checkpoints.path(record), trainer)
    keeper = Keeper(checkpoints, recipe, stage, tally, signals, objective.skipped, sharding.form(trainer))
    trainer.add_callback(keeper)
    with watch.watched(trainer, folder, checkpoints.place.name, stage, tally, record["step"] if record else 0):
        _train(trainer, checkpoints, signals, str(checkpoints.path(record)) if record else None)
    if told := objective.skipped.say():
        ranks.say(f"{stage.name}: {told}")
    if signals.seen is not None and trainer.state.global_step < steps:
        place = checkpoints.path({"step": trainer.state.global_step})
        _stop(f"stopped at step {trainer.state.global_step} of {steps}, saved in {place}; {GO_ON}", signals.seen)
    _put_back(objective, stage, checkpoints, trainer)
    best = ranks.from_main(checkpoints.best())
    done: Record = {
        "stage": stage.name,
        "samples": steps * stage.batch * stage.accumulate,
        "seconds": round(tally.seconds, 1),
        "loss": round(tally.loss_sum / steps, 4),
    }
    return done if best is None else {**done, "best": {k: best[k] for k in ("step", "eval_loss")}}


def _find_data(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Open the sets of all stages that are still to come: one that is missing is told before hours of training.

    Raises:
        UserError: a set that is not there, or nothing that can be read.
    """
    used = [stage.data or recipe.data for stage in stages]
    sources = [source for data in used if data.source == "json" for source in data.all_sources()]
    for path, split in dict.fromkeys((source.path, source.split) for source in sources):
        records(path, split)


def _stop(why: str, signum: int) -> NoReturn:
    """End the run in all processes; the main one says why."""
    stopped = Stopped(why, signum)
    raise stopped if ranks.main() else ranks.Elsewhere(stopped)


def _made_ready(model: Any, processor: Any, recipe: Recipe, stage: Stage, seed: int) -> tuple[Objective, Any]:
    """The stage's objective around a model of which only that learns which is to; and the feed it learns from."""
    data = stage.data or recipe.data
    torch.manual_seed(seed)
    taught, held = _items(data, recipe.validation.items, seed, processor)
    objective = make_objective(model, processor, source_of(data, seed), stage, seed, taught, held)
    set_forward(model.config, stage)
    let_learn(model, stage.freeze, stage.train)
    if stage.lora is not None:
        first = stage == recipe.stages[0]
        objective.adapter = lora.adapt(model, stage.lora, recipe.model.base_record(recipe.seed) if first else None)
    model.train()
    if stage.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return objective, taught


def _train(trainer: StageTrainer, checkpoints: Checkpoints, signals: Signals, start: str | None) -> None:
    """Let the Trainer train, from a checkpoint's folder where there is one."""
    objective: Any = trainer.model
    if not ranks.main():  # else all processes would draw the same masks
        torch.manual_seed(trainer.args.seed + ranks.number())
    try:
        sharded = sharding.form(trainer) is not None
        with synchronised_ranks(sharded), remembering(objective.model, objective.stage.remember):
            trainer.train(resume_from_checkpoint=start)
    except RuntimeError as error:  # a process that draws examples was told to stop, too
        if signals.seen is None:
            raise
        raise Stopped(
            f"stopped in the midst of a step of {objective.stage.name}; {checkpoints.say_last()}", signals.seen
        ) from error


def _put_back(objective: Objective, stage: Stage, checkpoints: Checkpoints, trainer: StageTrainer) -> None:
    """The model as it was before the stage, but for what it learnt."""
    model: Any = objective.model
    if objective.adapter is not None:
        with ranks.together(), writing(checkpoints.place, checkpoints.say_last):
            if ranks.main():
                with replacing_folder(checkpoints.place / "adapter") as aside:
                    objective.adapter.save(aside)
                    objective.processor.save_pretrained(aside)
        objective.adapter.merge()
    if stage.checkpointing:
        model.activation_checkpointing_disable()
    if sharding.form(trainer) is not None:
        sharding.end(model)
    let_learn(model)


def _trainer(
    objective: Objective,
    recipe: Recipe,
    stage: Stage,
    seed: int,
    steps: int,
    checkpoints: Checkpoints,
    tally: watch.Tally,
    share: tuple[int, int],
) -> StageTrainer:
    """A Trainer for a stage, without what the library prints; when to save and evaluate is `Keeper`'s.

    `share` is the batch, and the batches per step, of this process (`ranks.divided`).
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints.aside),
        run_name=f"{recipe.name}/{stage.name}",
        max_steps=steps,
        per_device_train_batch_size=share[0],
        gradient_accumulation_steps=share[1],
        max_grad_norm=stage.clip,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # a loss that is no number stops the run
        train_sampling_strategy="sequential",  # the examples are drawn at random already; order is part of the recipe
        save_strategy="no",
        eval_strategy="no",
        report_to=watch.reporters(recipe.report_to),
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=seed,
        bf16=stage.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
    )
    validator = Validator(objective, recipe.validation, checkpoints.place / "pictures", checkpoints.say_last)
    trainer = StageTrainer(
        checkpoints=checkpoints,
        tally=tally,
        max_grad=recipe.max_grad,
        parts=stage.batch // share[0],
        validate=lambda trainer: validator(trainer.state.global_step, trainer._prepare_inputs),
        model=objective,
        args=arguments,
        train_dataset=Examples(objective, steps * stage.batch * stage.accumulate),
        data_collator=objective.collate,
        optimiser=lambda model: build_optimiser(model.named_parameters(remove_duplicate=False), stage),
        factor=schedule(stage, steps),
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    sharding.begin(objective.model, trainer)
    return trainer


def save_final(model: Any, processor: Any, recipe: Recipe, history: list[dict[str, Any]], folder: Path) -> Path:
    """The finished model, as it ships: weights in the recipe's dtype, processor, and where it all came from."""
    import transformers

    from relook import __version__

    started = recipe.model.start
    before = {"start": {"from": Path(started).name, **(model.config.provenance or {})}} if started else {}
    model.config.provenance = {
        **before,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "samples": sum(h["samples"] for h in history),
        "seconds": round(sum(h["seconds"] for h in history), 1),
        "stages": history,
        "relook": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    model.config.domain = recipe.domain  # not that of the weights it started from
    trained = model.dtype
    aside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    model.to(getattr(torch, recipe.save_dtype)).save_pretrained(aside)
    model.to(trained)
    processor.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    return aside.rename(folder)


def source_of(data: Data, seed: int) -> Any:
    """The synthetic dataset that a stage draws from (group `relook.sources` of `plugins`); None for items."""
    return find("source", data.world, {}, "data.world")(seed) if data.source == "world" and data.world else None


def _items(data: Data, held: int, seed: int, processor: Any) -> tuple[Any, Sequence[Any]]:
    """A feed of items to learn from and `held` others that are held out; (None, ()) for a world.

    Raises:
        UserError: a source that cannot be read; nothing would be left to learn from.
    """
    if data.source != "json":
        return None, ()
    items = open_items(data, seed, held, processor)
    return items, items.validation


def steps_of(stage: Stage, items: Any = None) -> int:
    """Optimiser steps of a stage; `items` (None for a world) are passed over `epochs` times at most."""
    samples = stage.samples
    if stage.epochs is not None and items is not None:
        samples = min(samples, int(stage.epochs * len(items)))
    return max(1, samples // (stage.batch * stage.accumulate))


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    import yaml

    text = yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "recipe.yaml") as file:
        file.write(text)
