"""The model: Qwen2-VL whose image tokens may be looked at again, on stock transformers.

    from relook.model import VPTQwen2VLConfig, VPTQwen2VLForConditionalGeneration, VPTQwen2VLProcessor

Names load on first use. `register` tells transformers' Auto classes about them; `relook._autoclasses` arranges that it
happens without importing torch at `import relook`.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "VPTQwen2VLConfig": "relook.model.configuration",
    "VPTQwen2VLForConditionalGeneration": "relook.model.modeling",
    "VPTQwen2VLProcessor": "relook.processing",
}
__all__ = ["VPTQwen2VLConfig", "VPTQwen2VLForConditionalGeneration", "VPTQwen2VLProcessor", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def register() -> None:
    """Register `qwen2_vl_vpt` with transformers' Auto classes for its kind (imports torch)."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

    from relook.processing import VPTQwen2VLProcessor

    from .configuration import VPTQwen2VLConfig
    from .modeling import VPTQwen2VLForConditionalGeneration

    AutoConfig.register(VPTQwen2VLConfig.model_type, VPTQwen2VLConfig, exist_ok=True)
    for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        kind.register(VPTQwen2VLConfig, VPTQwen2VLForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(VPTQwen2VLConfig, VPTQwen2VLProcessor, exist_ok=True)
