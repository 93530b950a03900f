"""Writing the published layout: a flat config of transformers 4.45 and one `pytorch_model.bin` under the old names.

The published code reads only `.bin`, takes the encoders' configs from the hub, and knows only its own config keys.
Reading that layout is `loading`'s affair.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from relook.looks import LOOKS

from .encoders import ENCODERS

if TYPE_CHECKING:
    from .configuration import VPTQwen2VLConfig
    from .modeling import VPTQwen2VLForConditionalGeneration

_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range"),
    *("attention_dropout", "use_sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_VISION = (
    *("depth", "embed_dim", "hidden_size", "mlp_ratio", "num_heads", "patch_size", "in_channels"),
    *("spatial_merge_size", "temporal_patch_size", "hidden_act"),
)
_OWN = (
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings"),
    *("para_start_id", "para_end_id", "num_inner_forward_run", "projector_scale", "para_mask_id", "para_mask_ratio"),
    *("alignment", "vision_encoder_ls"),
)
_IDS = tuple(
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
        **{name: getattr(text, name, None) for name in _TEXT},
        **{name: getattr(config, name) for name in (*_OWN, *_IDS)},
        "model_type": config.model_type,
        "architectures": ["VPT_Qwen2VLForConditionalGeneration"],
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling": {"type": "mrope", "mrope_section": rope.get("mrope_section")},
        "vision_config": {"model_type": "qwen2_vl", **{name: getattr(vision, name) for name in _VISION}},
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
