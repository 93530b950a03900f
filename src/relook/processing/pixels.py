"""Images to the tensors of the vision encoders, by the PIL image processors of transformers.

The PIL classes are used even where torchvision is installed: the two differ by up to 0.03 in normalised pixels, and a
model should see the same image everywhere. (Pillow's own versions still differ by a grey level here and there: 13
resizes some sizes along y first where 12 went along x first, and so rounds in another order.)
"""

from __future__ import annotations

from typing import Any

from transformers import BitImageProcessorPil, Qwen2VLImageProcessorPil, SamImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from relook.processing.vocabulary import TENSORS
from relook.views import Size

# spec.md, section 4. DINOv2: shortest side 256, centre crop 224, ImageNet statistics; SAM: longest side 1024, padded.
ENCODERS = {
    "detection": BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ),
    "seg": SamImageProcessorPil(),
}


def is_vit(look: str) -> bool:
    """Whether a kind of encoding goes through the model's own ViT (and so comes with a patch grid)."""
    return len(TENSORS[look]) == 2


def pinned(image_processor: Any) -> Any:
    """The PIL image processor with the settings of a Qwen2-VL one."""
    if isinstance(image_processor, Qwen2VLImageProcessorPil) or not hasattr(image_processor, "merge_size"):
        return image_processor  # transformers says what is wrong with a class that is not an image processor
    return Qwen2VLImageProcessorPil.from_dict(image_processor.to_dict())


def vit_size(image_processor: Any, size: Size) -> Size:
    """The (width, height) to which the image processor would resize an image of `size`: multiples of a merged token.

    With Qwen2-VL's, (512, 204) gives (504, 196).
    """
    width, height = size
    limits = image_processor.size
    height, width = smart_resize(
        height,
        width,
        image_processor.patch_size * image_processor.merge_size,
        min_pixels=limits["shortest_edge"],
        max_pixels=limits["longest_edge"],
    )
    return width, height
