"""Adapters: folders with low-rank updates of a model (peft's format) and how the model under them came about.

    adapter_config.json, adapter_model.safetensors    peft's
    base.json                                         {"start", "looks", "detection", "seg", "seed"}: the base, see
                                                      `building.start_model`
    config.json, tokenizer and processor files        of the whole model, so that it can be run

Merged, an adapter is a model like any other. Training one is `train.lora`'s business.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from relook.errors import CheckpointError, UserError

BASE, CONFIG = "base.json", "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


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
    from .building import start_model

    folder = Path(folder)
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need the package peft, which is not installed; pip install 'relook[train]'")
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    start = _base_of(folder, base)
    model, processor = start_model(**start, dtype=dtype)
    try:
        join(model, PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu"))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        first = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{folder}: this adapter does not fit {start['start']}: {first}") from error
    config = folder / "config.json"
    if config.is_file():  # how the looks are run was the training's to say
        from .loading import read_config

        said = read_config(folder)
        for name in ("num_inner_forward_run", "alignment", "position_mode", "domain"):
            setattr(model.config, name, getattr(said, name))
    if (folder / "processor_config.json").is_file():
        from .loading import load_processor

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
    from .assembling import check_free, save_new
    from .loading import torch_dtype

    check_free(Path(target))
    if not is_adapter(adapter):
        raise UserError(f"{adapter}: no adapter here ({CONFIG} is missing); relook train writes stages/NAME/adapter")
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
            start = {"start": json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")}
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


def join(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> None:
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
    unloaded(adapter, model)


def unloaded(adapter: Any, model: Any) -> None:
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
