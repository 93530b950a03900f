"""Text rendering into an ink plane: cached glyph masks of small bundled fonts, and lines with per-letter boxes.

`Style` gives font, size and printer effects (stretch, dot matrix, double strike). `print_line` renders a text into an
array and returns a `PrintedLine` with the ink box of every letter.

Boxes are (x1, y1, x2, y2) in pixels of the ink plane, origin top left, x2 and y2 exclusive. Ink is uint8, 255 = black.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from relook.regions import union

if TYPE_CHECKING:
    import numpy as np
    from PIL import ImageFont

Box = tuple[int, int, int, int]

MONO = (
    "mono",
    "mono-bold",
    "courier",
    "courier-bold",
    "courier-sans",
    "dot",
    "terminal",
    "terminal-condensed",
    "noto-mono",
    "thermal",
    "slab-mono",
    "ocr-b",
)
PROPORTIONAL = ("sans", "sans-bold", "serif", "pillow")
_SUFFIX = {f: ".otf" for f in ("courier", "courier-bold", "courier-sans", "ocr-b", "thermal", "slab-mono")}
_CACHED_GLYPHS = 40_000  # of a few hundred bytes each


@dataclass(frozen=True)
class Style:
    """How a line is printed.

    Attributes:
        face: a row of MONO or PROPORTIONAL.
        em: font size in pixels.
        stretch: factor on widths.
        dots: 0 for smooth outlines, else the em in printer dots at which the glyph is binarized before it is enlarged.
        strike: extra stroke width in pixels (0 or 1).
    """

    face: str
    em: int
    stretch: float = 1.0
    dots: int = 0
    strike: int = 0


@dataclass(frozen=True)
class PrintedLine:
    """A printed text: `boxes[i]` is the ink box of `text[i]` (None for a space); `box` covers all."""

    text: str
    box: Box
    boxes: tuple[Box | None, ...]


@lru_cache(maxsize=512)
def font(face: str, em: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels; "pillow" is Pillow's built-in font."""
    import io

    from PIL import ImageFont

    if face == "pillow":
        loaded = ImageFont.load_default(em)
        assert isinstance(loaded, ImageFont.FreeTypeFont)  # Pillow falls back to a bitmap only without FreeType
        return loaded
    name = face + _SUFFIX.get(face, ".ttf")
    return ImageFont.truetype(io.BytesIO(_font_bytes(name)), em)


@lru_cache(maxsize=64)
def _font_bytes(name: str) -> bytes:
    return resources.files("zoo.worlds").joinpath("fonts", name).read_bytes()


@lru_cache(maxsize=_CACHED_GLYPHS)
def glyph(style: Style, char: str) -> tuple[np.ndarray | None, int, int, float]:
    """Return (mask or None for a blank, left, top below the ascender line, advance) in pixels."""
    import numpy as np
    from PIL import Image

    source = font(style.face, style.dots or style.em)
    zoom = style.em / style.dots if style.dots else 1.0
    advance = source.getlength(char) * zoom * style.stretch
    left, top, right, bottom = (int(v) for v in source.getbbox(char))
    if char == " " or right <= left or bottom <= top:
        return None, 0, 0, advance
    core = source.getmask(char, mode="L")
    mask = np.asarray(Image.frombytes("L", core.size, bytes(core)))
    if style.dots:
        mask = np.where(mask > 110, 255, 0).astype(np.uint8)
    width = max(1, round(mask.shape[1] * zoom * style.stretch))
    height = max(1, round(mask.shape[0] * zoom))
    if (height, width) != mask.shape:
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
    if style.strike:
        wide = np.zeros((height, width + style.strike), np.uint8)
        wide[:, :width] = mask
        np.maximum(wide[:, style.strike :], mask, out=wide[:, style.strike :])
        mask = wide
    return mask, round(left * zoom * style.stretch), round(top * zoom), advance


def width(style: Style, text: str) -> float:
    """Width of a rendered text in pixels."""
    return sum(glyph(style, char)[3] for char in text)


def print_line(ink: np.ndarray, x: float, y: float, text: str, style: Style) -> PrintedLine | None:
    """Render `text` into `ink` (height, width) with its ascender line at y; None if no letter lies inside.

    Letters that would leave the plane are left out of the line's text.
    """
    import numpy as np

    kept: list[str] = []
    boxes: list[Box | None] = []
    for char in text:
        mask, left, top, advance = glyph(style, char)
        if mask is None:
            kept.append(char)
            boxes.append(None)
        else:
            x1, y1 = round(x) + left, round(y) + top
            x2, y2 = x1 + mask.shape[1], y1 + mask.shape[0]
            if x1 >= 0 and y1 >= 0 and x2 <= ink.shape[1] and y2 <= ink.shape[0]:
                target = ink[y1:y2, x1:x2]
                np.maximum(target, mask, out=target)
                kept.append(char)
                boxes.append((x1, y1, x2, y2))
        x += advance
    real = [box for box in boxes if box]
    if not real:
        return None
    return PrintedLine("".join(kept), union(real), tuple(boxes))
