"""Open a model: loaded into this process, or behind an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.errors import UserError
from relook.io import nearest

from .vlm import VLM

if TYPE_CHECKING:
    from .endpoint.remote import RemoteVLM


def load(
    name: str | Path, *, dtype: Any = None, device: Any = None, attn_implementation: str | None = None, **endpoint: Any
) -> VLM:
    """Load a model with its processor, or open one behind an OpenAI-compatible endpoint.

    Args:
        name: a model that ships ("cards-tiny", "receipts-tiny"), a folder (a model or an adapter), a hub id, or the
            address of an endpoint ("http://127.0.0.1:8000/v1").
        dtype, device, attn_implementation: as `relook.model.loading.load_model` takes them; not for endpoints.
        endpoint: for endpoints only: `model`, `processor`, `dialect`, `api_key`, `timeout`, `retries`, as
            `perceive.endpoint.openai.OpenAIEngine` takes them.

    Returns:
        A `VLM`; for an address a `perceive.endpoint.remote.RemoteVLM`, which has its interface.

    Raises:
        UserError: no such model, a folder that is not one, or a device that cannot run it. CheckpointError: weights
            that do not fit. RelookError: an endpoint that cannot be reached.
    """
    from relook.model.loading import torch_device
    from relook.model.start import open_model

    given = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    if str(name).startswith(("http://", "https://")):
        return _open_endpoint(str(name), given, endpoint)  # type: ignore[return-value]  # it has VLM's interface
    if endpoint:
        raise UserError(f"{next(iter(endpoint))}= is for the address of an endpoint, and {str(name)!r} is none")
    if torch_device(device).type == "meta":
        raise UserError("device 'meta' holds shapes and no weights, so nothing can be asked there; use cpu or cuda")
    return VLM(*open_model(name, **given), str(name))


def _open_endpoint(url: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> RemoteVLM:
    from .endpoint.openai import OpenAIEngine
    from .endpoint.remote import RemoteVLM

    if there := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{there[0]} is for a model in this process; that of {url} is its server's to say")
    known = ("model", "processor", "dialect", "api_key", "timeout", "retries")
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"unknown option {unknown[0]!r} of an endpoint; {nearest(unknown[0], known)}")
    return RemoteVLM(OpenAIEngine(url, **options))
