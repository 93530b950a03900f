"""A tiny random base in a folder as on the hub (model, tokenizer, image processor, chat template)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

from relook.bases import BASES
from support.oracle import STOCK
from support.tiny_model import TEXT, default_base

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def plain_qwen2_vl(folder: Path) -> list[int]:
    """Write the folder; returns the ids of a text in its vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS}
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 256, "longest_edge": 65536}).save_pretrained(folder)
    base = default_base()
    settings, kind = STOCK[base]
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=True,
        **TEXT.get(base, {}),
    )
    config = settings(
        text_config=text,
        vision_config=BASES[base].vision(depth=1, embed_dim=16, out=32, mlp_ratio=2, num_heads=2, patch_size=8),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    kind(config).eval().save_pretrained(folder)
    return tokenizer("What is the total?")["input_ids"]
