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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
    if recipe.validation.items and recipe.data_of(stage).source == "json":
        said.append(recipe.validation.items)  # fewer are left to learn from
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# -- a model that trains, and its files


@dataclass
class StageModel:
    """A model while a stage trains it.

    Attributes:
        outer: the model, or the module with auxiliary heads around it (whose attribute `model` it is then).
        heads: tensors of auxiliary heads that earlier stages left.
        free_choice: what the processor said before the stage's data had their say (`processor.free_choice`).
    """

    model: Any
    processor: Any
    outer: nn.Module
    adapter: Adapter | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    free_choice: bool = False

    @property
    def wrapped(self) -> bool:
        """Whether the stage has auxiliary heads."""
        return self.outer is not self.model

    @property
    def module(self) -> nn.Module:
        """What the Trainer trains: the model with its heads, peft's wrapper around it, or the model itself."""
        return self.adapter.peft if self.adapter is not None and not self.wrapped else self.outer

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
        if heads := {**self.heads, **{name: value.contiguous() for name, value in self._own_heads().items()}}:
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
            self.outer.load_state_dict(state | {name: found[name] for name in own if name in found})

    def _own_heads(self) -> dict[str, Tensor]:
        state = self.outer.state_dict() if self.wrapped else {}
        return {name: value for name, value in state.items() if not name.startswith("model.")}


def read_heads(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of auxiliary heads beside a model; none where there are none."""
    path = Path(folder) / HEADS
    return load_file(path) if path.is_file() else {}


# -- the folder of a stage


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


@dataclass
class Checkpoints:
    """The folder of one stage.

    Args:
        place: the folder.
        digest: of the recipe up to this stage.
        keep: how many checkpoints are kept beside the best, which is the one of least `eval_loss`.
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

    def finished(self) -> Record | None:
        """The record of the stage if it is done."""
        return self._read(self.place / DONE)

    def found(self) -> list[Record]:
        """Records of the whole checkpoints of this recipe, by step."""
        records = (self._read(path / RECORD) for path in self.folder.glob("step-*"))
        return sorted((r for r in records if r is not None), key=lambda r: r["step"])

    def last(self) -> Record | None:
        return next(reversed(self.found()), None)

    def best(self) -> Record | None:
        """The checkpoint of least validation loss; None where none was evaluated."""
        known = [r for r in self.found() if r.get("eval_loss") is not None]
        return min(known, key=lambda r: r["eval_loss"]) if known else None

    def publish(self, record: Record) -> None:
        """Give the checkpoint that the Trainer wrote its record and its name; then drop what is not kept."""
        part, target = self.aside / f"checkpoint-{record['step']}", self.path(record)
        self._write(part / RECORD, record)
        _sync_all(part)
        self.folder.mkdir(parents=True, exist_ok=True)
        if target.exists():  # of another recipe
            _remove(target)
        os.replace(part, target)
        _sync(self.folder)
        self._drop([*self.found()[-self.keep :], self.best()])

    @contextmanager
    def finishing(self, record: Record) -> Iterator[Path]:
        """A folder for the finished model; when the block ends its files move to `place`, the record last.

        Of the checkpoints only the best stays.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / DONE).unlink(missing_ok=True)  # before the weights that it is about
        aside = self.place / "model.part"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            yield aside
            self._write(aside / DONE, record)
            _sync_all(aside)
            for old in (*self.place.glob("*.safetensors"), *self.place.glob("*.json")):
                old.unlink()
            for path in sorted(aside.iterdir(), key=lambda path: path.name == DONE):
                os.replace(path, self.place / path.name)
            _sync(self.place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._drop([self.best()])
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def _drop(self, kept: list[Record | None]) -> None:
        """Remove all checkpoints but these, those of other recipes too, and what is half-written."""
        shutil.rmtree(self.aside, ignore_errors=True)
        paths = {self.path(record) for record in kept if record is not None}
        for path in self.folder.glob("step-*"):
            if path not in paths:
                _remove(path)

    def say_last(self) -> str:
        """For a message: where the last good checkpoint is."""
        record = self.last()
        if record is not None:
            return f"the last good checkpoint is {self.path(record)}; {GO_ON}"
        if before := sorted(self.place.parent.glob(f"*/{DONE}")):
            return f"the last good checkpoint is the end of the stage in {before[-1].parent}; {GO_ON}"
        return "there is no checkpoint yet (see save_every)"

    @contextmanager
    def writing(self, path: Path | None = None) -> Iterator[None]:
        """Around what writes files: one line says what failed, the room there is and where the last checkpoint is.

        A write that fails leaves no half checkpoint behind.

        Raises:
            RelookError: it failed; the libraries that write raise OSError, RuntimeError or SafetensorError.
        """
        path = path or self.place
        try:
            yield
        except BaseException as error:
            shutil.rmtree(self.aside, ignore_errors=True)
            if not isinstance(error, (OSError, RuntimeError, SafetensorError)):
                raise
            why = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
            there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
            free = shutil.disk_usage(there).free / 1e6
            said = f"{path} could not be written: {why} ({free:.0f} MB free). Make room; {self.say_last()}"
            raise RelookError(said) from error

    def _read(self, path: Path) -> Record | None:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return record if record.get("digest") == self.digest else None

    def _write(self, path: Path, record: Record) -> None:
        path.write_text(json.dumps({**record, "digest": self.digest}, indent=1), encoding="utf-8")


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


def _remove(folder: Path) -> None:
    """The record first, so that what is half gone does not exist."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync_all(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX lets a folder be synced
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
