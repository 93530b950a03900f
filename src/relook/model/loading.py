"""Checkpoints: found by name, loaded strictly, built from parts, inspected, converted.

A folder describes itself (config.json, safetensors, processor files). Published folders (transformers 4.45 names,
`.bin` shards, encoder configs left to the hub) load too. A load is whole or an error that names what is missing.
This module refuses to know images and conversations.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from relook.errors import CheckpointError, UserError

from .configuration import VPTQwen2VLConfig
from .encoders import ENCODERS, encoder_config
from .modeling import VPTQwen2VLForConditionalGeneration
from .published import PUBLISHED

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
        if not (folder / "config.json").is_file():
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
        name_or_path: a shipped model, a folder in relook's or the published layout, or a hub id.
        dtype: default float32 on CPU, bfloat16 on a GPU that has it.
        device: default "cuda" where there is one, else "cpu".
        encoder_config: only for published folders with unusual encoders: `{"dino": {...}, "sam_vision": {...}}`.

    Raises:
        UserError: no such model. CheckpointError: files that do not fit the config; the message names the tensors.
    """
    folder = resolve(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    model, report = _load(folder, read_config(folder, encoder_config), _dtype(dtype), attn_implementation)
    if not report.complete:
        raise CheckpointError(f"{folder}: the weights do not fill the model: {report}. Check config.json or the files")
    model.load_report = report
    return model.to(device).eval()


def load_published(
    folder: str | Path, encoder_config: dict[str, Any] | None = None, dtype: torch.dtype | str = torch.float32
) -> VPTQwen2VLForConditionalGeneration:
    """Load a checkpoint in the published layout (spec section 7) on the CPU.

    `encoder_config` is the parsed `encoder_config.json` of a tiny model; published checkpoints leave the DINOv2-large and
    SAM ViT-L configs to the hub, and relook knows those.
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
            "relook.model.loading.new_model"
        )
    if "position_mode" not in values:  # the published layout
        values["num_inner_forward_run"] = 1 if values.get("alignment") else 2
        values["encoders"] = {}
        given = encoder_configs or {}
        for look, spec in ENCODERS.items():
            if spec_name(look) in (values.get("vision_encoder_ls") or []):
                values["encoders"][look] = _full_encoder_config(look, given.get(spec.legacy_key))
        values["provenance"] = {"layout": "published", "source": Path(folder).name}
    try:
        return VPTQwen2VLConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def spec_name(look: str) -> str | None:
    """The published name of a look's encoder ("dino", "sam", "clip")."""
    from relook.looks import LOOKS

    return LOOKS[look].encoder


def _full_encoder_config(look: str, values: dict[str, Any] | None) -> dict[str, Any]:
    return encoder_config(look, values).to_diff_dict()


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"dtype {dtype!r} is not one torch knows; use float32, bfloat16 or float16")
    return found


def _load(folder: Path, config: VPTQwen2VLConfig, dtype, attn_implementation):
    keys = stored_keys(folder)
    if config.tie_word_embeddings and _lm_head_differs(folder, keys):
        config.tie_word_embeddings = False  # trained apart: tying would throw one of the two away
        config.text_config.tie_word_embeddings = False
    cls = VPTQwen2VLForConditionalGeneration
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model, info = cls.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            weights_only=True,
            **extra,
        )
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
        return VPTQwen2VLProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no usable processor here ({str(error).strip().splitlines()[0]})") from error


# -- building, looking into, converting -------------------------------------------------------------------------------


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
    from transformers import AutoConfig, Dinov2Model, SamModel

    from relook.processing import VPTQwen2VLProcessor

    sources: dict[str, tuple[str | Path | None, Callable[[Any], Any]]] = {
        "detection": (detection, lambda path: Dinov2Model.from_pretrained(path, dtype=dtype)),
        "seg": (seg, lambda path: SamModel.from_pretrained(path, dtype=dtype).vision_encoder),
    }
    lacking = [look for look, (path, _) in sources.items() if look in looks and path is None]
    if lacking:
        raise UserError(f"look {lacking[0]!r} needs its encoder: give {lacking[0]}=FOLDER (DINOv2 or SAM weights)")
    folder = resolve(base)
    base_config = AutoConfig.from_pretrained(folder)
    if base_config.model_type != "qwen2_vl":
        raise UserError(f"{base}: model_type is {base_config.model_type!r}; a plain 'qwen2_vl' checkpoint was expected")
    processor = VPTQwen2VLProcessor.from_pretrained(folder)
    known = len(processor.tokenizer)
    processor.add_look_tokens(looks)
    encoders = {look: load(path) for look, (path, load) in sources.items() if look in looks}
    values = base_config.to_dict()
    values.pop("architectures", None)
    config = VPTQwen2VLConfig.from_dict(
        {
            **values,
            "model_type": VPTQwen2VLConfig.model_type,
            **processor.config_token_ids(),
            "vision_encoder_ls": [spec_name(look) for look in looks if look != "region"],
            "encoders": {look: encoder.config.to_diff_dict() for look, encoder in encoders.items()},
            "region": "region" in looks,
            "num_inner_forward_run": 2,
            "provenance": {"base": Path(folder).name, "seed": seed},
        }
    )
    torch.manual_seed(seed)
    model, report = _load(folder, config, _dtype(dtype), None)
    foreign = [k for k in report.missing if not k.startswith(("encoders.", "projectors."))]
    if foreign or report.unexpected or report.mismatched:
        raise CheckpointError(f"{base}: not a whole Qwen2-VL checkpoint: {report}")
    for look, encoder in encoders.items():
        model.encoders[look].load_state_dict(encoder.state_dict())
    _new_token_rows(model, known, len(processor.tokenizer))
    return model.eval(), processor


@torch.no_grad()
def _new_token_rows(model: VPTQwen2VLForConditionalGeneration, known: int, total: int) -> None:
    """Rows known..total of the embedding (and of an untied head): the mean of the rows before, growing if need be."""
    if total > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(total, mean_resizing=False)
    for layer in {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        layer.weight[known:total] = layer.weight[:known].mean(0)


PARTS = {  # prefix of a parameter's name -> the part it belongs to
    "model.visual.": "ViT",
    "model.language_model.embed_tokens.": "token embeddings",
    "model.language_model.": "language model",
    "lm_head.": "lm_head",
    "encoders.": "encoder",
    "projectors.": "projector",
}


def count_parameters(config: VPTQwen2VLConfig) -> dict[str, int]:
    """Parameters by part, counted on the meta device; a tied lm_head counts as stored apart, as the published files do."""
    with torch.device("meta"):
        model = VPTQwen2VLForConditionalGeneration(config)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix, part = next((p, t) for p, t in PARTS.items() if name.startswith(p))
        if prefix in ("encoders.", "projectors."):
            part = f"{name.split('.')[1]} {part}"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def inspect(name_or_path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, without loading its weights: parts, parameters, dtypes, looks, token ids, provenance."""
    folder = resolve(name_or_path)
    config = read_config(folder)
    keys = stored_keys(folder)
    ids = {look: i for look in config.reencodings if (i := config.reencode_ids(look)) is not None}
    return {
        "model": str(name_or_path),
        "layout": "published" if (config.provenance or {}).get("layout") == "published" else "relook",
        "looks": config.looks,
        "parameters": count_parameters(config),
        "stored_tensors": len(keys),
        "dtypes": sorted({dtype.replace("torch.", "") for _, dtype, _ in keys.values()}),
        "token_ids": {look: {"pad": i.pad, "start": i.start, "action": i.action} for look, i in ids.items()},
        "num_inner_forward_run": config.num_inner_forward_run,
        "position_mode": config.position_mode,
        "domain": config.domain,
        "provenance": config.provenance,
    }


def convert(
    source: str | Path, target: str | Path, to: str = "relook", encoder_config: dict[str, Any] | None = None
) -> Path:
    """Write `source` anew in the "relook" layout (self-describing) or the "published" one (flat 4.45 config, `.bin`).

    The folder appears whole or not at all. The published code reads only `.bin`, so that is what "published" writes.
    """
    if to not in ("relook", "published"):
        raise UserError(f"--to {to!r} is not a layout; use relook or published")
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already there; give a new or empty folder")
    folder = resolve(source)
    config = read_config(folder, encoder_config)
    model = load_model(folder, dtype=_stored_dtype(folder), device="cpu", encoder_config=encoder_config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        out = Path(scratch) / target.name
        out.mkdir()
        for path in folder.iterdir():  # tokenizer, processor, card: as they are
            if path.is_file() and path not in weight_files(folder) and not path.name.endswith(".index.json"):
                shutil.copy2(path, out / path.name)
        if to == "relook":
            model.save_pretrained(out)
        else:
            _save_published(model, config, out)
        if target.exists():
            target.rmdir()
        out.rename(target)
    return target


def _stored_dtype(folder: Path) -> torch.dtype:
    short = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {dtype for _, dtype, _ in stored_keys(folder).values()}
    names = {short.get(k, k.replace("torch.", "")) for k in kinds}
    return getattr(torch, names.pop()) if len(names) == 1 else torch.float32


def _save_published(model: VPTQwen2VLForConditionalGeneration, config: VPTQwen2VLConfig, out: Path) -> None:
    """4.45: flat config.json with the published keys, and one `pytorch_model.bin` under the published names."""
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters)
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size hidden_act "
        "rms_norm_eps max_position_embeddings initializer_range attention_dropout use_sliding_window max_window_layers "
        "bos_token_id eos_token_id pad_token_id"
    ).split()
    own = (
        "image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings para_start_id "
        "para_end_id num_inner_forward_run projector_scale para_mask_id para_mask_ratio alignment vision_encoder_ls"
    ).split() + [
        f"{look}_{kind}"
        for look in ("detection", "clip", "seg")
        for kind in ("image_token_id", "action_start_id", "action_id")
    ]
    values = {n: getattr(text, n, None) for n in names} | {n: getattr(config, n) for n in own}
    values |= {
        "model_type": config.model_type,
        "architectures": ["VPT_Qwen2VLForConditionalGeneration"],
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": {"type": "mrope", "mrope_section": rope.get("mrope_section")},
        "vision_config": {
            "model_type": "qwen2_vl",
            "in_chans": vision.in_channels,
            "spatial_patch_size": vision.patch_size,
            **{
                n: getattr(vision, n)
                for n in "depth embed_dim hidden_size mlp_ratio num_heads patch_size in_channels spatial_merge_size temporal_patch_size hidden_act".split()
            },
        },
        "torch_dtype": str(model.dtype).replace("torch.", ""),
        "transformers_version": "4.45.2",
    }
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="1000GB")  # transformers writes the published names back
        with safe_open(Path(scratch) / "model.safetensors", framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.save(tensors, out / "pytorch_model.bin")
    encoders = {spec.legacy_key: config.encoders.get(look) for look, spec in ENCODERS.items()}
    (out / "encoder_config.json").write_text(json.dumps(encoders, indent=2) + "\n", encoding="utf-8")


__all__ = [
    "PUBLISHED",
    "LoadReport",
    "convert",
    "count_parameters",
    "inspect",
    "load_model",
    "load_processor",
    "load_published",
    "new_model",
    "read_config",
    "resolve",
    "shipped_models",
]
