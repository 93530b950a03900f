"""Carrying out a recipe: stage after stage through transformers' Trainer, with a checkpoint after each.

A run is a folder: `recipe.yaml` as used, `log.jsonl`, `stages/<nr>-<name>/` with the weights after every stage, and
`final/` with the model as it ships. A rerun skips the stages whose recipe (and everything before them) has not changed.

Knows Trainer, files and clocks; what a stage learns is `stages`' business.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from relook.data.worlds import make_world
from relook.errors import UserError
from relook.train.optimiser import build_optimiser, in_part, schedule
from relook.train.recipe import Data, Recipe, Stage, load_recipe
from relook.train.stages import Objective, make_objective

logger = logging.getLogger(__name__)


class Examples(torch.utils.data.Dataset):
    """An objective's examples as a map-style dataset: entry i is `objective.example(i)`, whoever asks and whenever."""

    def __init__(self, objective: Objective, samples: int) -> None:
        self.objective, self.samples = objective, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return self.objective.example(index)


class Journal(TrainerCallback):
    """Writes the objective's figures to log.jsonl and to stderr as training goes."""

    def __init__(self, path: Path, stage: Stage, objective: Objective) -> None:
        self.path, self.stage, self.objective = path, stage, objective
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        figures = self.objective.figures()
        if not logs or not figures:  # nothing new since the last entry
            return
        seconds = time.perf_counter() - self.started
        done = min(state.global_step * self.stage.batch * self.stage.accumulate, self.stage.samples)
        record = {
            "stage": self.stage.name,
            "samples": done,
            "seconds": round(seconds, 1),
            "loss": logs.get("loss", logs.get("train_loss")),
        }
        record |= {k: round(v, 4) for k, v in figures.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if isinstance(v, float) and k != "seconds")
        print(f"{self.stage.name} {done}/{self.stage.samples}  {seconds:.0f} s  {shown}", file=sys.stderr, flush=True)


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
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, given)
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    _write_recipe(recipe, folder)
    torch.set_num_threads(recipe.threads)
    model, processor = _start(recipe)
    check_parts(model, recipe)
    history: list[dict[str, Any]] = []
    digest = ""
    for number, stage in enumerate(recipe.stages):
        digest = _digest(digest, recipe, stage)
        place = folder / "stages" / f"{number:02d}-{stage.name}"
        finished = _finished(place, digest)
        if finished is None:
            finished = run_stage(model, processor, recipe, stage, folder / "log.jsonl")
            _keep(model, place, {**finished, "digest": digest})
        else:
            print(f"{stage.name}: already done, taken from {place}", file=sys.stderr)
            _restore(model, place)
        history.append({k: v for k, v in finished.items() if k != "digest"})
    return save_final(model, processor, recipe, history, folder / "final")


def run_stage(model: Any, processor: Any, recipe: Recipe, stage: Stage, log: Path) -> dict[str, Any]:
    """One stage of training in place; returns its record (samples, seconds, last figures)."""
    seed = recipe.seed if stage.seed is None else stage.seed
    data = stage.data or recipe.data
    torch.manual_seed(seed)
    objective = make_objective(model, processor, _world(data, seed), stage, seed, _items(data))
    freeze(model, stage.freeze)
    model.train()
    per_step = stage.batch * stage.accumulate
    steps = max(1, stage.samples // per_step)
    optimiser = build_optimiser(objective.named_parameters(), stage)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule(stage, steps))
    arguments = TrainingArguments(
        output_dir=str(log.parent / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=stage.batch,
        gradient_accumulation_steps=stage.accumulate,
        max_grad_norm=stage.clip,
        logging_steps=recipe.log_every,
        train_sampling_strategy="sequential",  # the examples are drawn at random already; order is part of the recipe
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )
    journal = Journal(log, stage, objective)
    trainer = Trainer(
        model=objective,
        args=arguments,
        train_dataset=Examples(objective, steps * per_step),
        data_collator=objective.collate,
        optimizers=(optimiser, scheduler),
        callbacks=[journal],
    )
    trainer.remove_callback(_printer())
    result = trainer.train()
    seconds = round(time.perf_counter() - journal.started, 1)
    freeze(model, [])
    return {
        "stage": stage.name,
        "samples": steps * per_step,
        "seconds": seconds,
        "loss": round(result.training_loss, 4),
    }


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Let every parameter learn but those of the named parts (dotted pieces of parameter names, e.g. "visual").

    Parameters that the model itself never trains (unused members of published projectors) stay as they are.
    """
    for name, parameter in model.named_parameters():
        unused = ".linear_feature." in name or ".layernorm_feature." in name
        if not unused:
            parameter.requires_grad_(not any(in_part(name, part) for part in parts))


def check_parts(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a recipe that freezes or scales parts the model does not have.

    Raises:
        UserError: names the part and those there are.
    """
    names = [name for name, _ in model.named_parameters()]
    for stage in recipe.stages:
        for part in [*stage.freeze, *stage.lr_scale]:
            if not any(in_part(name, part) for name in names):
                known = sorted({piece for name in names for piece in name.split(".")[:2]} - {"model"})
                raise UserError(
                    f"Stage {stage.name!r}: the model has no part {part!r}; parts are {', '.join(known)}, ..."
                )


def save_final(model: Any, processor: Any, recipe: Recipe, history: list[dict[str, Any]], folder: Path) -> Path:
    """The finished model, as it ships: weights in the recipe's dtype, processor, and where it all came from."""
    import transformers

    from relook import __version__

    model.config.provenance = {
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
    model.to(getattr(torch, recipe.save_dtype)).save_pretrained(folder)
    model.to(trained)
    processor.save_pretrained(folder)
    return folder


def _start(recipe: Recipe) -> tuple[Any, Any]:
    """The model and processor a recipe begins with, in float32."""
    if recipe.model.size is not None:
        from relook.train import tiny

        model, processor = tiny.build(recipe.model.size, recipe.seed, domain=recipe.domain)
        if recipe.model.visual is not None:
            _take_tower(model, recipe.model.visual)
        return model, processor
    from relook.model.loading import load_model, load_processor

    assert recipe.model.start is not None
    return load_model(recipe.model.start, dtype=torch.float32), load_processor(recipe.model.start)


def _take_tower(model: Any, source: str) -> None:
    """Put the vision tower of other weights into a fresh model, and remember where it came from.

    Raises:
        UserError: the towers differ in shape.
    """
    from relook.model.loading import load_model

    other = load_model(source, dtype=torch.float32)
    try:
        model.model.visual.load_state_dict(other.model.visual.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"the vision tower of {source} does not fit into this model: {first}") from error
    model.config.tower = {"from": Path(source).name, **(getattr(other.config, "provenance", None) or {})}


def _world(data: Data, seed: int) -> Any:
    return make_world(data.world, seed) if data.source == "world" and data.world else None


def _items(data: Data) -> Any:
    if data.source != "json":
        return None
    from relook.data.dataset import ItemsDataset

    assert data.path is not None
    return ItemsDataset(data.path, data.image_root)


def _digest(before: str, recipe: Recipe, stage: Stage) -> str:
    """Names everything that a recipe says about the weights after a stage (what it leaves at its default apart)."""
    start = before or [recipe.seed, *(part.model_dump(exclude_defaults=True) for part in (recipe.model, recipe.data))]
    text = json.dumps([start, stage.model_dump(exclude_defaults=True)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(place: Path, digest: str) -> dict[str, Any] | None:
    record = place / "done.json"
    if not record.is_file():
        return None
    done = json.loads(record.read_text(encoding="utf-8"))
    return done if done.get("digest") == digest else None


def _keep(model: nn.Module, place: Path, record: dict[str, Any]) -> None:
    """Weights first, the record last: a folder without a record is an unfinished stage."""
    from safetensors.torch import save_file, save_model

    place.mkdir(parents=True, exist_ok=True)
    save_model(model, str(place / "weights.safetensors"))
    heads = model.__dict__.get("_throwaway", {})
    tensors = {f"{name}/{key}": value for name, head in heads.items() for key, value in _state(head).items()}
    save_file(tensors, str(place / "throwaway.safetensors"))
    temporary = place / "done.json.part"
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(temporary, place / "done.json")


def _restore(model: nn.Module, place: Path) -> None:
    from safetensors.torch import load_file, load_model

    load_model(model, str(place / "weights.safetensors"))
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(place / "throwaway.safetensors").items():
        name, _, inner = key.partition("/")
        heads.setdefault(name, {})[inner] = value
    model.__dict__["_throwaway"] = heads


def _state(head: nn.Module | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a throwaway head: a module that a stage used, or what `_restore` read and no stage used yet."""
    return head.state_dict() if isinstance(head, nn.Module) else head


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    import yaml

    text = yaml.safe_dump(recipe.model_dump(exclude_defaults=True), sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def _printer() -> type[TrainerCallback]:
    from transformers import PrinterCallback

    return PrinterCallback
