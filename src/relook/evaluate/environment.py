"""What the numbers of a run depend on: versions, machine, model and its training, and hashes of weights and questions.

Written once a run into results.json, so that a report needs no model. What cannot be found out is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from relook.evaluate.records import Record

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
    return {"processor": cpu_name(), "cores": cores, "threads": torch.get_num_threads()}


def model_facts(vlm: Any) -> dict[str, Any]:
    """`parameters` (shared ones counted once), `device`, `dtype`, and what the config says of the training:
    `recipe`, `seed`, `samples`, `seconds`. Of a model at an address, `endpoint` and `dialect`."""
    model = getattr(vlm, "model", None)
    if model is None:
        engine = getattr(vlm, "engine", None)
        return {} if engine is None else {"endpoint": engine.url, "dialect": engine.dialect}
    provenance = getattr(model.config, "provenance", None) or {}
    training = {key: provenance[key] for key in PROVENANCE if key in provenance}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(model.device),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "training": training,
    }


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def weights_hash(model: Any) -> str | None:
    """A hash of all weights and of the config of a torch model; None for something that is no torch model.

    Two models with the same hash give the same answers: a run is identified by it, not by its folder's name.
    """
    state = getattr(model, "state_dict", None)
    if state is None:
        return None
    import torch

    digest = hashlib.blake2b(digest_size=16)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(config.to_json_string().encode())
    for name, tensor in state().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        data = tensor.detach().cpu()
        digest.update(
            (data.float() if data.dtype is torch.bfloat16 else data).numpy().tobytes()
        )  # numpy has no bfloat16
    return digest.hexdigest()


def processor_hash(processor: Any) -> str | None:
    """A hash of how images are seen and turns formatted; None for something that is no processor of transformers."""
    to_json = getattr(processor, "to_json_string", None)
    return None if to_json is None else hashlib.blake2b(to_json().encode(), digest_size=16).hexdigest()


def questions_hashes(records: Sequence[Record]) -> dict[str, str]:
    """By task, a hash of what was asked: question, accepted answers, boxes and the image's name, in order."""
    digests: dict[str, Any] = {}
    for record in records:
        if record["look"] == records[0]["look"]:
            asked = [record[name] for name in ("index", "image", "where", "question", "accepted", "boxes")]
            digest = digests.setdefault(record["task"], hashlib.blake2b(digest_size=16))
            digest.update(json.dumps(asked, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return {task: digest.hexdigest() for task, digest in digests.items()}
