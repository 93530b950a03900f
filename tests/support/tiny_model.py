"""Random models of a few thousand parameters with any set of looks, and token-id conversations for them."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from relook.bases import BASES, DEFAULT
from relook.looks import LOOKS
from relook.model.classes import model_class
from relook.model.configuration import config_class

IM_START, IM_END, IMAGE, VISION_START, VISION_END, PAD = 105, 106, 103, 101, 102, 107
PATCH = 8
DINO = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2)
SAM = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    mlp_dim=32,
    output_channels=12,
    global_attn_indexes=[],  # windowed attention only: global attention over 4096 positions takes seconds
    window_size=14,
    initializer_range=0.1,  # the default 1e-10 gives zero features, which hide the conditioning
)


def token_ids(look: str) -> dict[str, int]:
    first = 110 + 4 * [n for n, s in LOOKS.items() if s.reencodes].index(look)
    return {f"{look}_image_token_id": first, f"{look}_action_start_id": first + 1, f"{look}_action_id": first + 2}


# What a base's twin has beyond the sizes that all share: windows smaller than an image, inner layers and positions.
VISION = {
    "qwen2_vl_vpt": {},
    "qwen2_5_vl_vpt": dict(window_size=4 * PATCH, fullatt_block_indexes=[1]),
    "qwen3_vl_vpt": dict(num_position_embeddings=36, deepstack_visual_indexes=[0, 1]),
}
TEXT = {"qwen3_vl_vpt": dict(head_dim=8)}


_base = DEFAULT.model_type


def default_base() -> str:
    """The base of a tiny model whose base is not said; fixture `base` changes it."""
    return _base


@contextmanager
def of_base(base):
    """Within, tiny models are twins of this base."""
    global _base
    before, _base = _base, base
    try:
        yield base
    finally:
        _base = before


def tiny_config(looks=("clip", "detection", "seg"), base=None, **changes):
    base = base or _base
    own = type(config_class(base)().text_config).__annotations__
    text = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        bos_token_id=PAD,
        eos_token_id=IM_END,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        **TEXT.get(base, {}),
    )
    text |= {name: changes.pop(name) for name in list(changes) if name in {**text, **own}}
    vision = BASES[base].vision(embed_dim=16, out=32, mlp_ratio=2, depth=2, num_heads=2, patch_size=PATCH)
    values = dict(
        text_config=text,
        vision_config={**vision, **VISION[base]},
        image_token_id=IMAGE,
        video_token_id=104,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        para_start_id=IM_START,
        para_end_id=IM_END,
        vision_encoder_ls=[LOOKS[look].encoder for look in looks],
        encoders={k: v for k, v in (("detection", DINO), ("seg", SAM)) if k in looks},
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    for look in looks:
        values |= token_ids(look)
    return config_class(base)(**(values | changes))


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = tiny_config(**changes)
    model = model_class(config)(config).eval()
    with torch.no_grad():  # weights large enough that a wrong position or conditioning changes the logits
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "model." in name:
                parameter.normal_(0, 0.15)
    return model


def image(grid, seed) -> dict[str, torch.Tensor]:
    """One image of `grid` = (t, h, w) patches for the ViT."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    pixels = torch.randn(t * h * w, 3 * 2 * PATCH * PATCH, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}


def conversation(looks=(), seed=0, grid=(1, 4, 6), second=(1, 6, 4), answer=5, config=None):
    """One row: system, image and question, then per look a call and its images, then an answer.

    "region" is a second ordinary image. Returns the forward inputs of a row, with the assistant's tokens as labels.
    """
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(0, 100, (n,), generator=generator).tolist()  # noqa: E731
    ids: list[int] = []
    labels: list[int] = []

    def say(tokens, learn=False):
        ids.extend(tokens)
        labels.extend(tokens if learn else [-100] * len(tokens))

    tensors: dict[str, list[torch.Tensor]] = {}

    def show(kind, pixels):
        for name, value in pixels.items():
            tensors.setdefault(name, []).append(value)
        if kind in ("image", "clip"):
            return int(next(v for n, v in pixels.items() if "thw" in n).prod()) // 4
        return 256

    say([IM_START, *words(3), IM_END, 12, IM_START, 10, VISION_START])
    say([IMAGE] * show("image", image(grid, seed)) + [VISION_END, *words(4 + seed % 3), IM_END, 12, IM_START, 13])
    for number, look in enumerate(looks):
        fresh = 100 * seed + number + 1
        if look == "region":
            say([*words(3), IM_END], learn=True)
            pad, count = IMAGE, show("image", image(second, fresh))
        else:
            token = config.reencode_ids(look)
            say([token.start, token.action, token.action + 1, IM_END], learn=True)
            labels[-3] = -100  # the action token is no target
            pad = token.pad
            if look == "clip":
                seen = image(second, fresh)
                count = show(
                    "clip", {"clip_pixel_values": seen["pixel_values"], "clip_images_grid_thw": seen["image_grid_thw"]}
                )
            else:
                side = 224 if look == "detection" else 1024
                noise = torch.randn(1, 3, side // 32, side // 32, generator=torch.Generator().manual_seed(fresh))
                count = show(look, {f"{look}_images": noise.repeat_interleave(32, -1).repeat_interleave(32, -2)})
        say([12, IM_START, 10, VISION_START, *[pad] * count, VISION_END, IM_END, 12, IM_START, 13])
    say([*words(answer), IM_END], learn=True)
    out = {name: torch.cat(values) for name, values in tensors.items()}
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), **out}


def stack(rows, side="right"):
    """Pad rows of `conversation` into one batch, with images row-major."""
    width = max(row["input_ids"].shape[1] for row in rows)

    def pad(x, value):
        extra = torch.full((1, width - x.shape[1]), value)
        return torch.cat([x, extra] if side == "right" else [extra, x], dim=1)

    batch = {
        "input_ids": torch.cat([pad(r["input_ids"], PAD) for r in rows]),
        "labels": torch.cat([pad(r["labels"], -100) for r in rows]),
        "attention_mask": torch.cat([pad(torch.ones_like(r["input_ids"]), 0) for r in rows]),
    }
    for name in sorted({k for r in rows for k in r} - {"input_ids", "labels"}):
        batch[name] = torch.cat([r[name] for r in rows if name in r])
    return batch


LOOK_MIXES = [
    (),
    ("region",),
    ("clip",),
    ("detection",),
    ("seg",),
    ("clip", "region"),
    ("region", "detection", "clip"),
    ("clip", "clip"),
]


def grads(model, batch):
    """Loss and gradients (parameter name -> tensor) of one backward pass."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
