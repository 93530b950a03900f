"""Checkpoints: found by name and loaded strictly (`checkpoints` inspects and converts, `building` starts new ones).

A folder describes itself (config.json, safetensors, processor files). Published folders (transformers 4.45 names,
`.bin` shards, encoder configs left to the hub) load too. A load is whole or an error that names what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from relook.errors import CheckpointError, UserError
from relook.io import replacing_folder
from relook.looks import LOOKS

from .adapters import is_adapter
from .configuration import VPTQwen2VLConfig
from .encoders import ENCODERS, encoder_config
from .modeling import VPTQwen2VLForConditionalGeneration

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


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
            raise UserError(f"{name}: this folder has no config.json; give a model folder (config.json and weights)")
        return folder
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    known = ", ".join(shipped_models()) or "none in this installation"
    raise UserError(
        f"unknown model {name!r}; expected a shipped model ({known}), a folder, or a hub id like owner/name"
    )


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


@dataclass
class LoadReport:
    """What a load did: names as in the model (`missing`, `mismatched`) or as in the files (`unexpected`, `renamed`)."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    renamed: int = 0
    loaded: int = 0

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded ({self.renamed} renamed from the published layout)"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                parts.append(f"{len(names)} {kind}: {', '.join(names[:8])}{more}")
        return "; ".join(parts)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    encoder_config: dict[str, Any] | None = None,
) -> VPTQwen2VLForConditionalGeneration:
    """Load a model, whole or not at all, in eval mode; `model.load_report` says what was renamed.

    Args:
        name_or_path: a shipped model, a folder in relook's or the published layout or a hub id (adapters:
            `start.open_start`).
        dtype: default float32 on CPU, bfloat16 on a GPU that has it.
        device: default "cuda" where there is one, else "cpu".
        encoder_config: only for published folders with unusual encoders: `{"dino": {...}, "sam_vision": {...}}`.

    Raises:
        UserError: no such model. CheckpointError: files that do not fit the config; the message names the tensors.
    """
    folder = resolve(name_or_path)
    device = torch_device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    if is_adapter(folder):
        raise UserError(f"{folder}: this is an adapter, not a model; open it with relook.load, or merge it first")
    model, report = load_with_report(
        folder, read_config(folder, encoder_config), torch_dtype(dtype), attn_implementation
    )
    if not report.complete:
        raise CheckpointError(f"{folder}: the weights do not fill the model: {report}. Check config.json or the files")
    model.load_report = report
    return model.to(device).eval()  # type: ignore[arg-type]  # torch's own signature, wrapped by transformers


def load_published(
    folder: str | Path, encoder_config: dict[str, Any] | None = None, dtype: torch.dtype | str = torch.float32
) -> VPTQwen2VLForConditionalGeneration:
    """Load a checkpoint in the published layout (spec section 7) on the CPU.

    `encoder_config` is the parsed `encoder_config.json` of a tiny model (read from the folder where it lies there);
    published checkpoints leave the DINOv2-large and SAM ViT-L configs to the hub; `encoders` has these.
    """
    return load_model(folder, dtype=dtype, device="cpu", encoder_config=encoder_config)


def read_config(folder: str | Path, encoder_configs: dict[str, Any] | None = None) -> VPTQwen2VLConfig:
    """config.json of either layout -> a complete config.

    A published config does not say how its model was run (that came from the command line): models past the alignment
    stage are run with the condition (`num_inner_forward_run` 2), whatever number was saved.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON config ({error})") from error
    kind = values.get("model_type")
    if kind != VPTQwen2VLConfig.model_type:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; expected 'qwen2_vl_vpt'. To start from a plain Qwen2-VL use "
            "relook.model.start.new_model"
        )
    if "position_mode" not in values:  # the published layout
        values["num_inner_forward_run"] = 1 if values.get("alignment") else 2
        values["encoders"] = {}
        given = encoder_configs or _encoder_configs_beside(Path(folder))
        for look, spec in ENCODERS.items():
            if LOOKS[look].encoder in (values.get("vision_encoder_ls") or []):
                values["encoders"][look] = encoder_config(look, given.get(spec.legacy_key)).to_diff_dict()
        values["provenance"] = {"layout": "published", "source": Path(folder).name}
    try:
        return VPTQwen2VLConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _encoder_configs_beside(folder: Path) -> dict[str, Any]:
    """The folder's own encoder_config.json, where it has one (what `convert --to published` writes)."""
    path = folder / "encoder_config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
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


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"dtype {dtype!r} is not one torch knows; use float32, bfloat16 or float16")
    return found


def load_with_report(
    folder: Path, config: VPTQwen2VLConfig, dtype: torch.dtype | str, attn_implementation: str | None
) -> tuple[VPTQwen2VLForConditionalGeneration, LoadReport]:
    keys = stored_keys(folder)
    if config.tie_word_embeddings and _lm_head_differs(folder, keys):
        config.tie_word_embeddings = False  # trained apart: tying would throw one of the two away
        config.get_text_config().tie_word_embeddings = False
    cls: Any = VPTQwen2VLForConditionalGeneration  # from_pretrained's return type depends on output_loading_info
    extra: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    # Mismatched shapes are let through here so that they come back by name, with everything else that does not fit.
    extra |= {"dtype": dtype, "ignore_mismatched_sizes": True, "local_files_only": True, "weights_only": True}
    try:
        with _quiet():
            model, info = cls.from_pretrained(folder, config=config, output_loading_info=True, **extra)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {str(error).strip().splitlines()[0]}") from error
    names = set(model.state_dict())
    report = LoadReport(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        mismatched=sorted(str(key[0]) for key in info["mismatched_keys"]),
        renamed=len([k for k in keys if k not in names]),
        loaded=len(keys),
    )
    return model, report


@contextmanager
def _quiet() -> Iterator[None]:
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


def stored_keys(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Names in the weight files -> (file, dtype, shape)."""
    keys: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as f:
                    for key in f.keys():  # noqa: SIM118 (safe_open is not a mapping)
                        part = f.get_slice(key)
                        keys[key] = (path, str(part.get_dtype()), tuple(part.get_shape()))
            else:
                tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
                keys.update({k: (path, str(t.dtype), tuple(t.shape)) for k, t in tensors.items()})
        except Exception as error:  # safetensors and torch raise several kinds for a damaged file
            raise CheckpointError(f"{path}: not a readable weight file ({type(error).__name__}: {error})") from error
    return keys


def _lm_head_differs(folder: Path, keys: dict[str, tuple[Path, str, tuple[int, ...]]]) -> bool:
    names = [n for n in ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight") if n in keys]
    if "lm_head.weight" not in keys or not names:
        return False
    return not torch.equal(_read_tensor(keys, "lm_head.weight"), _read_tensor(keys, names[0]))


def _read_tensor(keys: dict[str, tuple[Path, str, tuple[int, ...]]], name: str) -> torch.Tensor:
    path = keys[name][0]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as f:
            return f.get_tensor(name)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name]


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
        with _quiet():
            model.save_pretrained(out)
        processor.save_pretrained(out)
    return Path(target)
