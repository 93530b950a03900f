"""Models under adapters: opened with the adapter merged in, and written as ordinary checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from relook.errors import CheckpointError, UserError

from .adapters import ADAPTER_CONFIG, BASE, is_adapter, merge_updates
from .loading import check_free, load_processor, read_config, read_json, save_new, torch_dtype
from .start import BASE_KEYS, Start, open_start


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
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need the package peft, which is not installed; pip install 'relook[train]'")
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    start, seed = _base_of(folder, base)
    model, processor = open_start(start, seed=seed, dtype=dtype, attn_implementation=attn_implementation)
    try:
        merge_updates(model, PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu"))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        first = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{folder}: this adapter does not fit {start.start}: {first}") from error
    if (folder / "config.json").is_file():  # how the looks are run was decided in training
        trained = read_config(folder)
        for name in ("num_inner_forward_run", "alignment", "position_mode", "domain"):
            setattr(model.config, name, getattr(trained, name))
    if (folder / "processor_config.json").is_file():
        processor = load_processor(folder)
    return model.eval(), processor


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


def merge(
    adapter: str | Path, target: str | Path, base: str | Path | None = None, dtype: torch.dtype | str = torch.float32
) -> Path:
    """Write base and adapter as one model into a new or empty folder, which appears whole or not at all.

    The sum is taken in float32 and written as `dtype`.

    Raises:
        UserError: `adapter` is none, there is something at `target`; and as `load_adapted`.
    """
    check_free(target)
    if not is_adapter(adapter):
        raise UserError(
            f"{adapter}: no adapter here ({ADAPTER_CONFIG} is missing); relook train writes stages/NAME/adapter"
        )
    kind = torch_dtype(dtype)
    model, processor = load_adapted(adapter, base)
    model.config.provenance = {**(model.config.provenance or {}), "adapter": Path(adapter).name}
    return save_new(model.to(kind), processor, target)
