"""The published checkpoints (https://huggingface.co/rp-yu): facts, names of weights, and the layout on disk.

- `PUBLISHED`, `BASES`: a row for each checkpoint and the shapes of their base models, from which they can be built
  without a network (spec.md, section 7).
- `register_keys`: the renaming between the published weight names (transformers 4.45) and the modules here.
- `save_published`: writes the published layout, a flat config and one `pytorch_model.bin`. (`loading` reads it.)
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from relook.looks import LOOKS, control_tokens

from .encoders import ENCODERS

if TYPE_CHECKING:
    from .configuration import VPTQwen2VLConfig
    from .modeling import VPTQwen2VLForConditionalGeneration

# -- facts

BASE_TOKENS = 151657  # ids below are Qwen2-VL's own; the published tokenizers add theirs from here

_VISION = dict(depth=32, embed_dim=1280, mlp_ratio=4, num_heads=16, patch_size=14)
_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
BASES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        rope_parameters=_ROPE,
        tie_word_embeddings=True,
        vision_config=dict(**_VISION, hidden_size=1536),
    ),
    "Qwen/Qwen2-VL-7B-Instruct": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        rope_parameters=_ROPE,
        tie_word_embeddings=False,
        vision_config=dict(**_VISION, hidden_size=3584),
    ),
}


@dataclass(frozen=True)
class Published:
    """One published checkpoint: hub id, base, its re-encoding look, stage, and billions of parameters as stated."""

    hub_id: str
    base: str
    look: str
    alignment: bool
    billions: float
    free_choice: bool = False


_2B, _7B = BASES
PUBLISHED: dict[str, Published] = {
    row.hub_id.split("/")[1]: row
    for row in (
        Published("rp-yu/Qwen2-VL-2b-VPT-Det-Alignment", _2B, "detection", True, 2.75),
        Published("rp-yu/Qwen2-VL-2b-VPT-Seg-Alignment", _2B, "seg", True, 2.76),
        Published("rp-yu/Qwen2-VL-2b-VPT-CLIP", _2B, "clip", False, 2.45),
        Published("rp-yu/Qwen2-VL-2b-VPT-Det", _2B, "detection", False, 2.75),
        Published("rp-yu/Qwen2-VL-2b-VPT-Det-NoPrompt", _2B, "detection", False, 2.75, free_choice=True),
        Published("rp-yu/Qwen2-VL-2b-VPT-Seg", _2B, "seg", False, 2.76),
        Published("rp-yu/Qwen2-VL-7b-VPT-CLIP", _7B, "clip", False, 8.32),
    )
}


def look_token_ids(look: str, first: int = BASE_TOKENS) -> dict[str, int]:
    """Config keys of one re-encoding look -> token ids, when its control tokens start at id `first`.

    Example: look_token_ids("clip") == {"clip_image_token_id": 151657, "clip_action_start_id": 151676,
    "clip_action_id": 151677}.
    """
    special, ordinary = control_tokens(["region", look])
    ids = {token: first + i for i, token in enumerate([*special, *ordinary])}
    spec = LOOKS[look]
    return {
        f"{look}_image_token_id": ids[spec.pad],
        f"{look}_action_start_id": ids[spec.start],
        f"{look}_action_id": ids[str(spec.action)],
    }


def published_config(name: str) -> dict[str, Any]:
    """Values for `VPTQwen2VLConfig` of the published checkpoint `name`."""
    row = PUBLISHED[name]
    return dict(
        **BASES[row.base],
        **look_token_ids(row.look),
        vision_encoder_ls=[LOOKS[row.look].encoder],
        alignment=row.alignment,
        num_inner_forward_run=1 if row.alignment else 2,
    )


# -- names of weights

# Published name -> name here; regular expressions at the start of a key. transformers renames while it loads, and back
# while it saves, by tables registered per class name. Its two functions are not stable API (transformers 5.23):
# `tests/model/test_loading.py` fails when they change.
PUBLISHED_TO_HERE: dict[str, str] = {
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
    r"^detection_model": "encoders.detection",
    r"^seg_model": "encoders.seg",
    r"^detection_projector": "projectors.detection",
    r"^clip_projector": "projectors.clip",
    r"^seg_projector": "projectors.seg",
}


def register_keys(class_name: str) -> None:
    """Let transformers read and write the published names for the model class `class_name` (exact name)."""
    renames: list[Any] = [
        WeightRenaming(source_patterns=old, target_patterns=new) for old, new in PUBLISHED_TO_HERE.items()
    ]
    register_checkpoint_conversion_mapping(class_name, renames, overwrite=True)


# -- layout

_TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range"),
    *("attention_dropout", "use_sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_VISION_KEYS = (
    *("depth", "embed_dim", "hidden_size", "mlp_ratio", "num_heads", "patch_size", "in_channels"),
    *("spatial_merge_size", "temporal_patch_size", "hidden_act"),
)
_OWN_KEYS = (
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings"),
    *("para_start_id", "para_end_id", "num_inner_forward_run", "projector_scale", "para_mask_id", "para_mask_ratio"),
    *("alignment", "vision_encoder_ls"),
)
_TOKEN_ID_KEYS = tuple(
    f"{name}_{kind}"
    for name, spec in LOOKS.items()
    if spec.reencodes
    for kind in ("image_token_id", "action_start_id", "action_id")
)


def published_config_values(config: VPTQwen2VLConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The flat dict of a published config.json."""
    text, vision = config.get_text_config(), config.vision_config
    rope = dict(text.rope_parameters)
    return {
        **{name: getattr(text, name, None) for name in _TEXT_KEYS},
        **{name: getattr(config, name) for name in (*_OWN_KEYS, *_TOKEN_ID_KEYS)},
        "model_type": config.model_type,
        "architectures": ["VPT_Qwen2VLForConditionalGeneration"],
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": {"type": "mrope", "mrope_section": rope.get("mrope_section")},
        "vision_config": {"model_type": "qwen2_vl", **{name: getattr(vision, name) for name in _VISION_KEYS}},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.45.2",
    }


def save_published(model: VPTQwen2VLForConditionalGeneration, config: VPTQwen2VLConfig, out: Path) -> None:
    """Write config.json, pytorch_model.bin and encoder_config.json into the folder `out`."""
    values = published_config_values(config, model.dtype)
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="1000GB")  # transformers writes the published names back
        tensors = load_file(Path(scratch) / "model.safetensors")
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.save(tensors, out / "pytorch_model.bin")
    encoders = {spec.legacy_key: (config.encoders or {}).get(look) for look, spec in ENCODERS.items()}
    (out / "encoder_config.json").write_text(json.dumps(encoders, indent=2) + "\n", encoding="utf-8")
