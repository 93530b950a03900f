"""Sizes of the tiny models and the initialization of their vision encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from relook.model.new import Size
from zoo.worlds.cards import Cards
from zoo.worlds.receipts import Receipts

# initial offset (down, right) in patches that each head attends to; one row per layer, repeated
NEIGHBORS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((0, -2), (0, 2), (-1, 0), (1, 0)),
    ((0, -1), (0, 1), (-2, 0), (2, 0)),
)
SHARPNESS = (6.0, 4.0, 2.0)  # logits at the three highest frequencies of an axis: one patch off costs 3, two cost 9


def look_near(model: Any) -> None:
    """Initialize the q and k biases of a Qwen2-VL vision encoder so that its heads attend to neighboring patches.

    With rotary positions the product of two constant vectors depends only on the distance of their patches:
    q = a (cos f d, sin f d) and k = (a, 0) give a^2 cos(f (x - d)), which is largest at distance x = d. A letter covers
    a few neighboring patches, so the encoder need not learn first that neighbors matter. The architecture is unchanged.
    """
    import torch

    for number, block in enumerate(model.model.visual.blocks):
        attention = block.attn
        heads, size = attention.num_heads, attention.qkv.out_features // 3 // attention.num_heads
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, size // 2, 2).float() / (size // 2))  # as Qwen2-VL's, per axis
        bias = torch.zeros(3, heads, 2, 2, size // 4)  # (q k v, head, cos | sin, down | right, frequency)
        for head in range(heads):
            offset = NEIGHBORS[number % len(NEIGHBORS)][head % 4]
            for axis in range(2):
                for i, logit in enumerate(SHARPNESS[: size // 4]):
                    a, angle = (logit * size**0.5) ** 0.5, frequencies[i] * offset[axis]
                    bias[0, head, 0, axis, i], bias[0, head, 1, axis, i] = a * torch.cos(angle), a * torch.sin(angle)
                    bias[1, head, 0, axis, i] = a
        with torch.no_grad():
            attention.qkv.bias.copy_(bias.flatten())


# Tokens of 12 x 12 pixels: about one letter of a receipt 1280 pixels high. In the first look a letter is 3-4 wide.
RECEIPTS = Size(
    phrases=Receipts.phrases(),
    vit={"embed_dim": 128, "depth": 4, "num_heads": 4, "patch_size": 6, "hidden_act": "silu"},
    lm={"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 512},
    first={"longest_side": 384},
    crop={"longest_side": 480},
    reencode={"longest_side": 640},
    grid=16,
    region_margin=1,
    initialise=look_near,
)  # fmt: skip

BASE = replace(
    RECEIPTS,
    vit={**RECEIPTS.vit, "embed_dim": 256, "depth": 6, "num_heads": 8},
    lm={"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4,
        "intermediate_size": 1024},
)  # fmt: skip

CARDS_TINY = Size(
    phrases=Cards.phrases(),
    vit={"embed_dim": 96, "depth": 3, "num_heads": 3, "patch_size": 8},
    lm={"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 512},
    first={"longest_side": 64},
    crop={"longest_side": None, "scale": 0.5},
    reencode={"longest_side": 256, "scale": 0.5},
)  # fmt: skip

# Controls of zoo/receipts.md without a second look: more parameters; one look with as many tokens as two.
RECEIPTS_LARGE = replace(RECEIPTS, lm={**RECEIPTS.lm, "num_hidden_layers": 10, "intermediate_size": 1280})
RECEIPTS_FINE = replace(RECEIPTS, first={"longest_side": 624})

# The same experiment at GPU scale (zoo/tools/receipts_gpu.sh).
BASE_LARGE = replace(BASE, lm={**BASE.lm, "num_hidden_layers": 24, "intermediate_size": 1536})
BASE_FINE = replace(BASE, first={"longest_side": 624})
