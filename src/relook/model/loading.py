"""Checkpoints: found by name, loaded strictly, looked into and written.

A folder describes itself (config.json, safetensors, processor files). Published folders (transformers 4.45 names,
`.bin` shards, encoder configs left to the hub) load too. A load is whole or an error that names what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from relook.bases import BASES, PLAIN
from relook.errors import CheckpointError, UserError
from relook.io import replacing_folder

from .adapters import is_adapter
from .classes import model_class
from .configuration import LookConfig, config_class

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors calls them -> torch's


# -- finding ----------------------------------------------------------------------------------------------------------


def shipped_models() -> list[str]:
    """Names of the small models in the package."""
    return sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))


def resolve(name_or_path: str | Path) -> Path:
    """A shipped model's name, a folder, or a hub id -> a local folder with a config.

    Raises:
        UserError: neither; or the hub cannot be reached and nothing is cached.
    """
    name = str(name_or_path)
    if name in shipped_models():
        return SHIPPED / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            raise UserError(f"{name}: this folder has no config.json; {_model_in(folder)}")
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    known = ", ".join(shipped_models()) or "none in this installation"
    raise UserError(
        f"unknown model {name!r}; expected a shipped model ({known}), a folder, or a hub id like owner/name"
    )


def _model_in(folder: Path) -> str:
    """What to give in place of a folder that is no model: of a run, the model in it."""
    if (folder / "final/config.json").is_file():
        return f"it is a run, whose model is {folder / 'final'}"
    saved = sorted(folder.glob("stages/*/checkpoints/step-*/config.json"), key=lambda path: path.stat().st_mtime)
    if saved:
        return f"it is a run that has not ended; its last checkpoint is {saved[-1].parent}"
    return "give a model folder (config.json and weights)"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.jinja", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: no such folder, and the model hub did not give it ({reason}); check the name or the network"
        ) from error


# -- loading ----------------------------------------------------------------------------------------------------------


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    encoder_config: dict[str, Any] | None = None,
) -> Any:
    """Load a model, whole or not at all, in eval mode.

    Args:
        name_or_path: a shipped model, a folder in relook's or the published layout or a hub id (adapters:
            `start.open_model`).
        dtype: default float32 on CPU, bfloat16 on a GPU that has it.
        device: default "cuda" where there is one, else "cpu".
        encoder_config: only for published folders with unusual encoders: `{"dino": {...}, "sam_vision": {...}}`.

    Raises:
        UserError: no such model. CheckpointError: files that do not fit the config; the message names the tensors.
    """
    folder = resolve(name_or_path)
    device = torch_device(device)
    if is_adapter(folder):
        raise UserError(f"{folder}: this is an adapter, not a model; open it with relook.load, or merge it first")
    config = read_config(folder, encoder_config)
    model = load_weights(folder, config, torch_dtype(dtype, device), attn_implementation)
    return model.to(device).eval()


def read_config(folder: str | Path, encoder_config: dict[str, Any] | None = None) -> LookConfig:
    """config.json of either layout -> a complete config (`VPTQwen2VLConfig.from_dict`)."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in BASES:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; expected {' or '.join(map(repr, BASES))}. A plain model "
            f"({', '.join(PLAIN)}) is trained with looks: in a recipe's model:"
        )
    try:
        return config_class(kind).from_dict(values, encoder_config, name_or_path=str(folder))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error


def torch_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the fastest at hand: a GPU where there is one.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch raises all of these
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"device {str(device)!r} cannot be used ({reason}); use cpu, or cuda where there is a GPU"
        ) from None
    return found


def torch_dtype(dtype: torch.dtype | str | None, device: torch.device | None = None) -> torch.dtype | str:
    """torch's dtype of that name, or "auto"; by default bfloat16 on a GPU that has it, else float32."""
    if dtype is None:
        on_gpu = device is not None and device.type == "cuda"
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"dtype {dtype!r} is not one torch knows; use float32, bfloat16 or float16")
    return found


def load_weights(
    folder: Path,
    config: LookConfig,
    dtype: torch.dtype | str,
    attn_implementation: str | None = None,
    drawn: tuple[str, ...] = (),
) -> Any:
    """A model of this config with the weights of a folder, on the CPU.

    Args:
        drawn: beginnings of the names of weights that need not be there, and are drawn.

    Raises:
        CheckpointError: files that cannot be read, or do not fit the config; the message names the tensors.
    """
    stored_tensors(folder)  # names damaged files
    cls = model_class(config)  # from_pretrained's return type depends on output_loading_info
    extra: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # Mismatched shapes are let through here so that they come back by name, with everything else that does not fit.
    extra |= {"dtype": dtype, "ignore_mismatched_sizes": True, "local_files_only": True, "weights_only": True}
    try:
        with quiet():
            model, info = cls.from_pretrained(folder, config=config, output_loading_info=True, **extra)
    except (ImportError, OSError, ValueError, RuntimeError, KeyError) as error:
        said = str(error).strip().splitlines()[0]
        if (attn_implementation is not None and "attn_implementation" in str(error)) or isinstance(error, ImportError):
            raise UserError(f"attn_implementation={attn_implementation!r} cannot be used: {said}") from error
        raise CheckpointError(f"{folder}: the weights cannot be read: {said}") from error
    wrong = {
        "missing": [name for name in info["missing_keys"] if not name.startswith(drawn)],
        "unexpected": info["unexpected_keys"],
        "mismatched": [str(key[0]) for key in info["mismatched_keys"]],
    }
    if found := {kind: sorted(names) for kind, names in wrong.items() if names}:
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' * (len(names) > 8)}"
            for kind, names in found.items()
        ]
        raise CheckpointError(
            f"{folder}: the weights do not fill the model: {'; '.join(parts)}. Check config.json or the files"
        )
    if model.lm_head.weight is not model.get_input_embeddings().weight:  # stored apart, whatever the config says
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no table of keys from transformers: the report is ours to give."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors where there are any, else published `.bin` shards.

    Raises:
        CheckpointError: there are none.
    """
    for pattern in _WEIGHTS:
        files = sorted(p for p in folder.glob(pattern) if not p.name.startswith(("training_", "optimizer", "adapter_")))
        if files:
            return files
    raise CheckpointError(f"{folder}: no weights here; expected *.safetensors or pytorch_model*.bin beside config.json")


def stored_tensors(folder: Path) -> dict[str, str]:
    """Names in the weight files -> dtype as the files write it ("BF16", "bfloat16"), without the numbers."""
    found: dict[str, str] = {}
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    found |= {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
            else:
                tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
                found |= {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()}
        except Exception as error:  # safetensors and torch raise several kinds for a damaged file
            raise CheckpointError(f"{path}: not a readable weight file ({type(error).__name__}: {error})") from error
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that all weights of a folder are stored in; float32 where they differ."""
    kinds = {_DTYPES.get(kind, kind) for kind in stored_tensors(folder).values()}
    return getattr(torch, kinds.pop()) if len(kinds) == 1 and kinds <= {*_DTYPES.values()} else torch.float32


def load_processor(name_or_path: str | Path) -> Any:
    """The processor beside a model (tokenizer, image processors, view settings)."""
    from relook.processing import VPTQwen2VLProcessor

    folder = resolve(name_or_path)
    try:
        processor = VPTQwen2VLProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no usable processor here ({str(error).strip().splitlines()[0]})") from error
    for key in ("is_local", "local_files_only"):  # how it was loaded is nothing to save with it
        processor.tokenizer.init_kwargs.pop(key, None)
    return processor


# -- looking into -----------------------------------------------------------------------------------------------------

PARTS = {  # prefix of a parameter's name -> the part it belongs to
    "model.visual.": "ViT",
    "model.language_model.embed_tokens.": "token embeddings",
    "model.language_model.": "language model",
    "lm_head.": "lm_head",
    "encoders.": "encoder",
    "projectors.": "projector",
}


def count_parameters(config: LookConfig) -> dict[str, int]:
    """Parameters by part. A tied lm_head counts as stored apart, as in the published files."""
    counts: dict[str, int] = {}
    for name, parameter in meta_model(config).named_parameters(remove_duplicate=False):
        prefix, part = next((p, t) for p, t in PARTS.items() if name.startswith(p))
        if prefix in ("encoders.", "projectors."):
            part = f"{name.split('.')[1]} {part}"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def meta_model(config: LookConfig) -> Any:
    """The model on the meta device: names and shapes without numbers."""
    with torch.device("meta"):
        model = model_class(config)(config)
    model.tie_weights()
    return model


def inspect(name_or_path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, without loading its weights: parts, parameters, dtypes, looks, token ids, provenance."""
    folder = resolve(name_or_path)
    config, stored = read_config(folder), stored_tensors(folder)
    ids = {look: i for look in config.reencodings if (i := config.reencode_ids(look)) is not None}
    return {
        "model": str(name_or_path),
        "layout": "published" if (config.provenance or {}).get("layout") == "published" else "relook",
        "looks": config.looks,
        "parameters": count_parameters(config),
        "stored_tensors": len(stored),
        "dtypes": sorted(set(stored.values())),
        "token_ids": {look: {"pad": i.pad, "start": i.start, "action": i.action} for look, i in ids.items()},
        "num_inner_forward_run": config.num_inner_forward_run,
        "position_mode": config.position_mode,
        "domain": config.domain,
        "provenance": config.provenance,
    }


# -- writing ----------------------------------------------------------------------------------------------------------


def check_free(target: str | Path) -> None:
    """Raises UserError where `target` is a file or a folder with something in it."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already there; give a new or empty folder")


def save_new(model: Any, processor: Any, target: str | Path) -> Path:
    """Write a model with its processor into a new or empty folder, which appears whole or not at all.

    Raises:
        UserError: there is something at `target`.
    """
    check_free(target)
    with replacing_folder(target) as out:
        with quiet():
            model.save_pretrained(out)
        processor.save_pretrained(out)
    return Path(target)


@torch.no_grad()
def new_token_rows(model: Any, known: int, total: int) -> None:
    """Rows known..total of the embedding (and of an untied head): the mean of the rows before, growing if need be."""
    if total > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(total, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.lm_head):
        layer.weight[known:total] = layer.weight[:known].mean(0)
