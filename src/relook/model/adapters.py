"""Low-rank updates (https://arxiv.org/abs/2106.09685) of a model, through peft: while they train, and merged.

An adapter on disk is a folder (`start` opens it):

    adapter_config.json, adapter_model.safetensors    peft's
    base.json                                         {"start", "looks", "detection", "seg", "seed"}: the model under it
    config.json, tokenizer and processor files        of the whole model, so that it can be run
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

ADAPTER_CONFIG, BASE = "adapter_config.json", "base.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds low-rank updates of a model (peft's format)."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


@dataclass
class Adapter:
    """Low-rank updates in a model that trains.

    Attributes:
        model: the model, whose linear layers peft has replaced.
        peft: peft's wrapper around it.
        base: what base.json is to hold (`start.Start.base_record`); None where the model under it has no name.
        exact: the linear layers themselves, where the model holds copies in few bits.
    """

    model: Any
    peft: Any
    base: dict[str, Any] | None = None
    exact: dict[str, nn.Module] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write peft's own files, the model's config and base.json into a folder."""
        self.peft.save_pretrained(folder, save_embedding_layers=False)
        self.model.config.save_pretrained(folder)
        if self.base is not None:
            (Path(folder) / BASE).write_text(json.dumps(self.base, indent=1), encoding="utf-8")

    def restore(self, folder: str | Path) -> None:
        """Load the updates that `save` wrote, bit by bit."""
        from peft import set_peft_model_state_dict
        from peft.utils import load_peft_weights

        set_peft_model_state_dict(self.peft, load_peft_weights(str(folder), device="cpu"))

    def merge(self) -> None:
        """Add the updates to the (exact) weights and remove peft, in place: the model is whole and plain again."""
        if not self.exact:
            merge_and_unload(self.peft, self.model)
            return
        from peft.utils.save_and_load import get_peft_model_state_dict

        config, weights = self.peft.peft_config["default"], get_peft_model_state_dict(self.peft)
        self.peft.unload()
        for name, layer in self.exact.items():
            self.model.set_submodule(name, layer.to(self.model.device))
        merge_updates(self.model, config, weights)


def merge_updates(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> None:
    """Merge an adapter (peft's config and weights) into a model, in place.

    Raises:
        RuntimeError, ValueError: the adapter has other layers, or layers of another shape.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config.inference_mode, config.base_model_name_or_path = False, getattr(model, "name_or_path", None)
    with warnings.catch_warnings():  # about tied weights, which `merge_and_unload` sees to
        warnings.filterwarnings("ignore", message="[^\\n]*tie_word_embeddings")
        adapter: Any = get_peft_model(model, config)
    result: Any = set_peft_model_state_dict(adapter, weights)
    lacking = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if result.unexpected_keys or lacking:
        odd = (result.unexpected_keys or lacking)[0]
        raise ValueError(f"{'a weight that the model has no place for' if result.unexpected_keys else 'no'} {odd}")
    merge_and_unload(adapter, model)


def merge_and_unload(adapter: Any, model: Any) -> None:
    """Merge peft's wrapper `adapter` of `model` into it, in place, and remove all of peft.

    Head and embedding that share a weight stay tied where they are the same afterwards; else each keeps its own.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    sides: list[Any] = [model.lm_head, model.get_input_embeddings()]
    updated = any(isinstance(side, BaseTunerLayer) for side in sides)
    plain: list[Any] = [side.get_base_layer() if isinstance(side, BaseTunerLayer) else side for side in sides]
    with torch.no_grad():
        if updated and plain[0].weight is plain[1].weight:  # updates of one side must not move the other
            plain[0].weight = nn.Parameter(plain[0].weight.clone())
        adapter.merge_and_unload()
    head, embedding = model.lm_head, model.get_input_embeddings()
    if isinstance(head, nn.Linear):  # peft rebuilds the tied head with its sides exchanged
        head.out_features, head.in_features = head.weight.shape
    configs = [model.config, model.config.get_text_config()]  # peft may have untied the first alone
    if any(config.tie_word_embeddings for config in configs) and head.weight is not embedding.weight:
        tied = torch.equal(head.weight, embedding.weight)
        for config in configs:
            config.tie_word_embeddings = tied
        model.tie_weights()
    if hasattr(model, "peft_config"):
        del model.peft_config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
