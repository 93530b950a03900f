"""Small processors and inputs for the tests of processing."""

import numpy as np
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from relook.looks import LOOKS
from relook.processing import VPTQwen2VLProcessor, load_item_image
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


def as_parts(content: str) -> list[dict]:
    """Published content with placeholders -> content parts of the chat template."""
    parts: list[dict] = []
    while content:
        found = [(content.find(s.placeholder), s.placeholder) for s in LOOKS.values() if s.placeholder in content]
        at, placeholder = min(found, default=(len(content), ""))
        if at:
            parts.append({"type": "text", "text": content[:at]})
        if placeholder:
            parts.append({"type": placeholder.strip("<>")})
        content = content[at + len(placeholder) :]
    return parts


def as_chat(item: dict, root) -> list[dict]:
    """An item as a chat whose image parts hold their images."""
    images = {s.placeholder.strip("<>"): iter(item.get(s.item_key) or []) for s in LOOKS.values()}
    chat = [{"role": m["role"], "content": as_parts(m["content"])} for m in item["messages"]]
    for part in (part for message in chat for part in message["content"] if part["type"] in images):
        part["image"] = load_item_image(next(images[part["type"]]), root)
    return chat
