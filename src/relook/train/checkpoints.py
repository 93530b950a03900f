"""What a run keeps on disk: the end of every stage, and checkpoints inside a stage. Nothing here is ever half-written.

    stages/00-dense/                 weights.safetensors, throwaway.safetensors, done.json (its record)
    stages/00-dense/checkpoints/     step-200/, step-400/: each a model folder that `relook.load` takes, and beside the
                                     model what training needs to go on; checkpoint.json is its record

A record holds the digest of all that the recipe says about these weights. What has no record, or that of another
recipe, does not exist: everything is written aside, the record last, and takes its name when all of it is on the disk.

Knows files and digests; what writes a checkpoint's inside is transformers' Trainer (`trainer`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.train.faults import GO_ON, writing
from relook.train.recipe import Recipe, Stage

RECORD = "checkpoint.json"
HEADS = "heads.safetensors"
Record = dict[str, Any]


def digest(before: str, recipe: Recipe, stage: Stage) -> str:
    """Names everything that a recipe says about the weights after a stage (what it leaves at its default apart).

    `before` is the digest of the stage before, "" for the first.
    """
    told: dict[str, Any] = {"exclude_defaults": True}
    mended = {"max_broken"}  # when to stop: what is learnt is the same
    parts = recipe.model.model_dump(**told), recipe.data.model_dump(**told, exclude=mended)
    said: list[Any] = [before or [recipe.seed, *parts], stage.model_dump(**told, exclude={"data": mended})]
    if recipe.validation.items and (stage.data or recipe.data).source == "json":
        said.append(recipe.validation.items)  # fewer are left to learn from
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# -- the end of a stage


def finished(place: Path, digest: str) -> Record | None:
    """The record of a stage that is done, None where it is not or belongs to another recipe."""
    return _read(place / "done.json", digest)


def keep_stage(model: nn.Module, place: Path, record: Record) -> None:
    """Weights first, the record last; an older record goes before its weights do."""
    from safetensors.torch import save_file, save_model

    place.mkdir(parents=True, exist_ok=True)
    (place / "done.json").unlink(missing_ok=True)
    heads = model.__dict__.get("_throwaway", {})
    tensors = {f"{name}/{key}": value for name, head in heads.items() for key, value in _state(head).items()}
    for name, save in (
        ("weights.safetensors", lambda path: save_model(model, str(path))),
        ("throwaway.safetensors", lambda path: save_file(tensors, str(path))),
        ("done.json", lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8")),
    ):
        aside = place / f"{name}.part"
        try:
            save(aside)
            _settle(aside)
            os.replace(aside, place / name)
        finally:
            aside.unlink(missing_ok=True)


def restore_stage(model: nn.Module, place: Path) -> None:
    """Put the weights and throwaway heads of a finished stage into the model."""
    from safetensors.torch import load_model

    load_model(model, str(place / "weights.safetensors"))
    restore_heads(model, place)


def restore_heads(model: nn.Module, place: Path) -> None:
    """Give the model the throwaway heads of a finished stage, for the next objective that asks for them."""
    from safetensors.torch import load_file

    heads: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(place / "throwaway.safetensors").items():
        name, _, inner = key.partition("/")
        heads.setdefault(name, {})[inner] = value
    model.__dict__["_throwaway"] = heads


def _state(head: nn.Module | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A throwaway head's tensors: a module that a stage used, or what `restore_stage` read and no stage used yet."""
    return head.state_dict() if isinstance(head, nn.Module) else head


# -- inside a stage


@dataclass
class Checkpoints:
    """The checkpoints of one stage.

    Args:
        place: the stage's folder.
        digest: of the recipe up to this stage.
        keep: how many are kept beside the best, which is the one of least `eval_loss`.
    """

    place: Path
    digest: str
    keep: int

    @property
    def folder(self) -> Path:
        return self.place / "checkpoints"

    @property
    def aside(self) -> Path:
        """Where the Trainer writes; a folder there has no record yet."""
        return self.place / "checkpoints.part"

    def path(self, record: Record) -> Path:
        return self.folder / f"step-{record['step']}"

    def found(self) -> list[Record]:
        """Records of the whole checkpoints of this recipe, by step."""
        records = (_read(path / RECORD, self.digest) for path in self.folder.glob("step-*"))
        return sorted((r for r in records if r is not None), key=lambda r: r["step"])

    def last(self) -> Record | None:
        return next(reversed(self.found()), None)

    def best(self) -> Record | None:
        """The checkpoint of least validation loss; None where none was evaluated."""
        known = [r for r in self.found() if r.get("eval_loss") is not None]
        return min(known, key=lambda r: r["eval_loss"]) if known else None

    def clear_aside(self) -> None:
        """Remove what a killed run left half-written."""
        shutil.rmtree(self.aside, ignore_errors=True)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around what writes a checkpoint: a write that fails is told (`faults.writing`) and leaves nothing behind."""
        with writing(self.folder, self.say_last):
            try:
                yield
            except BaseException:
                self.clear_aside()
                raise

    def publish(self, record: Record) -> Path:
        """Give the checkpoint that the Trainer wrote its record and its name; then drop what is not kept."""
        part, target = self.aside / f"checkpoint-{record['step']}", self.path(record)
        (part / RECORD).write_text(json.dumps({"digest": self.digest, **record}, indent=1), encoding="utf-8")
        _settle(part)
        self.folder.mkdir(parents=True, exist_ok=True)
        if target.exists():  # of another recipe
            _remove(target)
        os.replace(part, target)
        _sync(self.folder)
        self.clear_aside()
        self.drop([*self.found()[-self.keep :], self.best()])
        return target

    def drop(self, kept: list[Record | None]) -> None:
        """Remove all checkpoints but these, those of other recipes too."""
        paths = {self.path(record) for record in kept if record is not None}
        for path in self.folder.glob("step-*"):
            if path not in paths:
                _remove(path)

    def close(self) -> Record | None:
        """When the stage is done its end is kept elsewhere: only the best checkpoint stays. Returns its record."""
        best = self.best()
        self.drop([best])
        self.clear_aside()
        if best is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        return best

    def say_last(self) -> str:
        """For a message: where the last good checkpoint is."""
        record = self.last()
        if record is not None:
            return f"the last good checkpoint is {self.path(record)}; {GO_ON}"
        before = sorted(self.place.parent.glob("*/done.json")) if self.place.parent.is_dir() else []
        if before:
            return f"the last good checkpoint is the end of the stage in {before[-1].parent}; {GO_ON}"
        return "there is no checkpoint yet (see save_every)"


def write_weights(objective: Any, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """The model as a model folder, with its processor; and the objective's own heads beside it.

    `state` is the objective's, where its own weights are not whole (`sharding`).
    """
    from safetensors.torch import save_file

    with _quiet():
        if objective.adapter is not None:
            objective.adapter.save(folder)
        else:
            whole = state and {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
            objective.model.save_pretrained(folder, state_dict=whole)
    objective.processor.save_pretrained(folder)
    heads = {k: v.contiguous() for k, v in (state or objective.state_dict()).items() if not k.startswith("model.")}
    save_file(heads, str(Path(folder) / HEADS))


def read_weights(objective: Any, folder: str | Path) -> None:
    """Back into a model and heads of the same shape, bit by bit."""
    from safetensors.torch import load_file

    from relook.model.loading import load_model

    model: Any = objective.model
    if objective.adapter is not None:
        objective.adapter.restore(folder)
    else:
        with _quiet():
            kept = load_model(folder, dtype=model.dtype, device="cpu")
        model.load_state_dict(kept.state_dict())
    heads = load_file(Path(folder) / HEADS)
    objective.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()} | heads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, of which there would be one for every checkpoint."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read(path: Path, digest: str) -> Record | None:
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record.get("digest") == digest else None


def _remove(folder: Path) -> None:
    """The record first, so that what is half gone does not exist."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _settle(path: Path) -> None:
    """Wait until a file, or a folder and all in it, is on the disk."""
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync(inner)
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX lets a folder be synced
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
