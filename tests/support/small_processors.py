"""Small processors and inputs for the tests of processing."""

import numpy as np
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from relook.processing import VPTQwen2VLProcessor
from support import qwen_vocab


def processor_of(patch=4, **settings) -> VPTQwen2VLProcessor:
    images = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 4 * patch * patch, "longest_edge": 64 * 64 * 4}
    )
    processor = VPTQwen2VLProcessor(images, qwen_vocab.byte_tokenizer(), **settings)
    processor.add_look_tokens()
    return processor


def page(width=64, height=48, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def region_item(**changes) -> dict:
    return {
        "messages": [
            {"role": "user", "content": "<image>\nWho?"},
            {"role": "assistant", "content": "<|region_token_start|><|x_0|><|y_0|><|x_1|><|y_1|><|region_token_end|>"},
            {"role": "user", "content": "<image>"},
            {"role": "assistant", "content": "me"},
        ],
        "images": [page(), (page(), (0, 0, 24, 24))],
    } | changes
