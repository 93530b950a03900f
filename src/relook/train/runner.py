"""Carrying out a recipe: every stage starts from a folder and ends as a folder.

A run is a folder: `recipe.yaml` as used, `log.jsonl`, `tensorboard/`, `stages/<nr>-<name>/` with the model after every
stage (and, while it runs, its checkpoints), `curves.png`, and `final/` with the model as it ships. A rerun skips the
stages whose recipe (and everything before them) has not changed, and goes on inside the one that was cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from relook.data.dataset import open_items
from relook.data.records import records
from relook.io import replacing, replacing_folder
from relook.model.segments import synchronised_ranks
from relook.model.start import Start, open_start
from relook.train import distributed, lora, metrics
from relook.train.check import check, find_source
from relook.train.checkpoints import (
    GO_ON,
    Checkpoints,
    Record,
    StageModel,
    digest,
    finished,
    finishing,
    read_heads,
    refuse_older_run,
    writing,
)
from relook.train.distributed import Signals, Stopped
from relook.train.feature_cache import cached_features
from relook.train.objective import Objective, Setup, make_objective
from relook.train.optim import set_trainable
from relook.train.recipe import Recipe, Stage, load_recipe, reset_forward, set_forward
from relook.train.skipped import SkippedReport
from relook.train.trainer import StageRun, StageTrainer


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
    with distributed.joined():
        with distributed.together():
            if not isinstance(recipe, Recipe):
                recipe = load_recipe(recipe, given)
            folder = Path(out) if out is not None else Path("runs") / recipe.name
            torch.set_num_threads(recipe.threads)
            check(recipe)
            refuse_older_run(folder)
        with Signals() as signals:
            try:
                history, last = run_stages(recipe, folder, signals)
            except Stopped:
                if distributed.main():
                    metrics.draw_curves(folder)
                raise
        with distributed.together(), writing(folder):
            if distributed.main():
                metrics.draw_curves(folder)
                save_final(recipe, history, last, folder / "final")
    return folder / "final"


def run_stages(recipe: Recipe, folder: Path, signals: Signals) -> tuple[list[Record], Start]:
    """All stages that are not done yet; returns the records of all, and the last one's model."""
    start, history, name, checked = recipe.model, list[Record](), "", False
    for number, stage in enumerate(recipe.stages):
        name = digest(name, recipe, stage)
        checkpoints = Checkpoints(folder / "stages" / f"{number:02d}-{stage.name}", name, recipe.keep_last)
        record = distributed.from_main(finished(checkpoints.place, name))
        if record is not None:
            distributed.say(f"{stage.name}: already done, taken from {checkpoints.place}")
        else:
            with distributed.together():
                if not checked:
                    _check_data(recipe, recipe.stages[number:])
                    checked = True
            record = train_stage(recipe, stage, start, checkpoints, signals)
            signal = signals.agree()
            if signal is not None and number + 1 < len(recipe.stages):
                _stop(f"stopped after stage {stage.name}, which is kept in {checkpoints.place}; {GO_ON}", signal)
        history.append({k: v for k, v in record.items() if k != "digest"})
        start = Start.model_validate({"start": str(checkpoints.place)})
    return history, start


def train_stage(recipe: Recipe, stage: Stage, start: Start, checkpoints: Checkpoints, signals: Signals) -> Record:
    """One stage of training, from its last checkpoint where it has one, to the model in its folder; returns its record.

    Raises:
        Stopped: a signal asked for it; all is saved.
        RelookError: the loss or the gradient is no number, or too large; the disk is full.
    """
    with distributed.together():
        trained, objective, items = _open_stage(recipe, stage, start)
        steps = steps_of(stage, items)
        if distributed.main():
            _write_recipe(recipe, checkpoints.place.parents[1])  # not before: a run that is refused leaves no folder
            checkpoints.clear_aside()
    record = distributed.from_main(checkpoints.last())
    if record is not None:
        distributed.say(f"{stage.name}: goes on from step {record['step']} of {steps}")
    skipped = SkippedReport(items.data.max_broken, items.unreadable) if items is not None else SkippedReport(0.0)
    skipped.open(checkpoints.place / "left_out.jsonl", record["step"] * stage.batch * stage.accumulate if record else 0)
    share = distributed.divided(stage.batch, stage.accumulate, distributed.count())
    tally = metrics.Tally(share[0] * distributed.count(), record)
    shared = checkpoints, signals, objective, trained, skipped, tally
    trainer = StageTrainer(StageRun(recipe, stage, seed_of(recipe, stage), steps, share, *shared))
    if record is not None:
        distributed.check_optimizer_form(record, checkpoints.path(record), trainer)
    _train(trainer, record)
    if skipped_samples := skipped.say():
        distributed.say(f"{stage.name}: {skipped_samples}")
    if signals.seen is not None and trainer.state.global_step < steps:
        place = checkpoints.path({"step": trainer.state.global_step})
        _stop(f"stopped at step {trainer.state.global_step} of {steps}, saved in {place}; {GO_ON}", signals.seen)
    return _finish(trainer, start)


def _open_stage(recipe: Recipe, stage: Stage, start: Start) -> tuple[StageModel, Objective, Any]:
    """Load the stage's model and its items (None of a synthetic dataset), and prepare both."""
    model, processor = open_start(start, seed=recipe.seed, domain=recipe.domain)
    for parameter in model.parameters():  # out of the mapped file, where the alignment of a weight decides its rounding
        parameter.data = parameter.data.clone()
    first, data, items = start is recipe.model, stage.data or recipe.data, None
    free_choice, heads = processor.free_choice, {} if first else read_heads(str(start.start))
    processor.free_choice = free_choice or data.free_choice
    if data.source == "json":
        items = open_items(data, seed_of(recipe, stage), recipe.validation.items, processor)
    base = start.base_record(recipe.seed) if first else None
    trained, objective = prepare_stage(recipe, stage, model, processor, items, heads, base)
    assert objective is not None
    trained.free_choice = free_choice
    if trained.wrapped and distributed.sharded_by():
        raise distributed.cannot_shard("auxiliary heads")
    return trained, objective, items


def prepare_stage(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    processor: Any,
    items: Any = None,
    heads: Mapping[str, Tensor] | None = None,
    base: dict[str, Any] | None = None,
) -> tuple[StageModel, Objective | None]:
    """Set a model as a stage says, choose what learns, and add the heads and low-rank updates that the stage has.

    Args:
        model, processor: the model is changed in place; without a processor there is no objective.
        items: of a stage whose data are items.
        heads: tensors of auxiliary heads that earlier stages left.
        base: what an adapter keeps of the model under it (`Start.base_record`).
    """
    seed, objective, module, heads = seed_of(recipe, stage), None, model, heads or {}
    set_forward(model.config, stage)
    torch.manual_seed(seed)
    if processor is not None:
        source = find_source(stage.data or recipe.data)
        setup = Setup(stage, model.config, processor, seed, source and source(seed), items, recipe.validation, heads)
        objective = make_objective(setup)
        module = objective.wrap(model)
    set_trainable(model, stage.freeze, stage.train)
    trained = StageModel(model, processor, module, None, heads)
    if stage.lora is not None:
        trained.adapter = lora.adapt(model, stage.lora, base)
        trained.module = trained.adapter.peft if module is model else module
    return trained, objective


def seed_of(recipe: Recipe, stage: Stage) -> int:
    """The seed of a stage's examples and heads."""
    return recipe.seed if stage.seed is None else stage.seed


def _train(trainer: StageTrainer, record: Record | None) -> None:
    """Let the Trainer train, from the checkpoint of a record where there is one."""
    run, model = trainer.stage_run, trainer.stage_run.trained.model
    place, samples = run.checkpoints.place, run.steps * run.stage.batch * run.stage.accumulate
    start = str(run.checkpoints.path(record)) if record else None
    if not distributed.main():  # else all processes would draw the same masks
        torch.manual_seed(run.seed + distributed.number())
    sharded, step = distributed.optimizer_form(trainer) is not None, record["step"] if record else 0
    with metrics.logging_to(place.parents[1], place, run.stage.name, samples, run.tally, step) as callbacks:
        for callback in callbacks:
            trainer.add_callback(callback)
        try:
            with synchronised_ranks(sharded), cached_features(model, run.stage.remember):
                trainer.train(resume_from_checkpoint=start)
        except RuntimeError as error:  # a dataloader worker was told to stop, too
            if run.signals.seen is None:
                raise
            said = f"stopped in the midst of a step of {run.stage.name}; {run.checkpoints.say_last()}"
            raise Stopped(said, run.signals.seen) from error


def _finish(trainer: StageTrainer, start: Start) -> Record:
    """Merge the stage's low-rank updates and write its model; settings of the stage are reset, and do not ship."""
    run, trained = trainer.stage_run, trainer.stage_run.trained
    recipe, stage, checkpoints = run.recipe, run.stage, run.checkpoints
    if distributed.optimizer_form(trainer) is not None:
        distributed.unshard(trained.model)
        distributed.forget_sharding()
    best = distributed.from_main(checkpoints.best())
    record: Record = {
        "stage": stage.name,
        "samples": run.steps * stage.batch * stage.accumulate,
        "seconds": round(run.tally.seconds, 1),
        "loss": round(run.tally.loss_sum / run.steps, 4),
    }
    if best is not None:
        record["best"] = {k: best[k] for k in ("step", "eval_loss")}
    with distributed.together(), writing(checkpoints.place, checkpoints):
        if distributed.main():
            reset_forward(trained.model.config, recipe.stages[: recipe.stages.index(stage) + 1])
            if trained.adapter is not None:
                trained.processor.free_choice = trained.free_choice or recipe.data.free_choice
                with replacing_folder(checkpoints.place / "adapter") as aside:
                    trained.adapter.save(aside)
                    trained.processor.save_pretrained(aside)
                trained.merge()
            trained.processor.free_choice = trained.free_choice
            with finishing(checkpoints.place, {**record, "digest": checkpoints.digest}) as aside:
                trained.save(aside)
            checkpoints.close()
    return record


def _check_data(recipe: Recipe, stages: Sequence[Stage]) -> None:
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
    raise stopped if distributed.main() else distributed.Elsewhere(stopped)


def save_final(recipe: Recipe, history: list[dict[str, Any]], last: Start, folder: Path) -> Path:
    """The finished model, as it ships: weights in the recipe's dtype, processor, and where it all came from."""
    import transformers

    from relook import __version__

    model, processor = open_start(last)
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
    processor.free_choice = processor.free_choice or recipe.data.free_choice
    model.config.domain = recipe.domain  # not that of the weights it started from
    with replacing_folder(folder) as aside:
        model.to(getattr(torch, recipe.save_dtype)).save_pretrained(aside)
        processor.save_pretrained(aside)
    return folder


def steps_of(stage: Stage, items: Any = None) -> int:
    """Optimizer steps of a stage; `items` (None for a synthetic dataset) are passed over `epochs` times at most."""
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
