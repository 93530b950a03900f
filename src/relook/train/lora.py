"""Low-rank updates of the language model in place of its whole weights (LoRA, QLoRA), through peft.

The layers are replaced inside the model, which stays the class it is. At the end of the stage the updates are merged
into the weights (`relook.model.adapters.Adapter`); with `bits:` (frozen layers held in 4 or 8 bits by bitsandbytes)
into the exact ones all the same.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from relook.errors import UserError
from relook.io import nearest
from relook.model.adapters import Adapter
from relook.train.optim import PARTS, in_part, unused_parameters
from relook.train.recipe import Lora

LAYERS = "model.language_model.layers"


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer of the language model (its head apart)."""
    return {n: m for n, m in model.named_modules() if n.startswith(f"{LAYERS}.") and isinstance(m, nn.Linear)}


def adapt(model: Any, plan: Lora, base: dict[str, Any] | None = None) -> Adapter:
    """Put low-rank updates into `model`, in place; only they and `plan.modules_to_save` learn.

    Args:
        base: record of the model that is adapted (`Start.base_record`), kept with the adapter.

    Raises:
        UserError: a package is missing, or the model has no such layers.
    """
    targets = check_lora(model, plan)
    from peft import LoraConfig, get_peft_model

    exact = _held_in_bits(model, targets, plan.bits) if plan.bits is not None else {}
    config = LoraConfig(
        r=plan.r,
        lora_alpha=plan.alpha if plan.alpha is not None else 2 * plan.r,
        lora_dropout=plan.dropout,
        target_modules=rf"model\.language_model\.layers\.\d+\.\w+\.({'|'.join(targets)})",
        modules_to_save=saved_modules(model, plan),
        ensure_weight_tying=bool(model.config.tie_word_embeddings),
    )
    unused = unused_parameters(model)
    idle = {name for name, parameter in model.named_parameters() if id(parameter) in unused}
    adapter = get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    named: Any = adapter.peft_config["default"]
    named.base_model_name_or_path = base["start"] if base else ""  # else peft takes the model's, whoever changed it
    for name, parameter in model.named_parameters():
        if name.replace(".modules_to_save.default.", ".") in idle:
            parameter.requires_grad_(False)
    return Adapter(model, adapter, base, exact)


def check_lora(model: nn.Module, plan: Lora) -> list[str]:
    """The names of the linear layers that get updates.

    Raises:
        UserError: a package is missing, or the model has no such layers.
    """
    needed = [("lora:", "peft", "train"), ("lora.bits", "bitsandbytes", "qlora")]
    for key, package, extra in needed if plan.bits is not None else needed[:1]:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{key} needs {package}, which is not installed; pip install 'relook[{extra}]' or leave it out"
            )
    known = sorted({name.rsplit(".", 1)[1] for name in linear_layers(model)})
    if plan.targets == "all":
        return known
    for target in plan.targets:
        if target not in known:
            raise UserError(
                f"lora.targets: the language model has no linear layers called {target!r}; {nearest(target, known)}"
            )
    return list(plan.targets)


def saved_modules(model: Any, plan: Lora) -> list[str]:
    """The modules trained whole, by name; of tied weights only the embedding is named (the head follows it)."""
    pieces = [PARTS.get(part, part) for part in plan.modules_to_save]
    if model.config.tie_word_embeddings and "lm_head" in pieces:
        pieces = [p for p in pieces if p != "lm_head"] + ["embed_tokens"] * ("embed_tokens" not in pieces)
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleDict) or any(name.startswith(f"{outer}.") for outer in found):
            continue  # peft takes what is called, not what only holds others
        if any(in_part(name, piece) for piece in pieces):
            found.append(name)
    return found


# -- few bits ---------------------------------------------------------------------------------------------------------


def _held_in_bits(model: Any, targets: list[str], bits: int) -> dict[str, nn.Module]:
    """Exchange the language model's linear layers for copies in few bits; returns the exact ones, on the CPU."""
    import bitsandbytes as bnb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact: dict[str, nn.Module] = {}
    for name, layer in linear_layers(model).items():
        assert isinstance(layer, nn.Linear)
        shape, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if bits == 4:
            compute = torch.bfloat16 if device == "cuda" else torch.float32
            small: Any = bnb.nn.Linear4bit(*shape, bias=bias, quant_type="nf4", compute_dtype=compute)
        else:
            small = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
        small.load_state_dict(layer.state_dict())
        exact[name] = layer.to("cpu")
        model.set_submodule(name, small.requires_grad_(False).to(device))
    return exact
