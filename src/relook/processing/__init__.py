"""Text, images and looks to tensors: the processor, the resolution of each look, the tokens of the looks."""

from relook.processing.processor import VPTQwen2VLProcessor
from relook.processing.turns import check_counts
from relook.processing.vocabulary import IGNORED, KINDS, TENSORS, add_look_tokens, chat_template, expand
from relook.views import PREPROCESSING, View, load_item_image, open_image

__all__ = [
    "IGNORED",
    "KINDS",
    "PREPROCESSING",
    "TENSORS",
    "VPTQwen2VLProcessor",
    "View",
    "add_look_tokens",
    "chat_template",
    "check_counts",
    "expand",
    "load_item_image",
    "open_image",
]
