"""Cards: a page of coloured boxes, each with a three-digit code; asked is the code of the box of one colour.

The smallest world in which a second look is needed: at 64 x 64 pixels the boxes and their colours can be seen, the
codes cannot. Everything sits on a 16-pixel grid, so that at half scale one digit fills one 8-pixel patch (the
setting in which a tiny model learns to read in minutes).

Knows how pages are drawn; not who looks at them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from relook.io import rng
from zoo.worlds.base import QA, Area, Box, Glyph, Page

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIDE = 512  # of the page, pixels
UNIT = 16  # the typographic grid, pixels
BOX = (5, 3)  # width, height of a coloured box in units: 80 x 48 pixels
DIGITS = 3  # per code; they stand in the middle row, in columns 1 to 3 of the box

COLOURS: dict[str, tuple[int, int, int]] = {
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
    """The world of cards; see the module. `Cards(1).sample(0)` is always the same page."""

    name = "cards"
    charset = "0123456789"
    labels = tuple(COLOURS)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        return tuple(question.format(colour) for question in QUESTIONS for colour in COLOURS)

    def sample(self, index: int) -> Page:
        """One page of 4 to 6 boxes, all of different colours, with one question for each box."""
        from PIL import ImageDraw

        random = rng(self.seed, self.name, index)
        image = _paper(random)
        draw = ImageDraw.Draw(image)
        colours = [str(c) for c in random.permutation(list(COLOURS))]
        qas, glyphs, areas = [], [], []
        for colour, box in zip(colours, _places(random, int(random.integers(4, 7))), strict=False):
            code = "".join(str(d) for d in random.integers(0, 10, DIGITS))
            _draw_box(draw, box, _shade(random, COLOURS[colour]))
            glyphs += _draw_code(image, random, box, code, COLOURS[colour])
            areas.append(Area(colour, box))
            question = str(random.choice(QUESTIONS)).format(colour)
            qas.append(QA(question, code, (box,), field=colour))
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
    """Boxes on the unit grid, one unit inside the page, at least one unit apart (rejection sampling).

    Their left edges stand on odd columns, so that the first two digits of a code share a merged token at half scale
    and the third has one to itself: one layout of digits to learn and not two.
    """
    units = SIDE // UNIT
    taken: list[tuple[int, int]] = []
    while len(taken) < count:
        x, y = 1 + 2 * int(random.integers((units - BOX[0]) // 2)), int(random.integers(1, units - BOX[1]))
        if all(abs(x - a) > BOX[0] or abs(y - b) > BOX[1] for a, b in taken):
            taken.append((x, y))
    return [(x * UNIT, y * UNIT, (x + BOX[0]) * UNIT, (y + BOX[1]) * UNIT) for x, y in taken]


def _shade(random: np.random.Generator, colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """The colour as printed today: each channel off by at most 12."""
    r, g, b = (int(min(255, max(0, v + d))) for v, d in zip(colour, random.integers(-12, 13, 3), strict=True))
    return r, g, b


def _draw_box(draw, box: Box, fill: tuple[int, int, int]) -> None:
    """A card: a soft shadow, the colour, a darker rim. Stays inside `box` but for the shadow's 3 pixels."""
    x1, y1, x2, y2 = box
    draw.rounded_rectangle((x1 + 3, y1 + 3, x2 + 1, y2 + 1), radius=7, fill=(198, 198, 198))
    rim = tuple(v * 3 // 4 for v in fill)
    draw.rounded_rectangle((x1, y1, x2 - 2, y2 - 2), radius=7, fill=fill, outline=rim, width=2)


def _draw_code(
    image: Image.Image, random: np.random.Generator, box: Box, code: str, colour: tuple[int, int, int]
) -> list[Glyph]:
    """Print the code in the middle row of the box, one digit per unit, each off its place by at most one pixel."""
    dark = sum(colour) < 330
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
    """A digit's coverage (mode L, UNIT x UNIT), centred, in the face that Pillow carries."""
    from PIL import Image, ImageDraw, ImageFont

    mask = Image.new("L", (UNIT, UNIT), 0)
    font = ImageFont.load_default(size=21)
    ImageDraw.Draw(mask).text(
        (UNIT / 2, UNIT / 2), char, fill=255, font=font, anchor="mm", stroke_width=0.5 if bold else 0
    )
    return mask
