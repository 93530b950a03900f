"""The base models: one row each for the vision-language models of transformers that can be given looks.

A row says what differs between bases as data; nothing else in relook asks which base a model has. A further base is one
more row, and a subclass of `LookConfig` and of `LookAgainMixin` (`model.configuration`, `model.classes`).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
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

    name              what its makers call it
    stock             begins the names of transformers' classes: `<stock>Config`, `<stock>ForConditionalGeneration`
    plain             their model type
    vision            (embed_dim, out, depth, mlp_ratio, ...) -> its vision config; `out` is the language model's width
    rope              number of frequencies -> keys of `rope_parameters` that give t, h, w one each in turn
    head_dim          whether its text config states the width of a head
    normalize         mean and standard deviation of normalized pixels
    system            system prompt of its chat template; "" for none
    view_features     outputs of `get_image_features` that a view's features consist of: the final ones, and lists of
                      inner ones that the decoder adds at image positions after its first layers (deepstack)
    position_inputs   keywords that its `get_rope_index` takes beyond ids, mask and grids
    renames           names of stored weights -> names here
    """

    name: str
    stock: str
    plain: str
    vision: Callable[..., dict[str, Any]]
    rope: Callable[[int], dict[str, Any]]
    head_dim: bool = False
    normalize: tuple[tuple[float, ...], tuple[float, ...]] = CLIP
    system: str = DEFAULT_SYSTEM
    view_features: tuple[str, ...] = ("pooler_output",)
    position_inputs: tuple[str, ...] = ()
    renames: dict[str, str] = field(default_factory=dict)

    @property
    def processor_class(self) -> str:
        """transformers' own."""
        return f"{self.stock}Processor"

    @property
    def model_type(self) -> str:
        return f"{self.plain}_vpt"

    @property
    def config_class(self) -> str:
        return f"VPT{self.stock}Config"

    @property
    def model_class(self) -> str:
        return f"VPT{self.stock}ForConditionalGeneration"


def _one_by_one(frequencies: int) -> dict[str, Any]:
    return {"mrope_section": [1] * frequencies}


def _qwen2_vision(embed_dim: int, out: int, mlp_ratio: int = 4, **others: Any) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "hidden_size": out, "mlp_ratio": mlp_ratio, **others}


def _interleaved(frequencies: int) -> dict[str, Any]:
    sections = [len(range(axis, frequencies, 3)) for axis in range(3)]
    return {"mrope_section": sections, "mrope_interleaved": True}


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
        Base("Qwen2-VL", "Qwen2VL", "qwen2_vl", _qwen2_vision, _one_by_one, renames={**FLAT, **PUBLISHED}),
        Base(
            "Qwen2.5-VL",
            "Qwen2_5_VL",
            "qwen2_5_vl",
            _qwen2_5_vision,
            _one_by_one,
            position_inputs=("second_per_grid_ts",),
            renames=FLAT,
        ),
        Base(
            "Qwen3-VL",
            "Qwen3VL",
            "qwen3_vl",
            _qwen3_vision,
            _interleaved,
            head_dim=True,
            normalize=HALF,
            system="",
            view_features=("pooler_output", "deepstack_features"),
        ),
    )
}
PLAIN = {row.plain: row for row in BASES.values()}
DEFAULT = next(iter(BASES.values()))  # the published one


# -- published checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Sizes of one checkpoint of a base, as its config.json on the hub has them.

    text: of its language model; vision: keyword arguments of `Base.vision`; tied: whether its head is the embedding.
    """

    base: Base
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool

    def config(self) -> dict[str, Any]:
        """Keyword arguments of its config class."""
        vision = self.base.vision(**self.vision, out=self.text["hidden_size"])
        return {"text_config": deepcopy(self.text), "vision_config": vision, "tie_word_embeddings": self.tied}


def _text(positions: int, rope: dict[str, Any], **others: Any) -> Callable[..., dict[str, Any]]:
    def sizes(
        hidden: int, intermediate: int, layers: int, heads: tuple[int, int], vocabulary: int = 151936
    ) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "vocab_size": vocabulary,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": positions,
            "rope_parameters": {"rope_type": "default", **rope},
            **others,
        }

    return sizes


_qwen2 = _text(32768, {"mrope_section": [16, 24, 24], "rope_theta": 1e6})
_qwen2_5 = _text(128000, {"mrope_section": [16, 24, 24], "rope_theta": 1e6})
_qwen3 = _text(262144, {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}, head_dim=128)
_VIT = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14}
_VIT_2_5 = {**_VIT, "intermediate_size": 3420, "window_size": 112, "tokens_per_second": 2}
_VIT_3 = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
_VIT_3_SMALL = {**_VIT_3, "embed_dim": 1024, "depth": 24, "intermediate_size": 4096}
_VIT_3_LARGE = {
    **_VIT_3,
    "embed_dim": 1152,
    "depth": 27,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
HUB: dict[str, Checkpoint] = {  # by hub id; https://huggingface.co/Qwen, November 2026
    f"Qwen/{row.base.name}-{size}-Instruct": row
    for size, row in (
        ("2B", Checkpoint(PLAIN["qwen2_vl"], _qwen2(1536, 8960, 28, (12, 2)), _VIT, True)),
        ("7B", Checkpoint(PLAIN["qwen2_vl"], _qwen2(3584, 18944, 28, (28, 4), 152064), _VIT, False)),
        ("3B", Checkpoint(PLAIN["qwen2_5_vl"], _qwen2_5(2048, 11008, 36, (16, 2)), _VIT_2_5, True)),
        ("7B", Checkpoint(PLAIN["qwen2_5_vl"], _qwen2_5(3584, 18944, 28, (28, 4), 152064), _VIT_2_5, False)),
        ("2B", Checkpoint(PLAIN["qwen3_vl"], _qwen3(2048, 6144, 28, (16, 8)), _VIT_3_SMALL, True)),
        ("4B", Checkpoint(PLAIN["qwen3_vl"], _qwen3(2560, 9728, 36, (32, 8)), _VIT_3_SMALL, True)),
        ("8B", Checkpoint(PLAIN["qwen3_vl"], _qwen3(4096, 12288, 36, (32, 8)), _VIT_3_LARGE, False)),
    )
}
