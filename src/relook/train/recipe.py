"""A recipe: everything that decides a training run, in one YAML file, checked before anything starts.

A recipe names a model (a size, or weights to start from), data (a synthetic dataset, or files of items) and stages.
Unknown keys are errors that name the nearest valid key. Paths are relative to the working directory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from relook.data.rules import Data, Strict, relative_path
from relook.errors import UserError
from relook.io import _short, read_yaml, validate
from relook.model.start import Start

MOST = 2**23 - 1  # samples of a stage
PATHS = ("path", "image_root")  # keys whose values are relative paths
RENAMED = {  # keys of earlier versions, and of transformers' TrainingArguments
    **{"optimiser": "optimizer", "max_grad": "max_grad_norm", "learning_rate": "lr", "num_train_epochs": "epochs"},
    **{"per_device_train_batch_size": "batch", "gradient_accumulation_steps": "accumulate", "max_steps": "steps"},
    **{"warmup_ratio": "warmup", "lr_scheduler_type": "schedule", "gradient_checkpointing": "checkpointing"},
    **{"logging_steps": "log_every", "save_steps": "save_every", "eval_steps": "evaluate_every"},
    **{"save_total_limit": "keep_last", "dataloader_num_workers": "workers"},
}
AUTO = "auto"
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _folder_name(name: str) -> str:
    if not name or len(name) > 100 or name.startswith(".") or set(name) & set("/\\") or not name.isprintable():
        raise ValueError("it names a folder: at most 100 characters, without / and \\, and with no dot in front")
    return name


Name = Annotated[str, AfterValidator(_folder_name)]


def renamed(raw: Any) -> Any:
    """A section with the present names of its keys; a notice says which."""
    if not isinstance(raw, Mapping):
        return raw
    values = dict(raw)
    for old in RENAMED.keys() & values.keys():
        _notice(old)
        values.setdefault(RENAMED[old], values.pop(old))
    return values


@cache
def _notice(old: str) -> None:
    wider = " (of all devices together)" if RENAMED[old] == "batch" else ""
    print(f"notice: the recipe key {old} is called {RENAMED[old]} here{wider}", file=sys.stderr)


def cores() -> int:
    """Processors that this process may use: those it is bound to, within a container's share and OMP_NUM_THREADS."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, told = Path("/sys/fs/cgroup/cpu.max"), os.environ.get("OMP_NUM_THREADS", "")
    share, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    limits = [bound, *([int(told)] if told.isdigit() else []), *([] if share == "max" else [int(share) // int(period)])]
    return max(1, min(limits))


def _precision() -> str:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if on_gpu else "float32"  # which processors emulate, five times as slow


def _auto(found: Callable[[], Any]) -> BeforeValidator:
    """Puts what fits this machine in place of "auto", so that a run keeps and compares what it was run with."""
    return BeforeValidator(lambda value: found() if value == AUTO else value)


class Lora(Strict):
    """Low-rank updates (https://arxiv.org/abs/2106.09685) of the language model's linear layers; see `lora`."""

    r: int = Field(512, gt=0, description="rank")
    alpha: int | None = Field(None, gt=0, description="updates are scaled by alpha / r; 2 r unless given")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all"] | list[str] = Field("all", description="all linear layers of the LM, or q_proj, ...")
    modules_to_save: list[str] = Field(["projectors", "lm_head", "embed_tokens"], description="parts trained whole")
    bits: Literal[4, 8] | None = Field(None, description="QLoRA: the LM's linear layers rest in 4 (nf4) or 8 bits")


class Stage(Strict):
    """A part of a run with one objective (a row of `objective.OBJECTIVES`, or one that `relook.plugins` finds)."""

    name: Name
    objective: str
    samples: int = Field(gt=0, le=MOST, description="from 2**23 on, pages are held out for validation")
    steps: int | None = Field(None, gt=0, description="in place of samples: optimizer steps of batch x accumulate")
    epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="of a JSON source: at most so many passes over its items"
    )
    batch: int = Field(16, gt=0)
    accumulate: int = Field(1, gt=0, description="batches per optimizer step")
    average: Literal["tokens", "batches"] = Field(
        "tokens",
        description="a step's loss: mean over its learnt tokens, however cut; batches: over its batches' means",
    )
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    lr_rest: float | None = Field(None, gt=0, description="of what muon leaves to AdamW; lr / 4 unless given")
    lr_scale: dict[str, Factor] = Field({}, description="part of the model -> factor on lr, e.g. clip_projector: 0.3")
    schedule: Literal["linear_tail", "cosine", "constant"] = "linear_tail"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    weight_decay: Factor = 0.05
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    clip: float = Field(1.0, ge=0, description="longest gradient of a step; longer ones are scaled. 0: none is")
    precision: Annotated[Literal["float32", "bfloat16"], _auto(_precision)] = Field(
        "float32", description="of products; weights stay in float32. auto: bfloat16 on a GPU that has it"
    )
    checkpointing: bool = Field(False, description="layers run again in the backward pass: less memory, more time")
    freeze: list[str] = Field([], description="parts that do not learn, e.g. visual, language_model.layers")
    train: list[str] | None = Field(None, description="the only parts that learn, e.g. detection_projector")
    lora: Lora | None = Field(None, description="low-rank updates in place of whole weights")
    # Settings of the forward pass: they start from these defaults in every stage and end with it (`set_forward`).
    passes: Literal[1, 2] = Field(2, description="1: looks without a condition (alignment); 2: with it")
    mask: Literal[0, 1, 2] = Field(0, description="mask modelling: 1 the first user turn, 2 the second too")
    mask_ratio: float = Field(0.0, ge=0, le=1, description="chance of the mask")
    mask_draw: Literal["batch", "sample"] = Field("batch", description="what that chance is drawn for")
    input_grads: Literal["full", "published"] = Field("full", description="published: none into embeddings, ViT")
    position_mode: Literal["mrope", "sequential"] = Field("mrope", description="sequential: as published training")
    remember: int | None = Field(
        None, ge=0, description="images whose features are kept while visual is frozen; where items come again: 1 GiB"
    )
    cache: str | None = Field(None, description="a folder where these features are kept for other runs, too")
    seed: Seed | None = Field(None, description="defaults to the recipe's")
    data: Data | None = Field(None, description="defaults to the recipe's")
    options: dict[str, Any] = Field({}, description="what the objective itself can be told (its Options class)")

    @field_validator("cache")
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        return relative_path(value)

    @model_validator(mode="before")
    @classmethod
    def _length(cls, raw: Any) -> Any:
        """`steps` says how many samples; where both are given they must agree. `epochs` alone sets no other bound."""
        raw = renamed(raw)
        if not isinstance(raw, dict) or raw.get("steps") is None:
            alone = isinstance(raw, dict) and raw.get("epochs") is not None and "samples" not in raw
            return {**raw, "samples": MOST} if alone else raw
        sizes = [raw["steps"], raw.get("batch", 16), raw.get("accumulate", 1)]
        if not all(isinstance(size, int) for size in sizes):
            return raw  # pydantic says which is no number
        samples = sizes[0] * sizes[1] * sizes[2]
        if raw.get("samples", samples) != samples:
            raise ValueError(f"steps says {samples} samples and samples says {raw['samples']}; give one of them")
        return {**raw, "samples": samples}

    @model_validator(mode="after")
    def _learning(self) -> Stage:
        if self.train is not None and self.freeze:
            raise ValueError("give freeze: (all but these learn) or train: (only these learn), not both")
        if self.lora is not None and (self.train is not None or self.freeze):
            raise ValueError("with lora:, what learns is its targets and modules_to_save; leave out freeze: and train:")
        return self


class Validation(Strict):
    """What a stage is tried on as it learns: examples it is not taught with, and questions that it really answers.

    Pages of a world are drawn anew. Of a JSON source `items` are held out from training, as many as this says.
    """

    examples: int = Field(64, gt=0, description="pages of a world whose loss is taken")
    items: int = Field(0, ge=0, description="items of a JSON source that are held out; their loss is taken")
    questions: int = Field(32, ge=0, description="asked with the model's own looks, for region IoU and look rate")
    pictures: int = Field(5, ge=0, description="of the questions: drawn with the box looked at and the annotated one")
    path: str | None = Field(None, description="questions to ask (JSON lines); of the held out pages unless given")

    @field_validator("path")
    @classmethod
    def _relative(cls, value: str | None) -> str | None:
        return relative_path(value)


class Recipe(Strict):
    """A whole run: `run(path)` carries it out.

    Only seed, model, data, stages and `validation.items` decide the weights; what is saved and watched does not.
    """

    name: Name
    seed: Seed = 1
    threads: Annotated[int, _auto(lambda: cores())] = Field(
        1, gt=0, le=1024, description="CPU threads for torch; auto: all"
    )
    workers: Annotated[int, _auto(lambda: min(4, cores() // 4))] = Field(
        0, ge=0, le=1024, description="processes that draw examples; does not change what is drawn. auto: 4 at most"
    )
    model: Start
    data: Data
    stages: list[Stage] = Field(min_length=1)
    log_every: int = Field(25, gt=0, description="optimizer steps between lines of log.jsonl; fewer in short stages")
    save_every: int = Field(200, ge=0, description="optimizer steps between checkpoints; 0: only when told to stop")
    keep_last: int = Field(2, gt=0, description="checkpoints of a stage that are kept, beside the best one")
    evaluate_every: int = Field(0, ge=0, description="optimizer steps between evaluations on `validation`; 0: none")
    validation: Validation = Field(default_factory=lambda: Validation.model_validate({}))
    max_grad_norm: float | None = Field(1e6, gt=0, description="a longer gradient, before clipping, stops the run")
    report_to: list[str] = Field([], description="beside log.jsonl and TensorBoard: wandb, mlflow, ... (transformers')")
    domain: str | None = Field(None, description="what the model is good for, written into its config")
    save_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    def data_of(self, stage: Stage) -> Data:
        """What a stage learns from."""
        return stage.data or self.data

    def seed_of(self, stage: Stage) -> int:
        """The seed of a stage's examples and heads."""
        return self.seed if stage.seed is None else stage.seed

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: Any) -> Any:
        raw = renamed(raw)
        stray = [key for key in raw if key in Stage.model_fields and key not in cls.model_fields]
        if stray and isinstance(stages := raw.get("stages"), list) and stages and isinstance(stages[0], dict):
            name = stages[0].get("name", "NAME")
            raise ValueError(f"{stray[0]} belongs to a stage: stages.{name}.{stray[0]}={raw[stray[0]]}")
        return raw

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"two stages are called {doubled[0]!r}; stage names must differ")
        endless = [s.name for s in self.stages if s.epochs is not None and self.data_of(s).source == "world"]
        if endless:
            raise ValueError(f"stage {endless[0]!r} says epochs:, but a world has no end; give samples: or steps:")
        from_items = [stage.name for stage in self.stages if self.data_of(stage).source == "json"]
        if self.evaluate_every and from_items and not self.validation.items:
            raise ValueError(
                f"evaluate_every is {self.evaluate_every}, but no items of stage {from_items[0]!r} are held out; "
                "add validation: {items: 100}"
            )
        return self


# keys of a stage -> fields of the model's config
FORWARD = {
    "passes": "num_inner_forward_run",
    "mask": "para_mask_id",
    "mask_ratio": "para_mask_ratio",
    "mask_draw": "para_mask_draw",
    "input_grads": "input_grads",
    "position_mode": "position_mode",
}


def set_forward(config: Any, stage: Stage) -> None:
    """Write a stage's settings of the forward pass into the model's config, its defaults where it says nothing."""
    for key, name in FORWARD.items():
        setattr(config, name, getattr(stage, key))
    config.alignment = stage.passes == 1


def reset_forward(config: Any, stages: Sequence[Stage]) -> None:
    """Write into a model's config how it is run once these stages have trained it: with the defaults.

    A model that was only ever aligned (`passes: 1` in every stage) is run without a condition, as published.
    """
    aligned = all(stage.passes == 1 for stage in stages)
    fields = {key: field.default for key, field in Stage.model_fields.items() if key in FORWARD}
    set_forward(config, stages[-1].model_copy(update={**fields, "passes": 1 if aligned else 2}))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, a YAML file.

    Args:
        overrides: `key=value` with dots into the recipe; stages by name: `stages.dense.samples=100`. Values are YAML.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest valid one), a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        moved = f"; did you mean {Path('zoo') / path}?" if (Path("zoo") / path).is_file() else ""
        raise UserError(
            f"There is no recipe at {path}{moved or '; recipes are YAML files such as recipes/own-data.yaml.'}"
        )
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, not a mapping of recipe keys (name, model, data, stages).")
    for override in overrides:
        _apply(raw, override)
    return validate(Recipe, raw, str(path))


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in place; a list of stages is entered by stage name."""
    import yaml

    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise UserError(f"{override!r} is not an override; write key=value, for example stages.dense.samples=800.")
    *path, last = key.strip().split(".")
    node: Any = raw
    for part in path:
        if isinstance(node, list):
            named = {str(item.get("name")): item for item in node if isinstance(item, dict)}
            if part not in named:
                raise UserError(f"{override!r}: there is no stage called {part!r}; there are {', '.join(named)}.")
            node = named[part]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise UserError(f"{override!r}: {part!r} lies inside {_short(node)}, which has no keys.")
    if not isinstance(node, dict):
        raise UserError(f"{override!r}: {key} does not name a single value; enter a stage by its name first.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not YAML ({' '.join(str(error).split())})") from error
    if last in PATHS and isinstance(value, str) and Path(value).is_absolute():
        value = os.path.relpath(value)  # where the command is given, a path may be of any kind
    for names in RENAMED.items():  # by either name, an override counts
        if last in names:
            node.pop(names[0], None)
            node.pop(names[1], None)
    node[last] = value
