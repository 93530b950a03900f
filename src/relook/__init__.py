"""relook lets a vision-language model look again.

    import relook
    vlm = relook.load("receipts-tiny")
    answer = vlm.ask("receipt.jpg", "What is the total amount on this receipt?")

Importing this package is quick (no torch, no transformers): each public name loads its module on first use (PEP 562),
and our model classes are announced to transformers' Auto classes by name only (`relook._autoclasses`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relook import _autoclasses

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    "load": "relook.perceive",
    "VLM": "relook.perceive",
    "LookAgain": "relook.perceive.generate",
    "LookPipeline": "relook.perceive.generate",
    "Answer": "relook.trace",
    "Look": "relook.trace",
    "Turn": "relook.trace",
    "Usage": "relook.trace",
    "TextDelta": "relook.trace",
    "LookTaken": "relook.trace",
    "Finished": "relook.trace",
    "RelookError": "relook.errors",
    "UserError": "relook.errors",
    "CheckpointError": "relook.errors",
}
__all__ = [
    "VLM",
    "Answer",
    "CheckpointError",
    "Finished",
    "Look",
    "LookAgain",
    "LookPipeline",
    "LookTaken",
    "RelookError",
    "TextDelta",
    "Turn",
    "Usage",
    "UserError",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from relook.errors import CheckpointError, RelookError, UserError
    from relook.perceive import VLM, load
    from relook.perceive.generate import LookAgain, LookPipeline
    from relook.trace import Answer, Finished, Look, LookTaken, TextDelta, Turn, Usage


def __getattr__(name: str) -> Any:
    """Load a public name on first use; the result is kept, so this runs once per name."""
    if name not in _HOME:
        raise AttributeError(f"module 'relook' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


_autoclasses.announce()
