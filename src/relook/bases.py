"""The base models: one row each for the vision-language models of transformers that can be given looks.

A row says what differs between bases as data; nothing else in relook asks which base a model has. A further base is one
more row, and a subclass of `LookConfig` and of `LookAgainMixin` (`model.configuration`, `model.modeling`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from relook.looks import DEFAULT_SYSTEM

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Names of weights as checkpoints have them (transformers 4.45) -> names here; regular expressions at a key's start.
FLAT = {r"^visual": "model.visual", r"^model(?!\.(language_model|visual))": "model.language_model"}
PUBLISHED = {r"^(detection|seg)_model": r"encoders.\1", r"^(clip|detection|seg)_projector": r"projectors.\1"}


@dataclass(frozen=True)
class Base:
    """One base model.

    stock             begins the names of transformers' classes: `<stock>Config`, `<stock>ForConditionalGeneration`
    plain             their model type
    vision            (embed_dim, out, depth, mlp_ratio, ...) -> its vision config; `out` is the language model's width
    rope              number of frequencies -> `mrope_section` that gives t, h, w one each in turn
    head_dim          whether its text config states the width of a head
    patch, normalize  patch size in pixels; mean and standard deviation of normalized pixels
    system            system prompt of its chat template; "" for none
    view_features     outputs of `get_image_features` that a view's features consist of: the final ones, and lists of
                      inner ones that the decoder adds at image positions after its first layers (deepstack)
    position_inputs   keywords that its `get_rope_index` takes beyond ids, mask and grids
    renames           names of stored weights -> names here
    """

    stock: str
    plain: str
    vision: Callable[..., dict[str, Any]]
    rope: Callable[[int], list[int]]
    head_dim: bool = False
    patch: int = 14
    normalize: tuple[tuple[float, ...], tuple[float, ...]] = CLIP
    system: str = DEFAULT_SYSTEM
    view_features: tuple[str, ...] = ("pooler_output",)
    position_inputs: tuple[str, ...] = ()
    renames: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return f"{self.plain}_vpt"

    @property
    def config_class(self) -> str:
        return f"VPT{self.stock}Config"

    @property
    def model_class(self) -> str:
        return f"VPT{self.stock}ForConditionalGeneration"


def _one_by_one(frequencies: int) -> list[int]:
    return [1] * frequencies


def _qwen2_vision(embed_dim: int, out: int, mlp_ratio: int = 4, **others: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "hidden_size": out, "mlp_ratio": mlp_ratio, **others}


def _interleaved(frequencies: int) -> list[int]:
    return [len(range(axis, frequencies, 3)) for axis in range(3)]


def _quarters(depth: int) -> list[int]:
    """The last layer of each quarter: 7, 15, 23, 31 of 32."""
    return sorted({max(0, depth * quarter // 4 - 1) for quarter in range(1, 5)})


def _qwen2_5_vision(embed_dim: int, out: int, depth: int, mlp_ratio: int = 4, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": embed_dim, "intermediate_size": mlp_ratio * embed_dim, "out_hidden_size": out}
    return {**sizes, "depth": depth, "fullatt_block_indexes": _quarters(depth), **others}


def _qwen3_vision(embed_dim: int, out: int, depth: int, mlp_ratio: int = 4, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": embed_dim, "intermediate_size": mlp_ratio * embed_dim, "out_hidden_size": out}
    return {**sizes, "depth": depth, "deepstack_visual_indexes": _quarters(depth)[:3], **others}


BASES: dict[str, Base] = {
    row.model_type: row
    for row in (
        Base("Qwen2VL", "qwen2_vl", _qwen2_vision, _one_by_one, renames={**FLAT, **PUBLISHED}),
        Base(
            "Qwen2_5_VL",
            "qwen2_5_vl",
            _qwen2_5_vision,
            _one_by_one,
            position_inputs=("second_per_grid_ts",),
            renames=FLAT,
        ),
        Base(
            "Qwen3VL",
            "qwen3_vl",
            _qwen3_vision,
            _interleaved,
            head_dim=True,
            patch=16,
            normalize=HALF,
            system="",
            view_features=("pooler_output", "deepstack_features"),
        ),
    )
}
PLAIN = {row.plain: row for row in BASES.values()}
DEFAULT = next(iter(BASES.values()))  # the published one
