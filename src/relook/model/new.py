"""Scaled-down models that may look again: configuration, tokenizer and processor from one table row.

The tokenizer is byte-level BPE in Qwen2's own class, so it loads anywhere and encodes any text. Its merges are learnt
only from the phrases of the model's world, the published trigger sentences and the chat roles: known sentences cost
about a token a word, while digits and text in capitals stay one token per character, which is what a tiny model can
copy from an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from relook import looks
from relook.bases import BASES, DEFAULT
from relook.looks import LOOKS
from relook.plugins import find
from relook.processing.vocabulary import add_look_tokens

from .classes import model_class
from .configuration import config_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True)
class Size:
    """A row of the size table.

    `vit` holds `embed_dim`, `depth`, `num_heads` and `patch_size`; `base` is a row of the table of bases.
    `condition_std` is the initial spread of Linear_c: y = F + <F, c> c is quadratic in c, so a large c wrecks what the
    language model can already read, and c = 0 has no gradient.
    `first`, `crop` and `reencode` are keyword arguments of `processing.View`: how the page is seen at first, as the
    crop of a region look, and as a whole when re-encoded.
    """

    vit: dict[str, Any]
    lm: dict[str, Any]
    first: dict[str, Any]
    crop: dict[str, Any]
    reencode: dict[str, Any]
    looks: tuple[str, ...] = ("region", "clip")
    grid: int = 8
    region_margin: int = 1
    region_of: str = "whole"
    max_looks: int = 1
    free_choice: bool = True
    question_first: bool = True
    max_pixels: int = 512 * 512
    rope_theta: float = 1000.0
    init_std: float = 0.04
    condition_std: float = 0.005
    base: str = DEFAULT.model_type
    phrases: tuple[str, ...] = ()  # what the tokenizer is to know by whole words
    initialise: Callable[[Any], None] | None = None  # of a fresh model, after its weights were drawn


def build_tokenizer(size: Size) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of class Qwen2Tokenizer: 256 bytes, merges, then the special tokens.

    Ids: bytes and merges first, then the end of turn and padding, the rest of `SPECIALS`, and the control tokens of the
    size's looks in the published order.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    known = ["system", "user", "assistant", "\n", looks.DEFAULT_SYSTEM, looks.ANSWER_PREFIX, "Region 0: \n"]
    known += [spec.trigger for spec in LOOKS.values()]
    learner.train_from_iterator(dict.fromkeys([*known, *size.phrases]), trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=cast(Any, merges), eos_token="<|im_end|>", padding_side="left"
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    add_look_tokens(tokenizer, size.looks, size.grid)
    return tokenizer


def build_processor(size: Size) -> Any:
    """The VPTQwen2VLProcessor of a row: its tokenizer, patch size, views and grid."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from relook.processing import View, VPTQwen2VLProcessor

    patch, (mean, std) = size.vit["patch_size"], BASES[size.base].normalize
    images = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": size.max_pixels},
        image_mean=list(mean),
        image_std=list(std),
    )
    return VPTQwen2VLProcessor(
        images,
        build_tokenizer(size),
        looks=size.looks,
        grid_size=size.grid,
        region_margin=size.region_margin,
        region_of=size.region_of,
        max_looks=size.max_looks,
        first_look=View(**size.first),
        second_look=View(**size.crop),
        reencode_look=View(**size.reencode),
        free_choice=size.free_choice,
        question_first=size.question_first,
    )


def build_config(size: Size, processor: Any, **extra: Any) -> Any:
    """The config of a row, with the token ids of its processor."""
    tokenizer, base = processor.tokenizer, BASES[size.base]
    hidden, heads = size.lm["hidden_size"], size.lm["num_attention_heads"]
    # One frequency each for t, h, w in turn, so that rows and columns are told apart at every scale.
    rope = {"rope_type": "default", "rope_theta": size.rope_theta, **base.rope(hidden // heads // 2)}
    text: dict[str, Any] = {
        **size.lm,
        "vocab_size": len(tokenizer),
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "initializer_range": size.init_std,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(looks.IM_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(SPECIALS[0]),
    }
    if base.head_dim:
        text["head_dim"] = hidden // heads
    return config_class(base.model_type)(
        text_config=text,
        vision_config=base.vision(**size.vit, out=hidden, initializer_range=size.init_std),
        tie_word_embeddings=True,
        vision_encoder_ls=[LOOKS[n].encoder for n in size.looks if LOOKS[n].reencodes],
        initializer_range=size.init_std,
        **processor.config_token_ids(),
        **extra,
    )


def build(size: Size | str, seed: int, **extra: Any) -> tuple[Any, Any]:
    """A fresh model with random weights and its processor: `model, processor = build("cards-tiny", seed=1)`.

    Args:
        size: a row of the size table, or its name (`plugins`, group `relook.sizes`).
        seed: of the initial weights.
        extra: further config fields (`domain=`, `provenance=`).
    """
    row: Size = find("size", size, {}, fits=lambda row: isinstance(row, Size)) if isinstance(size, str) else size
    processor = build_processor(row)
    config = build_config(row, processor, **extra)
    torch.manual_seed(seed)
    model = model_class(config)(config)
    for projector in model.projectors.values():
        torch.nn.init.normal_(projector.linear_condition.weight, std=row.condition_std)
    if row.initialise is not None:
        row.initialise(model)
    return model.float(), processor
