"""What the published checkpoints are (https://huggingface.co/rp-yu): one row each, and the shapes of their bases.

Used to build them without a network, to complete their configs and to list them. Facts: spec section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relook.looks import LOOKS, control_tokens

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
