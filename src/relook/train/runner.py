"""Carrying out a recipe: every stage starts from a folder and ends as a folder.

A run is a folder: `recipe.yaml` as used, `log.jsonl`, `tensorboard/`, `stages/<nr>-<name>/` with the model after every
stage (and, while it runs, its checkpoints), `curves.png`, and `final/` with the model as it ships. A rerun skips the
stages that are done and goes on inside the one that was cut; one that differs in what decides the weights is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.data.dataset import open_items, open_source
from relook.errors import UserError
from relook.io import locked_folder, nearest, replacing_folder
from relook.model.start import Start, StartInfo, describe_start, open_start
from relook.plugins import find
from relook.train import distributed, lora
from relook.train.checkpoints import GO_ON, MADE_OF, Checkpoints, Record, StageModel, made_of, read_heads
from relook.train.distributed import Signals, Stopped
from relook.train.metrics import BOARD, CURVES, LOG, SKIPPED, SkippedReport, check_reporters, draw_curves
from relook.train.objective import Objective, Setup, find_objective
from relook.train.optim import PARTS, in_part, set_trainable
from relook.train.recipe import Data, Recipe, Stage, load_recipe, set_forward
from relook.train.trainer import StageTrainer

OVERWRITTEN = ".overwritten"
PARTS_OF_A_RUN = ("recipe.yaml", LOG, CURVES, BOARD, "final")  # beside stages/


def run(
    recipe: str | Path | Recipe, overrides: Sequence[str] = (), out: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Train what a recipe says and return the folder of the finished model.

    Args:
        recipe: a YAML file, or a recipe already checked.
        overrides: `key=value`, see `recipe.load_recipe`; `out=FOLDER` among them is taken as `out`.
        out: the run's folder; `runs/<recipe name>` unless given.
        overwrite: start over, whatever run the folder holds.

    Raises:
        UserError: the recipe does not hold together, or the folder holds another run; before any training.
    """
    for o in overrides:
        out = o.removeprefix("out=") if o.startswith("out=") else out
    with distributed.joined(), ExitStack() as held:
        with distributed.together():
            if not isinstance(recipe, Recipe):
                recipe = load_recipe(recipe, [o for o in overrides if not o.startswith("out=")])
            folder = Path(out) if out is not None else Path("runs") / recipe.name
            torch.set_num_threads(recipe.threads)
            check(recipe)
            names = [f"{number:02d}-{stage.name}" for number, stage in enumerate(recipe.stages)]
            places = [Checkpoints(folder / "stages" / name, recipe.keep_last) for name in names]
            waiting = zip(recipe.stages, places, strict=True)
            _check_data(recipe, [stage for stage, place in waiting if overwrite or place.finished() is None])
        with distributed.together():
            if distributed.main():
                held.enter_context(locked_folder(folder))
                _begin_run(recipe, folder, places, overwrite)
        with Signals() as signals:
            try:
                _run_stages(recipe, folder, places, signals)
            except Stopped:
                if distributed.main():
                    draw_curves(folder)
                raise
            finally:
                if distributed.main():
                    _put_back(folder)
    return folder / "final"


def _begin_run(recipe: Recipe, folder: Path, places: list[Checkpoints], overwrite: bool) -> None:
    """Tell every stage's folder what it is made of; with `overwrite`, nothing is left of an earlier run.

    Raises:
        UserError: the folder holds a run that was begun with something else; names what differs.
    """
    if overwrite:
        _set_aside(recipe, folder)
    before = None
    for stage, place in zip(recipe.stages, places, strict=True):
        place.made = made_of(recipe, stage, before)
        _refuse(folder, place.difference())
        before = place.begun() or place.made
    for path in set(folder.glob("stages/*")) - {place.place for place in places}:
        _refuse(folder, Checkpoints(path, 1).difference() and f"the stage {path.name}, which the recipe lacks")


def _set_aside(recipe: Recipe, folder: Path) -> None:
    """Move the run that a folder holds into `OVERWRITTEN` in it, where it stays until the new one has begun.

    Raises:
        UserError: what is there is no run, or the recipe starts or learns from it.
    """
    parts = [path for name in (*PARTS_OF_A_RUN, "stages") if (path := folder / name).exists()]
    if parts and not any(folder.glob(f"stages/*/{MADE_OF}")):
        raise UserError(
            f"{parts[0]} is there, but no run that could be overwritten (stages/*/{MADE_OF}); give another folder with "
            "out="
        )
    model = recipe.model
    sources = [each for stage in recipe.stages for each in recipe.data_of(stage).all_sources()]
    needed = [model.start, model.visual, model.detection, model.seg]
    needed += [path for source in sources for path in (source.path, source.image_root)]
    for name in filter(None, needed):
        if any(Path(name).resolve().is_relative_to(part.resolve()) for part in parts):
            raise UserError(
                f"{folder} would be overwritten, but this recipe needs {name}; move that elsewhere, or give another "
                "folder with out="
            )
    if parts:
        shutil.rmtree(folder / OVERWRITTEN, ignore_errors=True)
        (folder / OVERWRITTEN).mkdir()
    for path in parts:
        path.rename(folder / OVERWRITTEN / path.name)


def _put_back(folder: Path) -> None:
    """Undo `_set_aside`, where a run ended before it began."""
    for path in (folder / OVERWRITTEN).glob("*"):
        if (folder / path.name).exists():
            shutil.rmtree(folder / path.name) if path.is_dir() else (folder / path.name).unlink()
        path.rename(folder / path.name)
    shutil.rmtree(folder / OVERWRITTEN, ignore_errors=True)


def _refuse(folder: Path, differs: str) -> None:
    if differs:
        raise UserError(
            f"{folder} holds a run that differs: {differs}; undo the change, give another folder with out=, or start "
            "over with --overwrite"
        )


def _run_stages(recipe: Recipe, folder: Path, places: list[Checkpoints], signals: Signals) -> None:
    """All stages that are not done yet, and the model as it ships."""
    start = recipe.model
    for stage, place in zip(recipe.stages, places, strict=True):
        record = distributed.from_main(place.finished())
        if record is not None:
            distributed.say(f"{stage.name}: already done, taken from {place.place}")
        else:
            record = train_stage(recipe, stage, start, place, signals)
            signal = signals.agree()
            if signal is not None and stage is not recipe.stages[-1]:
                said = f"stopped after stage {stage.name}, which is kept in {place.place}; {GO_ON}"
                raise distributed.for_all(Stopped(said, signal))
        start = Start.model_validate({"start": str(place.place)})
    with distributed.together(), place.writing(folder):
        if distributed.main():
            draw_curves(folder)
            _save_final(recipe, start, folder / "final")


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
            checkpoints.begin(recipe)  # not before: a run that is refused leaves no folder
            shutil.rmtree(checkpoints.place.parents[1] / OVERWRITTEN, ignore_errors=True)
    record = distributed.from_main(checkpoints.last())
    begun = record["step"] if record is not None else 0
    if record is not None:
        distributed.say(f"{stage.name}: goes on from step {begun} of {steps}")
    skipped = SkippedReport(items.data.max_broken, items.unreadable) if items is not None else SkippedReport(0.0)
    skipped.open(checkpoints.place / SKIPPED, begun * stage.batch * stage.accumulate)
    trainer = StageTrainer(recipe, stage, trained, objective, steps, checkpoints, skipped, record)
    try:
        trainer.run(signals)
    except RuntimeError as error:  # a dataloader worker was told to stop, too
        if signals.seen is None:
            raise
        said = f"stopped in the midst of a step of {stage.name}; {checkpoints.say_last()}"
        raise Stopped(said, signals.seen) from error
    if told := skipped.say():
        distributed.say(f"{stage.name}: {told}")
    step = trainer.state.global_step
    if signals.seen is not None and step < steps:
        said = f"stopped at step {step} of {steps}, saved in {checkpoints.path({'step': step})}; {GO_ON}"
        raise distributed.for_all(Stopped(said, signals.seen))
    return _finish(trainer)


def _open_stage(recipe: Recipe, stage: Stage, start: Start) -> tuple[StageModel, Objective, Any]:
    """Load the stage's model and its items (None of a synthetic dataset), and prepare both."""
    model, processor = open_start(start, seed=recipe.seed, domain=recipe.domain)
    for parameter in model.parameters():  # out of the mapped file, where the alignment of a weight decides its rounding
        parameter.data = parameter.data.clone()
    data, items, known = recipe.data_of(stage), None, model.config.provenance or {}
    trained = StageModel(model, processor, free_choice=processor.free_choice)
    if start is recipe.model:
        trained.base = start.base_record(recipe.seed)
        trained.origin = {"from": Path(start.start).name, **known} if start.start is not None else None
    else:
        trained.heads, trained.origin = read_heads(str(start.start)), known.get("start")
    processor.free_choice = processor.free_choice or data.free_choice
    if data.source == "json":
        items = open_items(data, recipe.seed_of(stage), recipe.validation.items, processor)
    objective = prepare_stage(recipe, stage, trained, items)
    assert objective is not None
    distributed.refuse_sharding("auxiliary heads", trained.outer is not None)
    return trained, objective, items


def prepare_stage(recipe: Recipe, stage: Stage, trained: StageModel, items: Any = None) -> Objective | None:
    """Set a model, in place, as a stage says: what learns, and the heads and low-rank updates that the stage has.

    Args:
        items: of a stage whose data are items.

    Returns:
        The objective; None where the model has no processor.
    """
    model, seed, objective = trained.model, recipe.seed_of(stage), None
    set_forward(model.config, stage)
    torch.manual_seed(seed)
    if trained.processor is not None:
        source = find_source(recipe.data_of(stage))
        about = stage, model.config, trained.processor, seed, source and source(seed), items
        objective = find_objective(stage)(Setup(*about, recipe.validation, trained.heads))
        outer = objective.wrap(model)
        trained.outer = outer if outer is not model else None
    set_trainable(model, stage.freeze, stage.train)
    trained.adapter = lora.adapt(model, stage.lora, trained.base) if stage.lora is not None else None
    return objective


def _finish(trainer: StageTrainer) -> Record:
    """Merge the stage's low-rank updates and write its model; settings of the stage are reset, and do not ship."""
    recipe, stage, trained, checkpoints = trainer.recipe, trainer.stage, trainer.trained, trainer.checkpoints
    if trainer.form is not None:
        distributed.unshard(trained.model)
        distributed.forget_sharding()
    best = distributed.from_main(checkpoints.best())
    record: Record = {
        "stage": stage.name,
        "samples": trainer.samples,
        "seconds": round(trainer.metrics.seconds, 1),
        "loss": round(trainer.metrics.loss_sum / trainer.steps, 4),
        "looks": sorted(trainer.metrics.looks),
    }
    if best is not None:
        record["best"] = {k: best[k] for k in ("step", "eval_loss")}
    with distributed.together(), checkpoints.writing(), trainer.described(record):
        if distributed.main():
            if trained.adapter is not None:
                trained.processor.free_choice = trained.free_choice or recipe.data.free_choice
                with replacing_folder(checkpoints.place / "adapter") as aside:
                    trained.adapter.save(aside)
                    trained.processor.save_pretrained(aside)
                trained.adapter.merge()
                trained.adapter = None
            trained.processor.free_choice = trained.free_choice
            with checkpoints.finishing(record) as aside:
                trained.save(aside)
    return record


def _save_final(recipe: Recipe, last: Start, folder: Path) -> None:
    """The finished model, as it ships: weights in the recipe's dtype."""
    model, processor = open_start(last)
    processor.free_choice = processor.free_choice or recipe.data.free_choice
    with replacing_folder(folder) as aside:
        model.to(getattr(torch, recipe.save_dtype)).save_pretrained(aside)
        processor.save_pretrained(aside)


def steps_of(stage: Stage, items: Any = None) -> int:
    """Optimizer steps of a stage; `items` (None for a synthetic dataset) are passed over `epochs` times at most."""
    samples = stage.samples
    if stage.epochs is not None and items is not None:
        samples = min(samples, int(stage.epochs * len(items)))
    return max(1, samples // (stage.batch * stage.accumulate))


# -- before anything is trained ---------------------------------------------------------------------------------------


def check(recipe: Recipe) -> StartInfo:
    """Check every stage of a recipe against the model it starts from; returns what is known of that model.

    Raises:
        UserError: an objective or an option that there is none of, a part or a layer that the model does not have, a
            package that is not installed, a step that cannot be divided over the processes, what cannot be sharded.
    """
    check_reporters(recipe.report_to)
    distributed.check_sharding(recipe)
    for stage in recipe.stages:
        distributed.divided(stage.batch, stage.accumulate, distributed.count())
        data = recipe.data_of(stage)
        find_objective(stage).check(stage, data.source == "json")
        find_source(data)
    info = describe_start(recipe.model, seed=recipe.seed, domain=recipe.domain)
    model = info.meta_model()
    check_parts(model, recipe.stages)
    for stage in recipe.stages:
        if stage.lora is not None:
            lora.check_lora(model, stage.lora)
    return info


def find_source(data: Data) -> Any:
    """The synthetic dataset of a recipe's data, a function of the seed; None where data are items."""
    if data.source != "world" or not data.world:
        return None
    return find("source", data.world, {}, "data.world", callable)


def check_parts(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Refuse stages that name parts the model does not have.

    Raises:
        UserError: names the part, the nearest there is, and all there are.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = [part for part in PARTS if any(in_part(name, part) for name in names)]
    for stage in stages:
        saved = stage.lora.modules_to_save if stage.lora is not None else []
        for part in [*stage.freeze, *(stage.train or ()), *stage.lr_scale, *saved]:
            if not any(in_part(name, part) for name in names):
                raise UserError(
                    f"Stage {stage.name!r}: the model has no part {part!r} ({nearest(part, known, 0.5)}); parts are "
                    f"{', '.join(known)}, or pieces of parameter names such as layers.0"
                )


def _check_data(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Open the sets of all stages that are still to come: one that is missing is told before hours of training.

    Raises:
        UserError: a set that is not there, or nothing that can be read.
    """
    used = [recipe.data_of(stage) for stage in stages]
    sources = [source for data in used if data.source == "json" for source in data.all_sources()]
    for source in {source.model_dump_json(): source for source in sources}.values():
        open_source(source)
