"""Models written anew: a plain base that is given looks, an adapter that is merged into its base."""

from __future__ import annotations

from pathlib import Path

import torch

from relook.errors import UserError

from .adapters import ADAPTER_CONFIG, is_adapter
from .loading import check_free, read_config, resolve, save_new, stored_dtype, torch_dtype
from .start import Start, is_plain, load_adapted, open_start


def create(start: Start, target: str | Path, *, seed: int = 0, dtype: torch.dtype | str | None = None) -> Path:
    """Give a plain base looks and write the model into a new or empty folder, which appears whole or not at all.

    Args:
        start: a plain base (`start`) and the looks it is given.
        target: where to.
        seed: of the weights that are drawn.
        dtype: of the written weights; None for that of the base.

    Raises:
        UserError: there is something at `target`; the start has looks already, an encoder is missing.
    """
    check_free(target)
    folder = resolve(str(start.start))
    if not is_plain(folder):
        looks = ", ".join(read_config(folder).looks)
        raise UserError(f"{start.start} is no plain base: it has the looks {looks}; relook train starts from it")
    return save_new(*open_start(start, seed=seed, dtype=dtype or stored_dtype(folder)), target)


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
