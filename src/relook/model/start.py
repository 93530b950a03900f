"""What a model is opened from: a shipped model, a folder, a hub id, an adapter, or a plain Qwen2-VL given looks.

An adapter is a folder with low-rank updates of a model (peft's format) and a record of the model under them:

    adapter_config.json, adapter_model.safetensors    peft's
    base.json                                         {"start", "looks", "detection", "seg", "seed"}: see `start_model`
    config.json, tokenizer and processor files        of the whole model, so that it can be run

Merged, an adapter is a model like any other.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.errors import CheckpointError, UserError

from .configuration import VPTQwen2VLConfig
from .loading import (
    ADAPTER_CONFIG,
    check_free,
    default_dtype,
    encoder_name,
    is_adapter,
    load_model,
    load_processor,
    load_with_report,
    read_config,
    resolve,
    save_new,
    torch_device,
    torch_dtype,
)
from .modeling import VPTQwen2VLForConditionalGeneration

BASE = "base.json"

# -- new models and starts


def new_model(
    base: str | Path,
    looks: tuple[str, ...] = ("region", "clip"),
    detection: str | Path | None = None,
    seg: str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
    """A new model that may look again, from a plain Qwen2-VL folder plus DINOv2 and SAM folders.

    Control tokens are added to the tokenizer; their embeddings start at the mean of the old ones; projectors are
    Xavier-uniform from `seed`; everything else is the given weights.

    Returns:
        (model, processor)
    """
    from transformers import Dinov2Model, SamModel

    sources: dict[str, tuple[str | Path | None, Callable[[Any], Any]]] = {
        "detection": (detection, lambda path: Dinov2Model.from_pretrained(path, dtype=dtype)),
        "seg": (seg, lambda path: SamModel.from_pretrained(path, dtype=dtype).vision_encoder),
    }
    lacking = [look for look, (path, _) in sources.items() if look in looks and path is None]
    if lacking:
        raise UserError(f"look {lacking[0]!r} needs its encoder: give {lacking[0]}=FOLDER (DINOv2 or SAM weights)")
    folder = resolve(base)
    encoders = {look: _read(load, path) for look, (path, load) in sources.items() if look in looks}
    config, processor, known = plain_config(folder, looks, {look: each.config for look, each in encoders.items()})
    config.provenance = {"base": Path(folder).name, "seed": seed}
    torch.manual_seed(seed)
    model, report = load_with_report(folder, config, torch_dtype(dtype), None)
    foreign = [k for k in report.missing if not k.startswith(("encoders.", "projectors."))]
    if foreign or report.unexpected or report.mismatched:
        raise CheckpointError(f"{base}: not a whole Qwen2-VL checkpoint: {report}")
    for look, encoder in encoders.items():
        model.encoders[look].load_state_dict(encoder.state_dict())
    new_token_rows(model, known, len(processor.tokenizer))
    return model.eval(), processor


def plain_config(folder: Path, looks: Sequence[str], encoders: Mapping[str, Any]) -> tuple[VPTQwen2VLConfig, Any, int]:
    """Config and processor of a plain Qwen2-VL that is given looks, and how many tokens it knew before.

    Args:
        encoders: look -> the config of its encoder.

    Raises:
        UserError: it is not plain, or no looks are given.
    """
    from transformers import AutoConfig

    from relook.processing import VPTQwen2VLProcessor

    base_config = AutoConfig.from_pretrained(folder)
    if base_config.model_type != "qwen2_vl":
        raise UserError(f"{folder}: model_type is {base_config.model_type!r}; a plain 'qwen2_vl' was expected")
    if not looks:
        raise UserError(f"{folder} is a plain Qwen2-VL; say which looks it is given, e.g. looks: [region, clip]")
    processor = VPTQwen2VLProcessor.from_pretrained(folder)
    known = len(processor.tokenizer)
    processor.add_look_tokens(looks)
    values = base_config.to_dict()
    values.pop("architectures", None)
    config = VPTQwen2VLConfig.from_dict(
        {
            **values,
            "model_type": VPTQwen2VLConfig.model_type,
            **processor.config_token_ids(),
            "vision_encoder_ls": [encoder_name(look) for look in looks if look != "region"],
            "encoders": {look: config.to_diff_dict() for look, config in encoders.items()},
            "region": "region" in looks,
            "num_inner_forward_run": 2,
        }
    )
    return config, processor, known


def _read(load: Callable[[Any], Any], path: str | Path | None) -> Any:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: no encoder could be read there ({first}); give a folder or a hub id") from error


def start_model(
    start: str | Path,
    looks: Sequence[str] | None = None,
    detection: str | Path | None = None,
    seg: str | Path | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
    """What training starts from: a model that may look again as it is, or a plain Qwen2-VL that is given `looks`.

    A start that has its looks keeps its own encoders; `detection` and `seg` are for a plain one.

    Returns:
        (model, processor), on the CPU.

    Raises:
        UserError: no such model, or it lacks one of `looks` and is not plain.
    """
    folder = resolve(start)
    if is_plain(folder):
        return new_model(folder, tuple(looks or ()), detection, seg, dtype, seed)
    config = read_config(folder)
    lacking = [look for look in looks or () if look not in config.looks]
    if lacking:
        raise UserError(
            f"{start} has the looks {', '.join(config.looks)}, not {lacking[0]!r}; start from a plain Qwen2-VL to give "
            "it other looks"
        )
    return open_model(folder, dtype=dtype, device="cpu")


def open_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[VPTQwen2VLForConditionalGeneration, Any]:
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
        model, processor = load_adapted(folder, dtype=default_dtype(device) if dtype is None else dtype)
        return model.to(device), processor
    model = load_model(folder, dtype=dtype, device=device, attn_implementation=attn_implementation)
    return model, load_processor(folder)


def is_plain(folder: Path) -> bool:
    """Whether a folder holds a Qwen2-VL without looks."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a readable config.json ({error})") from error
    return values.get("model_type") == "qwen2_vl"


@torch.no_grad()
def new_token_rows(model: VPTQwen2VLForConditionalGeneration, known: int, total: int) -> None:
    """Rows known..total of the embedding (and of an untied head): the mean of the rows before, growing if need be."""
    if total > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(total, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.lm_head):
        layer.weight[known:total] = layer.weight[:known].mean(0)


# -- adapters


def write_start(start: dict[str, Any] | None, folder: str | Path) -> None:
    """Keep how the base came about; nothing is kept where it has no name of its own (a later stage of a run)."""
    if start is not None:
        (Path(folder) / BASE).write_text(json.dumps(start, indent=1), encoding="utf-8")


def load_adapted(
    folder: str | Path, base: str | Path | None = None, dtype: torch.dtype | str = torch.float32
) -> tuple[Any, Any]:
    """The base with an adapter merged in, on the CPU in eval mode, and its processor.

    Args:
        folder: an adapter that `relook train` wrote, or peft's own files with a base that relook can load.
        base: in place of the base that the folder names: a model folder or hub id.

    Raises:
        UserError: peft is missing, no base is known. CheckpointError: adapter and base do not fit.
    """
    folder = Path(folder)
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need the package peft, which is not installed; pip install 'relook[train]'")
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    start = _base_of(folder, base)
    model, processor = start_model(**start, dtype=dtype)
    try:
        merge_updates(model, PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu"))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        first = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{folder}: this adapter does not fit {start['start']}: {first}") from error
    config = folder / "config.json"
    if config.is_file():  # how the looks are run was the training's to say
        said = read_config(folder)
        for name in ("num_inner_forward_run", "alignment", "position_mode", "domain"):
            setattr(model.config, name, getattr(said, name))
    if (folder / "processor_config.json").is_file():
        processor = load_processor(folder)
    return model.eval(), processor


def merge(
    adapter: str | Path, target: str | Path, base: str | Path | None = None, dtype: torch.dtype | str = torch.float32
) -> Path:
    """Write base and adapter as one model into a new or empty folder, which appears whole or not at all.

    The sum is taken in float32 and written as `dtype`.

    Raises:
        UserError: `adapter` is none, there is something at `target`; and as `load_adapted`.
    """
    check_free(Path(target))
    if not is_adapter(adapter):
        raise UserError(
            f"{adapter}: no adapter here ({ADAPTER_CONFIG} is missing); relook train writes stages/NAME/adapter"
        )
    kind = torch_dtype(dtype)
    model, processor = load_adapted(adapter, base)
    model.config.provenance = {**(model.config.provenance or {}), "adapter": Path(adapter).name}
    return save_new(model.to(kind), processor, target)


def _base_of(folder: Path, base: str | Path | None) -> dict[str, Any]:
    """How the base came about, `base` in its place where that is given."""
    try:
        if (folder / BASE).is_file():
            start = json.loads((folder / BASE).read_text(encoding="utf-8"))
        else:
            start = {
                "start": json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get(
                    "base_model_name_or_path"
                )
            }
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a readable adapter ({error})") from error
    if base is not None:
        start["start"] = str(base)
    if not start["start"]:
        raise UserError(
            f"{folder}: the adapter does not say which model it belongs to (a later stage of a run: RUN/final is "
            "that model, merged); give --base MODEL"
        )
    return start


def merge_updates(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """Merge an adapter into a model, in place.

    Raises:
        RuntimeError, ValueError: the adapter has other layers, or layers of another shape.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config.inference_mode, config.base_model_name_or_path = False, getattr(model, "name_or_path", None)
    adapter: Any = get_peft_model(model, config)
    result: Any = set_peft_model_state_dict(adapter, weights)
    lacking = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if result.unexpected_keys or lacking:
        odd = (result.unexpected_keys or lacking)[0]
        raise ValueError(f"{'a weight that the model has no place for' if result.unexpected_keys else 'no'} {odd}")
    merge_and_unload(adapter, model)


def merge_and_unload(adapter: Any, model: Any) -> None:
    """Merge in place and leave nothing of peft behind; tied weights are tied again."""
    with torch.no_grad():
        adapter.merge_and_unload()
    head = model.lm_head
    if isinstance(head, nn.Linear):  # peft makes the tied head anew, with its sides exchanged
        head.out_features, head.in_features = head.weight.shape
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
