"""What a run keeps on disk: the end of every stage, and checkpoints inside a stage. Nothing here is ever half-written.

    stages/00-dense/                 a model folder that `relook.load` takes; heads.safetensors where the run has
                                     auxiliary heads; done.json is the record
    stages/00-dense/checkpoints/     step-200/, step-400/: the same, and beside it what training needs to go on;
                                     checkpoint.json is the record

A record holds the digest of all that the recipe says about these weights. What has no record, or that of another
recipe, does not exist: everything is written aside, the record last, and takes its name when all of it is on the disk.
The inside of a checkpoint is written by transformers' Trainer (`trainer`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from relook.errors import RelookError, UserError
from relook.model.adapters import Adapter
from relook.train.recipe import Recipe, Stage

RECORD, DONE = "checkpoint.json", "done.json"
HEADS = "heads.safetensors"
GO_ON = "the same command goes on from there"
Record = dict[str, Any]


def digest(before: str, recipe: Recipe, stage: Stage) -> str:
    """Names everything that a recipe says about the weights after a stage (what it leaves at its default apart).

    `before` is the digest of the stage before, "" for the first.
    """
    changed: dict[str, Any] = {"exclude_defaults": True}
    mended = {"max_broken"}  # when to stop: what is learnt is the same
    parts = recipe.model.model_dump(**changed), recipe.data.model_dump(**changed, exclude=mended)
    said: list[Any] = [before or [recipe.seed, *parts], stage.model_dump(**changed, exclude={"data": mended})]
    if recipe.validation.items and (stage.data or recipe.data).source == "json":
        said.append(recipe.validation.items)  # fewer are left to learn from
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# -- a model that trains, and its files


@dataclass
class StageModel:
    """A model while a stage trains it.

    Attributes:
        module: what the Trainer trains: `model`, peft's wrapper around it, or a module with auxiliary heads around it
            (whose attribute `model` it is then).
        heads: tensors of auxiliary heads that earlier stages left.
        free_choice: what the processor said before the stage's data had their say (`processor.free_choice`).
    """

    model: Any
    processor: Any
    module: nn.Module
    adapter: Adapter | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    free_choice: bool = False

    @property
    def wrapped(self) -> bool:
        """Whether the stage has auxiliary heads."""
        return self.module is not self.model and (self.adapter is None or self.module is not self.adapter.peft)

    def merge(self) -> None:
        """Merge the low-rank updates into the model, in place."""
        assert self.adapter is not None
        self.adapter.merge()
        self.module = self.module if self.wrapped else self.model
        self.adapter = None

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model (or its adapter) as a folder that `relook.load` takes, with the heads of all stages so far.

        `state` is the model's, where its own weights are not whole (sharded).
        """
        with _no_bars():
            if self.adapter is not None:
                self.adapter.save(folder)
            else:
                self.model.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)
        own = self._own_heads()
        if heads := {**self.heads, **{name: value.contiguous() for name, value in own.items()}}:
            from safetensors.torch import save_file

            save_file(heads, str(Path(folder) / HEADS))

    def load(self, folder: str | Path) -> None:
        """Load what `save` wrote into the model and heads of the same shape, strictly and bit by bit."""
        from relook.model.loading import load_model

        if self.adapter is not None:
            self.adapter.restore(folder)
        else:
            with _no_bars():
                kept = load_model(folder, dtype=self.model.dtype, device="cpu")
            self.model.load_state_dict(kept.state_dict())
        if own := self._own_heads():
            found = read_heads(folder)
            state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
            self.module.load_state_dict(state | {name: found[name] for name in own if name in found})

    def _own_heads(self) -> dict[str, Tensor]:
        state = self.module.state_dict() if self.wrapped else {}
        return {name: value for name, value in state.items() if not name.startswith("model.")}


def read_heads(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of auxiliary heads beside a model; none where there are none."""
    from safetensors.torch import load_file

    path = Path(folder) / HEADS
    return load_file(path) if path.is_file() else {}


# -- the end of a stage


def refuse_older_run(folder: Path) -> None:
    """Raises UserError where a finished stage of a run is no model folder, as versions before 2026-11-28 left them.

    Such a run is neither gone on with (a stage took settings of the one before it) nor replaced.
    """
    old = next(iter(sorted(folder.glob("stages/*/weights.safetensors"))), None)
    if old is not None:
        raise UserError(
            f"{folder} holds a run of an older version of relook ({old.parent.name} has weights and no config.json); "
            "give another folder with out=, or remove this one"
        )


def finished(place: Path, digest: str) -> Record | None:
    """The record of a stage that is done, None where it is not or belongs to another recipe."""
    return _read(place / DONE, digest)


@contextmanager
def finishing(place: Path, record: Record) -> Iterator[Path]:
    """A folder for the model of a finished stage; when the block ends its files move to `place`, the record last."""
    place.mkdir(parents=True, exist_ok=True)
    (place / DONE).unlink(missing_ok=True)  # before the weights that it is about
    aside = place / "model.part"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        (aside / DONE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _settle(aside)
        for old in (*place.glob("*.safetensors"), *place.glob("*.json")):
            old.unlink()
        for path in sorted(aside.iterdir(), key=lambda path: path.name == DONE):
            os.replace(path, place / path.name)
        _sync(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
        """Around what writes a checkpoint: as `writing`, and a write that fails leaves nothing behind."""
        with writing(self.folder, self):
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
        before = sorted(self.place.parent.glob(f"*/{DONE}")) if self.place.parent.is_dir() else []
        if before:
            return f"the last good checkpoint is the end of the stage in {before[-1].parent}; {GO_ON}"
        return "there is no checkpoint yet (see save_every)"


@contextmanager
def writing(path: Path, checkpoints: Checkpoints | None = None) -> Iterator[None]:
    """Around what writes files: one line says what failed, the room there is and where the last checkpoint is.

    Raises:
        RelookError: the write failed; the libraries that write raise OSError, RuntimeError or SafetensorError.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:120]
        there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(there).free / 1e6
        then = GO_ON if checkpoints is None else checkpoints.say_last()
        raise RelookError(f"{path} could not be written: {why} ({free:.0f} MB free). Make room; {then}") from error


@contextmanager
def _no_bars() -> Iterator[None]:
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
