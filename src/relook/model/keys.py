"""Names of weights: the published layout (transformers 4.45) and the modules here.

transformers renames keys while it loads and back while it saves, by tables registered per class name. Those two
functions are not stable API (transformers 5.23): this is the one file that touches them, and
`tests/model/test_loading.py` fails when they change.
"""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# published name -> name here; regular expressions at the start of a key
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
