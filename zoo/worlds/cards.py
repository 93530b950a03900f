"""Cards: pages of colored boxes with three-digit codes; the question asks for the code in the box of one color.

The smallest dataset in which a second look is needed: at 64 x 64 pixels boxes and colors are visible, the codes are
not. Everything is aligned to a 16-pixel grid, so that at half scale one digit fills one 8-pixel patch, which lets a
tiny model learn to read within minutes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from relook.io import rng
from zoo.worlds.base import QA, Area, Box, Glyph, Page

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIDE = 512  # page size in pixels
UNIT = 16  # layout grid in pixels
BOX = (5, 3)  # width and height of a box in units: 80 x 48 pixels
DIGITS = 3  # per code, in the middle row and columns 1 to 3 of the box

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (243, 131, 25),
    "yellow": (248, 212, 60),
    "green": (44, 152, 70),
    "cyan": (60, 200, 208),
    "blue": (38, 84, 200),
    "purple": (126, 58, 172),
    "pink": (242, 140, 188),
}

QUESTIONS = (
    "What is the code in the {} box?",
    "What is the number in the {} box?",
    "Which code does the {} box show?",
    "Read the code of the {} card.",
)


class Cards:
    """The cards dataset (see the module). `Cards(1).sample(0)` is always the same page."""

    name = "cards"
    charset = "0123456789"
    labels = tuple(COLORS)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        return tuple(question.format(color) for question in QUESTIONS for color in COLORS)

    def sample(self, index: int) -> Page:
        """One page of 4 to 6 boxes of different colors, with one question per box."""
        from PIL import ImageDraw

        random = rng(self.seed, self.name, index)
        image = _paper(random)
        draw = ImageDraw.Draw(image)
        colors = [str(c) for c in random.permutation(list(COLORS))]
        qas, glyphs, areas = [], [], []
        for color, box in zip(colors, _places(random, int(random.integers(4, 7))), strict=False):
            code = "".join(str(d) for d in random.integers(0, 10, DIGITS))
            _draw_box(draw, box, _shade(random, COLORS[color]))
            glyphs += _draw_code(image, random, box, code, COLORS[color])
            areas.append(Area(color, box))
            question = str(random.choice(QUESTIONS)).format(color)
            qas.append(QA(question, code, (box,), field=color))
        return Page(image, tuple(qas), tuple(glyphs), tuple(areas))


def _paper(random: np.random.Generator) -> Image.Image:
    """An empty page: a light tint, a fine dotted grid and a frame."""
    from PIL import Image, ImageDraw

    tint = tuple(int(v) for v in 255 - random.integers(0, 22, 3))
    image = Image.new("RGB", (SIDE, SIDE), tint)
    draw = ImageDraw.Draw(image)
    dot = tuple(v - 26 for v in tint)
    draw.point([(x, y) for x in range(UNIT, SIDE, UNIT) for y in range(UNIT, SIDE, UNIT)], fill=dot)
    frame = tuple(v - 60 for v in tint)
    draw.rectangle((5, 5, SIDE - 6, SIDE - 6), outline=frame, width=2)
    return image


def _places(random: np.random.Generator, count: int) -> list[Box]:
    """Sample boxes on the unit grid, one unit inside the page and at least one unit apart (rejection sampling).

    Left edges lie on odd columns, so that at half scale the first two digits of a code share a merged token and the
    third has its own: one layout of digits to learn instead of two.
    """
    units = SIDE // UNIT
    taken: list[tuple[int, int]] = []
    while len(taken) < count:
        x, y = 1 + 2 * int(random.integers((units - BOX[0]) // 2)), int(random.integers(1, units - BOX[1]))
        if all(abs(x - a) > BOX[0] or abs(y - b) > BOX[1] for a, b in taken):
            taken.append((x, y))
    return [(x * UNIT, y * UNIT, (x + BOX[0]) * UNIT, (y + BOX[1]) * UNIT) for x, y in taken]


def _shade(random: np.random.Generator, color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Vary each channel of a color by at most 12."""
    r, g, b = (int(min(255, max(0, v + d))) for v, d in zip(color, random.integers(-12, 13, 3), strict=True))
    return r, g, b


def _draw_box(draw, box: Box, fill: tuple[int, int, int]) -> None:
    """Draw a card with a soft shadow (3 pixels outside `box`), its color and a darker rim."""
    x1, y1, x2, y2 = box
    draw.rounded_rectangle((x1 + 3, y1 + 3, x2 + 1, y2 + 1), radius=7, fill=(198, 198, 198))
    rim = tuple(v * 3 // 4 for v in fill)
    draw.rounded_rectangle((x1, y1, x2 - 2, y2 - 2), radius=7, fill=fill, outline=rim, width=2)


def _draw_code(
    image: Image.Image, random: np.random.Generator, box: Box, code: str, color: tuple[int, int, int]
) -> list[Glyph]:
    """Print the code in the middle row of the box, one digit per unit, each shifted by at most one pixel."""
    dark = sum(color) < 330
    ink = tuple(int(v) for v in (random.integers(225, 256, 3) if dark else random.integers(0, 50, 3)))
    bold = bool(random.integers(2))
    glyphs = []
    for i, char in enumerate(code):
        x, y = box[0] + (1 + i) * UNIT, box[1] + UNIT
        dx, dy = (int(v) for v in random.integers(-1, 2, 2))
        mask = _digit(char, bold)
        image.paste(ink, (x + dx, y + dy), mask)
        glyphs.append(Glyph(char, (x, y, x + UNIT, y + UNIT)))
    return glyphs


@cache
def _digit(char: str, bold: bool) -> Image.Image:
    """Coverage of a digit (mode L, UNIT x UNIT), centered, in Pillow's built-in font."""
    from PIL import Image, ImageDraw, ImageFont

    mask = Image.new("L", (UNIT, UNIT), 0)
    font = ImageFont.load_default(size=21)
    ImageDraw.Draw(mask).text(
        (UNIT / 2, UNIT / 2), char, fill=255, font=font, anchor="mm", stroke_width=0.5 if bold else 0
    )
    return mask
