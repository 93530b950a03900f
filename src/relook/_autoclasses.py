"""Registration of our model types (`relook.bases`) with transformers' Auto classes, without importing torch.

transformers is itself lazy: tables of *names* say which class belongs to a model type, and the class is imported from
`transformers.models.<model type>` when first asked for. `announce` adds our names to those tables as each table's
module is imported, and answers for the modules `transformers.models.<our model type>` by forwarding to `relook.model`.
Nothing of relook.model is imported before somebody asks for one of its classes; so no import order makes a cycle.

Where the tables were already read (transformers' Auto classes imported before relook), torch is loaded anyway, and the
classes are registered in the ordinary, eager way.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from relook.bases import BASES, Base

_AUTO = "transformers.models.auto."
_ALIASES = {f"transformers.models.{kind}" for kind in BASES}  # the modules transformers derives from the model types

_MODELS = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")

# module of transformers -> (our class of a base, its tables of names)
_TABLES: dict[str, tuple[Callable[[Base], str], tuple[str, ...]]] = {
    _AUTO + "configuration_auto": (lambda base: base.config_class, ("CONFIG_MAPPING_NAMES",)),
    _AUTO + "modeling_auto": (lambda base: base.model_class, _MODELS),
    _AUTO + "processing_auto": (lambda base: "VPTQwen2VLProcessor", ("PROCESSOR_MAPPING_NAMES",)),
}


class _Alias(Loader):
    """Loads `transformers.models.<our model type>`: an empty module whose attributes are those of `relook.model`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # the default module

    def exec_module(self, module: ModuleType) -> None:
        def forward(name: str) -> Any:
            if name.startswith("__"):  # the import system probes __path__ and the like
                raise AttributeError(name)
            return getattr(import_module("relook.model"), name)

        module.__getattr__ = forward  # type: ignore[method-assign]  # PEP 562, set from outside


class _ByModel:
    """The processor of a folder that names Qwen2-VL's: relook's where the model has looks, as published folders do."""

    @classmethod
    def from_pretrained(cls, name: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedConfig, Qwen2VLProcessor

        where = ("cache_dir", "token", "revision", "subfolder", "local_files_only")
        hub = {key: kwargs[key] for key in where if key in kwargs}
        try:
            kind = PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type")
        except OSError:  # no config beside it
            kind = None
        found = import_module("relook.processing").VPTQwen2VLProcessor if kind in BASES else Qwen2VLProcessor
        return found.from_pretrained(name, **kwargs)


def _look_at_the_model(processing_auto: ModuleType) -> None:
    """Let AutoProcessor, which goes by the class that a folder names, tell published folders from plain Qwen2-VL."""
    by_name = processing_auto.processor_class_from_name
    processing_auto.processor_class_from_name = (  # type: ignore[attr-defined]
        lambda class_name: _ByModel if class_name == "Qwen2VLProcessor" else by_name(class_name)
    )


class _Finder(MetaPathFinder):
    """Finds the alias module, and adds our row to each table right after its module has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _ALIASES:
            return ModuleSpec(fullname, _Alias())
        if fullname not in _TABLES:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                name, tables = _TABLES[fullname]
                for table in tables:
                    getattr(module, table).update({kind: name(base) for kind, base in BASES.items()})
                if fullname == _AUTO + "processing_auto":
                    _look_at_the_model(module)

            spec.loader.exec_module = run_and_add  # type: ignore[method-assign]  # this loader object is ours alone
        return spec


def announce() -> None:
    """Make the names known, once per process; see the module's docstring for how."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if any(name in sys.modules for name in _TABLES):
        from relook.model import register

        register()
        if _AUTO + "processing_auto" in sys.modules:
            _look_at_the_model(sys.modules[_AUTO + "processing_auto"])
