"""How much memory a stage will want on a device, from shapes alone: an estimate, made before anything is loaded.

What is counted: weights, gradients and optimiser states of whatever learns, and what the language model keeps of a
forward pass for the backward one, by the layers of Qwen2 as torch runs them (fused attention). Not counted: what the
vision towers keep where they learn (`towers` says so), buffers of communication, fragments. On tiny models the
activations come within a third of what torch really saves (tests/train/test_dry_run.py).

Knows configs and parameters; not data.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from relook.train.recipe import Stage

FLOAT = 4  # bytes: weights, gradients and optimiser states are float32


def standing(model: nn.Module, stage: Stage) -> dict[str, int]:
    """Bytes that are held through a stage: "weights", "gradients", "optimiser"."""
    weights, learns = 0.0, 0
    bits = stage.lora.bits if stage.lora is not None else None
    for name, parameter in model.named_parameters():
        resting = bits is not None and parameter.ndim == 2 and ".base_layer." in name
        weights += parameter.numel() * (bits / 8 if resting and bits is not None else FLOAT)
        learns += parameter.numel() * parameter.requires_grad
    states = 2 if stage.optimiser == "adamw" else 1.5  # muon keeps one for matrices, AdamW two for the rest
    return {"weights": int(weights), "gradients": FLOAT * learns, "optimiser": int(FLOAT * states * learns)}


def activations(config: Any, stage: Stage, tokens: int, learns: bool = True) -> int:
    """Bytes of a forward pass over `tokens` real positions that wait for the backward pass.

    Per layer and position, with width d, inner width i and b bytes a product: the residual stream before both norms
    (8 d in float32), queries, keys and values repeated for every head and what attention gives (4 b d), the gate, its
    activation and the other half (3 b i). Where the layers learn (`learns`), also what their weights were multiplied
    with: normed values in float32 and as a product (8 d + 2 b d), the halves' product (b i). The head keeps its input,
    the logits and their softmax in float32. Mask modelling runs what is left of the call once more: at most a pass.
    With checkpointing, a layer keeps its input, and one layer at a time all the rest.
    """
    text = config.get_text_config()
    b = 2 if stage.precision == "bfloat16" else FLOAT
    d, i = text.hidden_size, text.intermediate_size
    layer = 8 * d + 4 * b * d + 3 * b * i
    if learns:
        layer += 8 * d + 2 * b * d + b * i
    head = 2 * FLOAT * d + b * d + (2 * FLOAT + (b if b != FLOAT else 0)) * text.vocab_size
    count, passes = text.num_hidden_layers, 2 if (stage.mask or 0) > 0 else 1
    layers = passes * count * FLOAT * d + layer if stage.checkpointing else passes * count * layer
    return tokens * (layers + head)


def layers_learn(model: nn.Module) -> bool:
    """Whether any weight in the language model's layers learns (a low-rank update counts)."""
    return any(p.requires_grad for name, p in model.named_parameters() if "language_model.layers." in name)


def towers(model: nn.Module) -> list[str]:
    """The vision towers that learn, whose activations `activations` leaves out."""
    found = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad and ".blocks." in name}
    return sorted(found | {name.split(".")[1] for name, p in model.named_parameters()
                           if p.requires_grad and name.startswith("encoders.")})  # fmt: skip


def gib(size: float) -> str:
    """Example: gib(3 * 2**30) is "3.0 GiB"; small ones are in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
