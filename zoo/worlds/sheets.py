"""Pages pasted small on larger sheets, as a flatbed scanner shows a receipt that somebody has put on it.

Sizes follow the real set, where the longest side is 1280 pixels: print on A4 sheets (905 x 1280) has letters 5.0 to 8.2
pixels apart (median 6.6), on other scans 7.5 to 15.8 (median 11).

Boxes are (x1, y1, x2, y2) in pixels of the image, x2 and y2 exclusive.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.worlds.base import Area, Box, Glyph, Page

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

A4 = (905, 1280)  # pixels
SCALES = (0.35, 1.0)  # of the page
PITCH = (5.0, 7.8)  # pixels from letter to letter on an A4 sheet; print is never smaller than the first


def on_sheet(page: Page, random: np.random.Generator, a4: bool = False) -> Page:
    """A page at a scale of SCALES somewhere on a sheet of at most A4; boxes, letters and lines move with it.

    Args:
        page: at most 1280 pixels high; lines, where it has some, in `meta["lines"]`.
        a4: always an A4 sheet, and print as small as on real ones.

    Example: a page of 400 x 1000 at scale 0.5 on an A4 sheet, pasted at (300, 200), has its box (40, 100, 80, 120) at
    (320, 250, 340, 260).
    """
    width, height = _pasted_size(page, random, a4)
    size = _sheet_size((width, height), random, a4)
    left, top = _position((size[0] - width, size[1] - height), random)
    across, down = width / page.image.width, height / page.image.height
    image = _paste(page.image, (left, top, left + width, top + height), size, random, a4)

    def moved(box: Box) -> Box:
        x1, y1 = math.floor(box[0] * across), math.floor(box[1] * down)
        x2, y2 = min(width, math.ceil(box[2] * across)), min(height, math.ceil(box[3] * down))
        return left + x1, top + y1, left + x2, top + y2

    lines: Any = page.meta.get("lines", ())
    placed = tuple(
        replace(
            line,
            box=moved(line.box),
            boxes=tuple(None if box is None else moved(box) for box in line.boxes),
            centres=tuple(None if c is None else (left + c[0] * across, top + c[1] * down) for c in line.centres),
        )
        for line in lines
    )
    return Page(
        image,
        tuple(replace(qa, boxes=tuple(moved(box) for box in qa.boxes)) for qa in page.qas),
        tuple(Glyph(glyph.char, moved(glyph.box)) for glyph in page.glyphs),
        tuple(Area(area.label, moved(area.box)) for area in page.areas),
        {**page.meta, "lines": placed},
    )


def _pitch(page: Page) -> float:
    """Median distance from letter to letter, pixels; that of the real set where a page has no lines."""
    lines: Any = page.meta.get("lines", ())
    found = sorted((line.box[2] - line.box[0]) / len(line.text) for line in lines if len(line.text) > 3)
    return found[len(found) // 2] if found else 11.0


def _pasted_size(page: Page, random: np.random.Generator, a4: bool) -> tuple[int, int]:
    pitch = _pitch(page)
    low, high = (max(SCALES[0], PITCH[0] / pitch), SCALES[1])
    scale = random.uniform(PITCH[0], PITCH[1]) / pitch if a4 else random.uniform(min(low, high), high)
    scale = min(max(scale, SCALES[0]), high, A4[0] / page.image.width, A4[1] / page.image.height)
    return max(1, round(page.image.width * scale)), max(1, round(page.image.height * scale))


def _sheet_size(pasted: tuple[int, int], random: np.random.Generator, a4: bool) -> tuple[int, int]:
    """A4 every other time, else anything from the page's own size to A4, not wider than high if the page is not."""
    if a4 or random.random() < 0.5:
        return A4
    height = int(random.integers(pasted[1], A4[1] + 1))
    return int(random.integers(pasted[0], max(pasted[0], min(A4[0], height)) + 1)), height


def _position(free: tuple[int, int], random: np.random.Generator) -> tuple[int, int]:
    """Left and top: mostly in the middle of the width and above that of the height, else anywhere."""
    across, down = random.uniform(size=2)
    if random.random() < 0.6:
        across, down = min(max(random.normal(0.5, 0.08), 0.0), 1.0), 0.05 + 0.5 * down
    return int(free[0] * across), int(free[1] * down)


def _paste(page: Image.Image, box: Box, size: tuple[int, int], random: np.random.Generator, a4: bool) -> Image.Image:
    """The page on a sheet with specks, shadow and pen marks; mostly, as on real ones, dark on white."""
    import numpy as np
    from PIL import Image

    grey = page.convert("L").resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    white = random.random() < (0.9 if a4 else 0.67)
    if white:
        values = np.asarray(grey, np.float32)
        black, paper = float(np.percentile(values, 0.5)) * random.uniform(0.4, 1.0), float(np.median(values))
        values = (values - black) * (255 / max(paper * random.uniform(0.93, 1.0) - black, 20.0))
        grey = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    sheet = Image.new("L", size, 255 if white else int(random.integers(200, 256)))
    if random.random() < 0.15:
        sheet = _shadow(sheet, random)
    _marks(sheet, box, random)
    sheet.paste(grey, box)
    return sheet.convert("RGB")


def _shadow(sheet: Image.Image, random: np.random.Generator) -> Image.Image:
    """A grainy band along the left or right edge, dark at the edge."""
    import numpy as np
    from PIL import Image

    values = np.array(sheet, np.float32)
    wide = int(random.integers(8, sheet.width // 8))
    dark = np.linspace(random.uniform(80, 220), 0, wide) * random.uniform(0.3, 1.0, (sheet.height, wide))
    band = (slice(None), slice(wide)) if random.random() < 0.5 else (slice(None), slice(None, -wide - 1, -1))
    values[band] -= dark
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _marks(sheet: Image.Image, box: Box, random: np.random.Generator) -> None:
    """Specks anywhere, and sometimes a jagged word in pen over the page."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(sheet)
    for _ in range(int(random.choice((0, 10, 40, 100)))):
        x, y, r = random.uniform(0, sheet.width), random.uniform(0, sheet.height), random.uniform(0.3, 1.3)
        draw.ellipse((x, y, x + r, y + r), fill=int(random.integers(90, 235)))
    if random.random() < 0.4:
        x, y = random.uniform(box[0], box[2]), box[1] - random.uniform(10, 50)
        points = [(x + 6 * i, y + random.uniform(-12, 12)) for i in range(int(random.integers(6, 16)))]
        draw.line(points, fill=int(random.integers(20, 150)), width=int(random.integers(1, 3)))
