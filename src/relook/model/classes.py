"""The model class of each base: `modeling.LookAgainMixin` on transformers' own."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from relook.bases import BASES

from .configuration import VPTQwen2_5_VLConfig, VPTQwen2VLConfig, VPTQwen3VLConfig
from .modeling import LookAgainMixin


class VPTQwen2VLForConditionalGeneration(LookAgainMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with visual perception tokens. Without a look its logits are the base model's, bit for bit."""

    config_class = VPTQwen2VLConfig


class VPTQwen2_5_VLForConditionalGeneration(LookAgainMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with visual perception tokens."""

    config_class = VPTQwen2_5_VLConfig


class VPTQwen3VLForConditionalGeneration(LookAgainMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with visual perception tokens. Its decoder adds inner features of each view (deepstack)."""

    config_class = VPTQwen3VLConfig


def model_class(config: Any) -> Any:
    """The model class of a config."""
    return globals()[config.base.model_class]


# transformers renames weights while it loads, and back while it saves, by tables registered per class name. Its two
# functions are not stable API (transformers 5.23): `tests/model/test_loading.py` fails when they change.
for _base in BASES.values():
    register_checkpoint_conversion_mapping(
        _base.model_class,
        [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in _base.renames.items()],
        overwrite=True,
    )
