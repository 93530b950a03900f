"""An adapter on disk, merged into the model that it belongs to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from relook.errors import CheckpointError, UserError

from .adapters import merge_updates
from .loading import load_processor, read_config


def merge_adapter(model: Any, processor: Any, folder: Path, name: str) -> tuple[Any, Any]:
    """The base `name`, in eval mode, with the updates of the adapter in `folder`, and the processor of both.

    Raises:
        UserError: peft is missing. CheckpointError: adapter and base do not fit.
    """
    check_peft()
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    try:
        merge_updates(model, PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu"))
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        first = " ".join(str(error).split()[:40])
        raise CheckpointError(f"{folder}: this adapter does not fit {name}: {first}") from error
    if (folder / "config.json").is_file():  # how the looks are run was decided in training
        trained = read_config(folder)
        for key in ("num_inner_forward_run", "alignment", "position_mode", "domain"):
            setattr(model.config, key, getattr(trained, key))
    if (folder / "processor_config.json").is_file():
        processor = load_processor(folder)
    return model.eval(), processor


def check_peft() -> None:
    """Raises UserError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("adapters need the package peft, which is not installed; pip install 'relook[train]'")
