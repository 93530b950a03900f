"""What a run keeps on disk: the end of every stage, and checkpoints inside a stage. Nothing here is ever half-written.

    stages/00-dense/                 a model folder that `relook.load` takes; heads.safetensors where the run has
                                     auxiliary heads; done.json is the record
    stages/00-dense/stage.json       what decides these weights: the recipe, digests of items and of the start
    stages/00-dense/checkpoints/     step-200/, step-400/: the same, and beside it what training needs to go on;
                                     checkpoint.json is the record

A folder is gone on with only for the same stage.json. What has no record does not exist: everything is written aside,
the record last, and takes its name when all of it is on the disk. The inside of a checkpoint is written by
transformers' Trainer (`trainer`).
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

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from relook.errors import RelookError
from relook.io import content_digest, differences, replacing
from relook.model.adapters import Adapter
from relook.model.loading import load_model, quiet
from relook.train.recipe import Recipe, Stage

RECORD, DONE, MADE_OF = "checkpoint.json", "done.json", "stage.json"
VERSION = 3  # of the way in which stages train: what an older one has begun is not gone on with
HEADS = "heads.safetensors"
GO_ON = "the same command goes on from there"
Record = dict[str, Any]


def made_of(recipe: Recipe, stage: Stage, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """All that decides the weights after a stage: what the recipe says (its defaults apart), and digests of its files.

    Args:
        before: the same of the stage before; None for the first.
    """
    changed: dict[str, Any] = {"exclude_defaults": True, "mode": "json"}
    data = recipe.data_of(stage)
    about = data.model_dump(**changed, exclude={"max_broken"})  # when to stop: what is learnt is the same
    said: dict[str, Any] = {"relook": VERSION, "seed": recipe.seed, "data": about}
    said["stages"] = {stage.name: stage.model_dump(**changed, exclude={"data", "cache"})}
    if data.source == "json":
        held = [source.val for source in data.all_sources() if source.val and recipe.validation.items]
        about["digests"] = {path: content_digest(path) for path in [*(s.path for s in data.all_sources()), *held]}
        said["validation"] = {"items": recipe.validation.items}  # fewer are left to learn from
    if before is None:
        said["model"] = {**recipe.model.model_dump(**changed), "digests": recipe.model.digests()}
    else:
        said["stage before"] = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    return said


# -- a model that trains, and its files


@dataclass
class StageModel:
    """A model while a stage trains it.

    Attributes:
        heads: tensors of auxiliary heads that earlier stages left.
        base: what an adapter keeps of the model under it (`Start.base_record`); None where that has no name.
        origin: where the weights of the run's first stage came from; None for a new model.
        free_choice: what the processor said before the stage's data had their say (`processor.free_choice`).
        outer: the module with auxiliary heads around the model (whose attribute `model` it is), where there are any.
        adapter: its low-rank updates, where there are any.
    """

    model: Any
    processor: Any
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None
    free_choice: bool = False
    outer: nn.Module | None = None
    adapter: Adapter | None = None

    @property
    def module(self) -> Any:
        """What the Trainer trains: the model with its heads, peft's wrapper around it, or the model itself."""
        inner = self.adapter.peft if self.adapter is not None else self.model
        return inner if self.outer is None else self.outer

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the model (or its adapter) as a folder that `relook.load` takes, with the heads of all stages so far.

        `state` is the model's, where its own weights are not whole (sharded).
        """
        with quiet():
            if self.adapter is not None:
                self.adapter.save(folder)
            else:
                self.model.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)
        if heads := {**self.heads, **{name: value.contiguous() for name, value in self._own_heads().items()}}:
            save_file(heads, str(Path(folder) / HEADS))

    def load(self, folder: str | Path) -> None:
        """Load what `save` wrote into the model and heads of the same shape, strictly and bit by bit."""
        if self.adapter is not None:
            self.adapter.restore(folder)
        else:
            with quiet():
                kept = load_model(folder, dtype=self.model.dtype, device="cpu")
            self.model.load_state_dict(kept.state_dict())
        if self.outer is not None:
            own = self._own_heads()
            found = read_heads(folder)
            state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
            self.outer.load_state_dict(state | {name: found[name] for name in own if name in found})

    def _own_heads(self) -> dict[str, Tensor]:
        state = self.outer.state_dict() if self.outer is not None else {}
        return {name: value for name, value in state.items() if not name.startswith("model.")}


def read_heads(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of auxiliary heads beside a model; none where there are none."""
    path = Path(folder) / HEADS
    return load_file(path) if path.is_file() else {}


# -- the folder of a stage


@dataclass
class Checkpoints:
    """The folder of one stage.

    Args:
        place: the folder.
        keep: how many checkpoints are kept beside the best, which is the one of least `eval_loss`.
        made: what decides its weights (`made_of`).
    """

    place: Path
    keep: int
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.place / "checkpoints"

    @property
    def aside(self) -> Path:
        """Where the Trainer writes; a folder there has no record yet."""
        return self.place / "checkpoints.part"

    def path(self, record: Record) -> Path:
        return self.folder / f"step-{record['step']}"

    def begun(self) -> dict[str, Any] | None:
        """What the stage was begun with (see `made_of`); None where it was not."""
        return _read(self.place / MADE_OF) if (self.place / MADE_OF).is_file() else None

    def difference(self) -> str:
        """How what the stage was begun with differs from `made`; "" for not at all, or where it was not begun."""
        older = self.place / DONE, self.place / "weights.safetensors", self.folder
        if (before := self.begun()) is None:
            return f"{self.place.name} is of an older version of relook" if any(p.exists() for p in older) else ""
        return ", ".join(differences(before, self.made)[:3])

    def begin(self, recipe: Recipe) -> None:
        """Keep what the stage is made of and the recipe as used, and remove what a killed run left half-written."""
        shutil.rmtree(self.aside, ignore_errors=True)
        with replacing(self.place.parents[1] / "recipe.yaml") as file:
            yaml.safe_dump(recipe.model_dump(exclude_defaults=True), file, sort_keys=False)
        with replacing(self.place / MADE_OF) as file:
            json.dump(self.made, file, indent=1)

    def finished(self) -> Record | None:
        """The record of the stage if it is done."""
        return _read(self.place / DONE) if (self.place / DONE).is_file() else None

    def before(self) -> list[Record]:
        """The records of the stages before."""
        return [_read(path) for path in sorted(self.place.parent.glob(f"*/{DONE}")) if path.parent < self.place]

    def found(self) -> list[Record]:
        """Records of the whole checkpoints, by step."""
        return sorted((_read(path) for path in self.folder.glob(f"step-*/{RECORD}")), key=lambda r: r["step"])

    def last(self) -> Record | None:
        return next(reversed(self.found()), None)

    def best(self) -> Record | None:
        """The checkpoint of least validation loss; None where none was evaluated."""
        known = [r for r in self.found() if r.get("eval_loss") is not None]
        return min(known, key=lambda r: r["eval_loss"]) if known else None

    def publish(self, record: Record) -> None:
        """Give the checkpoint that the Trainer wrote its record and its name; then drop what is not kept."""
        part, target = self.aside / f"checkpoint-{record['step']}", self.path(record)
        (part / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _sync_all(part)
        self.folder.mkdir(parents=True, exist_ok=True)
        if target.exists():  # half removed
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
        aside = self.place / "model.part"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            yield aside
            (aside / DONE).write_text(json.dumps(record, indent=1), encoding="utf-8")
            _sync_all(aside)
            for path in sorted(aside.iterdir(), key=lambda path: path.name == DONE):
                os.replace(path, self.place / path.name)
            _sync(self.place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self._drop([self.best()])
        with suppress(OSError):  # not empty
            self.folder.rmdir()

    def _drop(self, kept: list[Record | None]) -> None:
        """Remove all checkpoints but these, and what is half-written."""
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


def _read(path: Path) -> Record:
    found: Record = json.loads(path.read_text(encoding="utf-8"))
    return found


def _remove(folder: Path) -> None:
    """The record first, so that what is half gone does not exist."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sync_all(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
