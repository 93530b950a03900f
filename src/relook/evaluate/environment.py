"""What the numbers depend on besides the questions: versions, the machine, and the model with its training.

Read once a run into results.json, so that a report needs no model. What cannot be known is left out, not guessed.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PROVENANCE = ("recipe", "seed", "samples", "seconds")  # of the model's `config.provenance`; its stages are left there


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide an answer."""
    found = {"python": platform.python_version()}
    for package in ("relook", "torch", "transformers", "numpy", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """`processor` (its name), `cores` (that this process may use) and `threads` (that torch uses)."""
    import torch

    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count()
    return {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads()}


def model_facts(vlm: Any) -> dict[str, Any]:
    """`parameters` (shared ones counted once), `device`, `dtype`, and what the config says of the training:
    `recipe`, `seed`, `samples`, `seconds`. Empty for something that is not a `VLM`."""
    model = getattr(vlm, "model", None)
    if model is None:
        return {}
    provenance = getattr(model.config, "provenance", None) or {}
    training = {key: provenance[key] for key in PROVENANCE if key in provenance}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(model.device),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "training": training,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
