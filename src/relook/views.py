"""How an image is opened and at which resolution it is looked at.

A `View` says what one look sees of an image: a scale, a cap on the longest side, a resampling filter. Three stages of
an answer have a view each (first look, crop of a region, re-encoding), so that a second look can be a closer one.
Which view a stage uses is decided by `processing`.
Frames: sizes are (width, height) in pixels, boxes (x1, y1, x2, y2) with x2 and y2 exclusive, origin top left, y down.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.errors import UserError
from relook.files import (
    DAMAGED,
    ONLY_PAGE,
    Page,
    base64_bytes,
    data_url,
    download,
    file_bytes,
    reading,
    split_page,
    stream_bytes,
)
from relook.regions import Box, eight_bits, split_crop_suffix, upright

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Size = tuple[int, int]

MIN_SIDE = 28  # one merged token of Qwen2-VL: 2 x 2 patches of 14 pixels
MAX_RATIO, CUT_RATIO = 200, 180  # over 200:1 Qwen2-VL's image processor refuses; the published code cuts to 180:1
RESAMPLES = ("nearest", "bicubic", "lanczos")


@dataclass(frozen=True)
class View:
    """The resolution and resampling at which one look sees an image.

    Attributes:
        longest_side: longer sides are scaled down to this many pixels (never up); None leaves them.
        resample: "bicubic" or "lanczos", which filter before they drop pixels, or "nearest" (published), which does
            not.
        scale: factor on the original pixels, applied before the cap. Tiny models use it to see glyphs at the size they
            were trained on.
        min_pixels: an image that has fewer pixels after `scale` is enlarged to so many, so that a small crop of small
            print is seen larger; None enlarges nothing. `longest_side` still holds.
        max_pixels: an image that has more pixels is scaled down to so many; None leaves them. Long and square pages
            then cost the same.
        max_scale: the most by which `min_pixels` enlarges the original pixels.

    Example: `View(512).target((1000, 400))` is (512, 204); `View(512, scale=0.5).target((1000, 400))` is (500, 200);
    `View(512, min_pixels=40_000).target((100, 64))` is (250, 160), with `max_scale=2` (200, 128).
    """

    longest_side: int | None = 512
    resample: str = "bicubic"
    scale: float = 1.0
    min_pixels: int | None = None
    max_scale: float = 4.0
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLES:
            raise UserError(f"View: resample={self.resample!r} is unknown; expected one of {', '.join(RESAMPLES)}")
        if self.longest_side is not None and self.longest_side < 1:
            raise UserError(
                f"View: longest_side={self.longest_side} is not a size; expected pixels (1 or more) or None"
            )
        for name, factor in (("scale", self.scale), ("max_scale", self.max_scale)):
            if not factor > 0:
                raise UserError(f"View: {name}={factor} is not a factor; expected a number above 0")
        for name, pixels in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if pixels is not None and pixels < 1:
                raise UserError(f"View: {name}={pixels} is not a size; expected pixels (1 or more) or None")

    @classmethod
    def of(cls, value: View | Mapping[str, Any] | int | None) -> View:
        """A view from itself, from its dict in processor_config.json, from a longest side, or from None (no cap)."""
        if isinstance(value, View):
            return value
        if value is None or isinstance(value, int):
            return cls(longest_side=value)
        names = [field.name for field in fields(cls)]
        if unknown := set(value).difference(names):
            raise UserError(f"View: unknown setting {sorted(unknown)}; expected {', '.join(names)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """As in processor_config.json: later settings only where they say something, so that older files stay alike."""
        return {name: value for name, value in asdict(self).items() if _LATER.get(name, ()) != value}

    def steps(self, size: Size, min_side: int = MIN_SIDE) -> list[Size]:
        """The sizes an image of `size` goes through; the last one is what the look sees, an empty list means as it is.

        Each rule of spec.md section 4 is a step: scale and cap, sides under `min_side` raised to it, aspect ratios over
        200 cut to 180. Sides are truncated to whole pixels, as published.
        """
        seen: list[Size] = []
        width, height = size
        factor = self.scale
        if self.min_pixels is not None:
            enough = math.sqrt(self.min_pixels / (width * height))
            factor = max(factor, min(enough, self.max_scale))
        if self.longest_side is not None and max(width, height) * factor > self.longest_side:
            factor = self.longest_side / max(width, height)
        if self.max_pixels is not None and width * height * factor**2 > self.max_pixels:
            factor = math.sqrt(self.max_pixels / (width * height))
        if factor != 1.0:
            width, height = max(1, int(width * factor)), max(1, int(height * factor))
            seen.append((width, height))
        if min(width, height) < min_side:
            width, height = max(width, min_side), max(height, min_side)
            seen.append((width, height))
        if max(width, height) > MAX_RATIO * min(width, height):
            width, height = min(width, CUT_RATIO * height), min(height, CUT_RATIO * width)
            seen.append((width, height))
        return seen

    def target(self, size: Size, min_side: int = MIN_SIDE) -> Size:
        """The size at which an image of `size` is seen."""
        return (self.steps(size, min_side) or [size])[-1]

    def apply(
        self, image: Image.Image, min_side: int = MIN_SIDE, snap: Callable[[Size], Size] | None = None
    ) -> Image.Image:
        """The image as this look sees it, RGB.

        Args:
            image: a PIL image, upright.
            min_side: the least width and height that the vision encoder takes, in pixels.
            snap: moves the target size to one that the vision encoder takes as it is, so that the pixels are resampled
                once and not twice. "nearest" ignores it: the published code leaves that to the image processor.
        """
        from PIL import Image

        if image.mode != "RGB":
            image = image.convert("RGB")
        steps = self.steps(image.size, min_side)
        if self.resample != "nearest":  # one resize to the final size: every resampling costs sharpness
            final = steps[-1] if steps else image.size
            steps = [snap(final) if snap else final]
        for size in steps:
            if size != image.size:
                image = image.resize(size, Image.Resampling[self.resample.upper()])
        return image


_LATER: dict[str, Any] = {"min_pixels": None, "max_scale": View.max_scale, "max_pixels": None}
DEFAULT_VIEW = View(512)

# Named settings of the three views; None for re-encoding means "the view of the first look".
PREPROCESSING: dict[str, dict[str, View | None]] = {
    name: {"first_look": view, "second_look": view, "reencode_look": None}
    for name, view in (
        ("default", DEFAULT_VIEW),
        ("published", View(512, "nearest")),
        ("published-224", View(224, "nearest")),
    )
}


def open_image(source: Any, fetch: bool = False) -> Image.Image:
    """An upright RGB image from whatever people hold.

    Args:
        source: a path or data URL (of a file with several pages `scan.pdf#page=2`), a PIL image, the bytes of an image
            file, an open binary file, an image column's {"bytes", "path"}, or an array: NumPy's (height, width),
            (height, width, 1, 3 or 4) or channels first, or a tensor of torch's; uint8, or floats in 0..1.
        fetch: also take whatever transformers' own functions do: http(s) addresses, and files as base64 text.

    Raises:
        UserError: nothing there, not an image, a file that ends early, an image without pixels, several pages.
    """
    from PIL import Image

    if isinstance(source, Mapping) and {"bytes", "path"} & set(source):
        data, path = source.get("bytes"), source.get("path")
        return open_image(path if data is None else data, fetch)
    if isinstance(source, (str, os.PathLike)):
        return _open_named(os.fsdecode(source), fetch)
    if isinstance(source, Image.Image):
        if 0 in source.size:
            raise UserError(
                f"image of {source.width} x {source.height} pixels has nothing to see; give one with pixels"
            )
        try:
            return upright(_loaded(source))
        except UserError:
            raise
        except DAMAGED as error:  # PIL reads lazily: a broken file shows here
            raise UserError(f"image cannot be read ({error}); give a complete image") from error
    if hasattr(source, "read"):
        data, name = stream_bytes(source), getattr(source, "name", None)
        return _decode(data, name if isinstance(name, str) else f"open file of {len(data)} bytes")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), f"{len(source)} bytes")
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        return _from_array(source)
    raise UserError(
        f"image is a {type(source).__name__}; expected a path, a PIL image, an array or tensor, an open file, or the "
        "bytes of an image file"
    )


def _open_named(source: str, fetch: bool) -> Image.Image:
    """The image at a path or address."""
    name, page = split_page(source)
    scheme = name.partition(":")[0].lower()
    if scheme == "data":
        return _decode(data_url(name), f"data URL {name[:40]}...", page)
    if scheme in ("http", "https") and name[len(scheme) :].startswith("://"):
        if not fetch:
            raise UserError(f"{name}: addresses are not fetched; download the image, or ask with fetch=True (--fetch)")
        return _decode(download(name), name, page)
    if fetch and not os.path.isfile(name) and (data := base64_bytes(name)):
        return _decode(data, f"base64 text {name[:40]}...")
    return _decode(file_bytes(name), name, page)


def existing_ref(ref: str) -> tuple[str, Box | None]:
    """File and crop of an image entry, `"a.jpg_0,0,8,8"` (no crop where there is a file that is really called so)."""
    file, box = split_crop_suffix(ref)
    if box is not None and not os.path.exists(file) and os.path.exists(ref):
        return ref, None
    return file, box


def load_item_image(source: Any, root: str | Path | None = None) -> Image.Image:
    """An image of a data item: whatever `open_image` takes, a path with a crop suffix, or a pair (image, box).

    `a.jpg_80,100,320,250` is the crop x1, y1, x2, y2 of a.jpg in pixels of the original (spec.md, section 3). A
    box that leaves the image is clipped to it. Relative paths are taken from `root`.
    """
    box: Any = None
    name = source
    if isinstance(source, (str, Path)) and not str(source).lower().startswith(("data:", "http://", "https://")):
        name, box = existing_ref(os.path.join(root or ".", source))
        image = open_image(name)
    elif isinstance(source, (tuple, list)) and len(source) == 2:
        image, box = open_image(source[0]), tuple(source[1])
        name = "image"
    else:
        return open_image(source)
    if box is None:
        return image
    left, top, right, bottom = (int(v) for v in box)
    kept = (max(0, left), max(0, top), min(image.width, right), min(image.height, bottom))
    if kept[0] >= kept[2] or kept[1] >= kept[3]:
        raise UserError(
            f"{name}: crop {left},{top},{right},{bottom} holds no pixel of the {image.width} x {image.height} image; "
            "expected x1,y1,x2,y2 with x1 < x2 and y1 < y2 inside it"
        )
    return image.crop(kept)


def _decode(data: bytes, name: str, page: Page = ONLY_PAGE) -> Image.Image:
    with reading(io.BytesIO(data), name, page=page) as image:
        return upright(_loaded(image))


def _loaded(image: Image.Image) -> Image.Image:
    """The image, read to its end; a transparent color that a PNG names is in the file's depth, and scaled to 8 bits."""
    tile: Any = getattr(image, "tile", None)
    depth = str(tile[0][3]) if tile else ""
    image.load()
    named, factor = image.info.get("transparency"), {"L;2": 85, "L;4": 17}.get(depth)
    if isinstance(named, tuple) and (depth.startswith("RGB;16") or max(named) > 255):
        raise UserError("16 bits of RGB with a transparent color, which 8 bits cannot tell; give an alpha channel")
    if isinstance(named, int) and factor:
        image = image.copy()  # the caller's stays as it is
        image.info["transparency"] = named * factor
    return image


def _from_array(source: Any) -> Image.Image:
    from PIL import Image

    try:
        array = _numpy(source)
    except DAMAGED as error:  # a tensor without values, a type that NumPy lacks
        raise UserError(f"{type(source).__name__} cannot be read ({error}); give uint8, or floats in 0..1") from error
    sides = (1, 3, 4)  # channels of an image
    first = array.ndim == 3 and array.shape[0] in sides and (hasattr(source, "detach") or array.shape[2] not in sides)
    array = array.transpose(1, 2, 0) if first else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in sides) or 0 in array.shape:
        raise UserError(
            f"array of shape {array.shape} is no image; expected (height, width), (height, width, 3 or 4) or "
            "(3 or 4, height, width); several images are given as a list"
        )
    return upright(Image.fromarray(eight_bits(array[:, :, 0] if array.shape[2:] == (1,) else array)))


def _numpy(source: Any) -> np.ndarray:
    """An array, or a tensor of torch's wherever it is, as NumPy's."""
    import numpy as np

    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # NumPy has no bfloat16
    return np.asarray(source)
