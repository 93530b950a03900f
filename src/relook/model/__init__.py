"""The models: those of the table of bases, whose image tokens may be looked at again, on stock transformers.

    from relook.model import VPTQwen2VLConfig, VPTQwen2VLForConditionalGeneration, VPTQwen2VLProcessor

Names load on first use. `register` tells transformers' Auto classes about them; `relook._autoclasses` arranges that it
happens without importing torch at `import relook`.
"""

from importlib import import_module
from typing import Any

from relook.bases import BASES

_HOME = {
    **{base.config_class: "relook.model.configuration" for base in BASES.values()},
    **{base.model_class: "relook.model.classes" for base in BASES.values()},
    "VPTQwen2VLProcessor": "relook.processing",
}
__all__ = ["VPTQwen2VLConfig", "VPTQwen2VLForConditionalGeneration", "VPTQwen2VLProcessor", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def register() -> None:
    """Register every base's model type with transformers' Auto classes for its kind (imports torch)."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

    from relook.processing import VPTQwen2VLProcessor

    for base in BASES.values():
        config, model = __getattr__(base.config_class), __getattr__(base.model_class)
        AutoConfig.register(base.model_type, config, exist_ok=True)
        for kind in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            kind.register(config, model, exist_ok=True)
        AutoProcessor.register(config, VPTQwen2VLProcessor, exist_ok=True)
