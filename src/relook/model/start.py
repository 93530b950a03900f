"""What a model is opened from, and the one way to open it.

    open_model("receipts-tiny")                                             a model: shipped, folder, hub id, adapter
    open_start(Start(start="Qwen/Qwen2-VL-2B-Instruct", looks=["clip"]))    a plain base that is given looks
    open_start(Start(size="cards-tiny"), seed=1)                            a new tiny model (`new.Size`)

`describe_start` gives the config and processor of a start without its weights.

Adapters are opened by name like any other model: merged into their base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from relook.bases import DEFAULT, HUB, PLAIN
from relook.errors import CheckpointError, UserError
from relook.io import checkpoint_name, content_digest
from relook.looks import LOOKS

from . import new
from .adapters import ADAPTER_CONFIG, BASE, is_adapter
from .configuration import LookConfig, config_class
from .encoders import encoder_config
from .loading import (
    load_model,
    load_processor,
    load_weights,
    meta_model,
    new_token_rows,
    read_config,
    read_json,
    resolve,
    torch_device,
    torch_dtype,
    weight_files,
)
from .merging import check_peft, merge_adapter
from .published import PUBLISHED, look_token_ids, published_config

BASE_KEYS = ("start", "looks", "detection", "seg")


class Start(BaseModel):
    """What a model is opened from; the `model:` section of a recipe.

    A new tiny model (`size`), or weights to go on from (`start`: shipped name, folder, hub id or adapter). A new model
    may take its vision encoder from other weights (`visual`). A `start` that is a plain base is given `looks`, new
    tokens and new projectors; looks with an encoder of their own need its weights (`detection`: DINOv2, `seg`: SAM).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str | None = None
    start: str | None = None
    visual: str | None = None
    looks: list[str] | None = Field(None, description="of a plain base: region, clip, detection, seg")
    detection: str | None = Field(None, description="folder or hub id of a DINOv2, for the look detection")
    seg: str | None = Field(None, description="folder or hub id of a SAM, for the look seg")
    max_looks: int | None = Field(None, ge=1, description="region looks to teach, each in the view before it")

    @model_validator(mode="after")
    def _one(self) -> Start:
        if (self.size is None) == (self.start is None):
            raise ValueError("give exactly one of size: (a fresh tiny model) and start: (weights to go on from)")
        if self.visual is not None and self.size is None:
            raise ValueError("visual: goes with size: (a fresh model that takes over a vision tower)")
        if self.size is not None and (self.looks or self.detection or self.seg):
            raise ValueError("looks:, detection: and seg: go with start: (a plain base that is given looks)")
        return self

    def base_record(self, seed: int) -> dict[str, Any] | None:
        """What an adapter of this start keeps of it in base.json; None for a new model, which has no name."""
        return None if self.start is None else {**self.model_dump(include=set(BASE_KEYS)), "seed": seed}

    def taught(self, processor: Any) -> Any:
        """The processor of what is opened, with the looks that it is to be taught."""
        if self.max_looks is not None:
            processor.max_looks, processor.region_of = self.max_looks, "last" if self.max_looks > 1 else "whole"
        return processor

    def digests(self) -> dict[str, str | None]:
        """Digests of what is named (weights, configs, tokenizers), by name; None where it is not at hand."""
        found: dict[str, str | None] = {}
        for name in filter(None, (self.start, self.visual, self.detection, self.seg)):
            try:
                found[name] = content_digest(resolve(name), "*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt")
            except UserError:
                found[name] = None
        return found


# -- opening ----------------------------------------------------------------------------------------------------------


def open_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A model that has its looks, in eval mode, and its processor.

    Args:
        name: a shipped model, a folder, a hub id, or an adapter (which is merged into its base).
        dtype, device, attn_implementation: as `loading.load_model` takes them.

    Raises:
        UserError, CheckpointError: as `loading.load_model` and `load_adapted`.
    """
    folder = resolve(name)
    if is_adapter(folder):
        device = torch_device(device)
        model, processor = load_adapted(folder, None, torch_dtype(dtype, device), attn_implementation)
        return model.to(device), processor
    model = load_model(folder, dtype=dtype, device=device, attn_implementation=attn_implementation)
    return model, load_processor(folder)


def open_start(
    start: Start,
    *,
    seed: int = 0,
    domain: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """The model that training starts from, on the CPU, and its processor.

    A start that has its looks keeps its own encoders; `detection` and `seg` are for a plain one.

    Args:
        start: what to open.
        seed: of the weights that are drawn: all of a new model, or the projectors of a plain base.
        domain: what a new model is trained on, for its config.
        dtype, attn_implementation: of a model that is not new.

    Raises:
        UserError: no such model, or it lacks one of `start.looks` and is not plain.
    """
    if start.size is not None:
        model, processor = new.build(start.size, seed, domain=domain)
        if start.visual is not None:
            _take_vision_encoder(model, start.visual)
        return model, start.taught(processor)
    folder = resolve(str(start.start))
    if is_plain(folder):
        return _give_looks(start, folder, seed, torch_dtype(dtype), attn_implementation)
    config = read_config(folder)
    if lacking := [look for look in start.looks or () if look not in config.looks]:
        raise UserError(
            f"{start.start} has the looks {', '.join(config.looks)}, not {lacking[0]!r}; start from a plain "
            f"{config.base.name} to give it other looks"
        )
    model, processor = open_model(folder, dtype=dtype, device="cpu", attn_implementation=attn_implementation)
    return model, start.taught(processor)


def _take_vision_encoder(model: Any, source: str) -> None:
    """Copy the vision encoder of other weights into a new model; its config keeps where it came from.

    Raises:
        UserError: the encoders differ in shape.
    """
    other, _ = open_model(source, dtype=torch.float32)
    try:
        model.model.visual.load_state_dict(other.model.visual.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"the vision tower of {source} does not fit into this model: {first}") from error
    model.config.tower = {"from": Path(source).name, **(getattr(other.config, "provenance", None) or {})}


# -- a plain base that is given looks ---------------------------------------------------------------------------------


def is_plain(folder: Path) -> bool:
    """Whether a folder holds a base without looks."""
    return read_json(folder / "config.json").get("model_type") in PLAIN


def _give_looks(
    start: Start, folder: Path, seed: int, dtype: torch.dtype | str, attn_implementation: str | None
) -> tuple[Any, Any]:
    """A plain base's folder plus DINOv2 and SAM as one model with looks, in eval mode, and its processor.

    Control tokens are added to the tokenizer; their embeddings start at the mean of the old ones; projectors are
    Xavier-uniform from `seed`; everything else is the given weights.
    """
    looks, paths = start.looks or (), {"detection": start.detection, "seg": start.seg}
    encoders = {look: _read_encoder(look, path, dtype) for look, path in paths.items() if look in looks}
    config, processor, known = plain_config(folder, looks, {look: each.config for look, each in encoders.items()})
    config.provenance = {"base": checkpoint_name(folder), "seed": seed}
    torch.manual_seed(seed)
    model = load_weights(folder, config, dtype, attn_implementation, ("encoders.", "projectors."))
    for look, encoder in encoders.items():
        model.encoders[look].load_state_dict(encoder.state_dict())
    new_token_rows(model, known, len(processor.tokenizer))
    return model.eval(), start.taught(processor)


def _read_encoder(look: str, path: str | Path | None, dtype: torch.dtype | str) -> Any:
    from transformers import Dinov2Model, SamModel

    if path is None:
        raise UserError(f"look {look!r} needs its encoder: give {look}=FOLDER (DINOv2 or SAM weights)")
    try:
        if look == "seg":
            return SamModel.from_pretrained(path, dtype=dtype).vision_encoder
        return Dinov2Model.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: no encoder could be read there ({first}); give a folder or a hub id") from error


def plain_config(folder: Path, looks: Sequence[str], encoders: Mapping[str, Any]) -> tuple[Any, Any, int]:
    """(config, processor, number of tokens before) of a plain base that is given looks.

    Args:
        encoders: look -> the config of its encoder.

    Raises:
        UserError: no looks are given.
    """
    from transformers import AutoConfig

    from relook.processing import VPTQwen2VLProcessor

    base = AutoConfig.from_pretrained(folder).to_dict()
    row = PLAIN[base["model_type"]]
    if unknown := [look for look in looks if look not in LOOKS]:
        raise UserError(f"look {unknown[0]!r} is unknown; expected some of {', '.join(LOOKS)}")
    if not looks:
        raise UserError(f"{folder} is a plain {row.name}; say which looks it is given, e.g. looks: [region, clip]")
    processor = VPTQwen2VLProcessor.from_pretrained(folder, system=row.system)
    known = len(processor.tokenizer)
    processor.add_look_tokens(looks)
    values = {
        **{name: value for name, value in base.items() if name not in ("architectures", "model_type")},
        **processor.config_token_ids(),
        "vision_encoder_ls": [LOOKS[look].encoder for look in looks if look != "region"],
        "encoders": {look: config.to_diff_dict() for look, config in encoders.items()},
        "region": "region" in looks,
    }
    return config_class(row.model_type)(**values), processor, known


# -- a start without its weights --------------------------------------------------------------------------------------


@dataclass
class StartInfo:
    """Config and processor of a start.

    Attributes:
        processor: None where it is not on this machine.
        missing: why weights (or more) are not on this machine; "" where all is.
    """

    config: LookConfig
    processor: Any
    missing: str

    def meta_model(self) -> Any:
        return meta_model(self.config)


def describe_start(start: Start, *, seed: int = 0, domain: str | None = None) -> StartInfo:
    """What `open_start` would open. Published models and their bases are known by name where they are not at hand.

    Raises:
        UserError: the start is neither at hand nor known by name.
    """
    if start.size is not None:
        model, processor = new.build(start.size, seed, domain=domain)
        return StartInfo(model.config, start.taught(processor), _why_missing(start.visual))
    if why := _why_missing(str(start.start)):
        return _known_by_name(start, why)
    folder = resolve(str(start.start))
    missing = ""
    if not is_adapter(folder):
        try:
            weight_files(folder)
        except CheckpointError as error:
            missing = str(error)
    if is_plain(folder):
        paths = {"detection": start.detection, "seg": start.seg}
        encoders = {look: _encoder_config(look, path) for look, path in paths.items() if path is not None}
        config, processor, _ = plain_config(folder, start.looks or (), encoders)
        missing = "; ".join(filter(None, [*map(_why_missing, paths.values()), missing]))
        return StartInfo(config, start.taught(processor), missing)
    return StartInfo(read_config(folder), start.taught(load_processor(folder)), missing)


def _known_by_name(start: Start, why: str) -> StartInfo:
    name = str(start.start)
    short, base = name.removeprefix("rp-yu/"), DEFAULT
    if short in PUBLISHED:
        values = published_config(short)
    elif name in HUB:
        looks, base = [look for look in start.looks or () if look != "region"], HUB[name].base
        values = {**HUB[name].config(), "vision_encoder_ls": [LOOKS[look].encoder for look in looks]}
        for number, look in enumerate(looks):  # any ids will do, but distinct ones
            values |= look_token_ids(look, first=151657 + 25 * number)
    else:
        raise UserError(why)
    return StartInfo(config_class(base.model_type).from_dict(values), None, why)


def _encoder_config(look: str, path: str) -> Any:
    """The config of a look's encoder, the published one where the folder or hub id does not answer."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        return encoder_config(look, None)
    return getattr(config, "vision_config", config) if look == "seg" else config


def _why_missing(path: str | None) -> str:
    """Why weights that a start takes a part of are not at hand; "" where they are, or where `path` is None."""
    if path is not None:
        try:
            resolve(path)
        except UserError as error:
            return str(error)
    return ""


# -- adapters ---------------------------------------------------------------------------------------------------------


def load_adapted(
    folder: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """The base with an adapter merged in, on the CPU in eval mode, and its processor.

    Args:
        folder: an adapter that `relook train` wrote, or peft's own files with a base that relook can load.
        base: in place of the base that the folder names: a model folder or hub id.

    Raises:
        UserError: peft is missing, no base is known. CheckpointError: adapter and base do not fit.
    """
    folder = Path(folder)
    check_peft()
    start, seed = _base_of(folder, base)
    model, processor = open_start(start, seed=seed, dtype=dtype, attn_implementation=attn_implementation)
    return merge_adapter(model, processor, folder, str(start.start))


def _base_of(folder: Path, base: str | Path | None) -> tuple[Start, int]:
    """The start under an adapter and its seed, with `base` for its name where that is given."""
    if (folder / BASE).is_file():
        values = read_json(folder / BASE)
    else:
        values = {"start": read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")}
    name = values.get("start") if base is None else str(base)
    if not name:
        raise UserError(
            f"{folder}: the adapter does not say which model it belongs to (a later stage of a run: RUN/final is "
            "that model, merged); give --base MODEL"
        )
    return Start(**{**{key: values.get(key) for key in BASE_KEYS}, "start": name}), values.get("seed") or 0
