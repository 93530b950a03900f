"""Receipts: synthetic till receipts modeled on the scanned Malaysian ones of SROIE, rendered from a seed.

`Receipts(seed).sample(i)` writes a receipt (receipts_text), prints it (receipts_print), degrades the print
(receipts_wear) and adds questions beyond its fields (receipts_asked). A page has its fields and the box of every letter
and line. Labels are upper case whatever is printed, as in the real set. Boxes as in `worlds.base`.

`Lookalikes` are receipts with rows that are easily taken for others (receipts_lookalikes), `A4Receipts` these on larger
sheets, as a flatbed scanner shows them (sheets).
"""

from __future__ import annotations

import random as randomness
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relook.io import rng
from relook.regions import union
from zoo.worlds import receipts_asked as asked
from zoo.worlds import receipts_lookalikes as alike
from zoo.worlds import receipts_print as printing
from zoo.worlds import receipts_text as text
from zoo.worlds import receipts_wear as wear
from zoo.worlds.base import QA, Area, Box, Glyph, Page
from zoo.worlds.receipts_text import Part
from zoo.worlds.sheets import on_sheet

if TYPE_CHECKING:
    import numpy as np

LONGEST = 1280  # pixels, as in the real set
MARGIN = 6  # pixels without print on every side


@dataclass(frozen=True)
class Line:
    """A printed text in upper case, its box, and the box of each letter (None for a space).

    Attributes:
        centres: (x, y) of each letter on the middle line of the text, so that commas and capitals share a height.
        part: its role in an item or the payment, see `receipts_text.Piece`.
    """

    text: str
    box: Box
    boxes: tuple[Box | None, ...]
    field: str | None = None
    centres: tuple[tuple[float, float] | None, ...] = ()
    part: Part | None = None


class Receipts:
    """The receipts dataset (see the module). `Receipts(1).sample(0)` is always the same page.

    Args:
        lookalikes: with the rows and questions of receipts_lookalikes; pages without are as they always were.
    """

    name = "receipts"
    charset = "".join(chr(c) for c in range(33, 127) if not "a" <= chr(c) <= "z")
    labels = tuple(text.QUESTIONS)  # without those of receipts_asked, whose answers have no area

    def __init__(self, seed: int, lookalikes: bool = False) -> None:
        self.seed, self.lookalikes = seed, lookalikes

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        known = tuple(question for questions in text.QUESTIONS.values() for question in questions)
        return (*known, *asked.phrases())

    def sample(self, index: int) -> Page:
        """One receipt; `meta["lines"]` holds its `Line`s from top to bottom."""
        source = randomness.Random(int(rng(self.seed, Receipts.name, index).integers(2**62)))
        script = alike.write(source) if self.lookalikes else text.write(source)
        sheet = _layout(script, source)
        ink, lines = _print(script, sheet)
        image, matrix = wear.wear(ink, source)
        lines = [_moved(line, matrix, image.size) for line in lines]
        areas = _areas(lines)
        qas = [
            QA(source.choice(text.QUESTIONS[name]), script.answers[name], (areas[name],), field=name)
            for name in text.QUESTIONS
            if name in areas and name in script.answers
        ]
        # a generator of its own, used last, so that pages and earlier questions stay the same
        spots = _parts(lines)
        qas += asked.ask(script, spots, rng(self.seed, "receipts-asked", index))
        if self.lookalikes:
            qas += alike.ask(script, spots, rng(self.seed, "receipts-lookalikes", index))
        glyphs = tuple(
            Glyph(char, box)
            for line in lines
            for char, box in zip(line.text, line.boxes, strict=True)
            if box is not None
        )
        marks = tuple(Area(name, box) for name, box in areas.items())
        return Page(image.convert("RGB"), tuple(qas), glyphs, marks, {"lines": tuple(lines)})


class Lookalikes(Receipts):
    """`Receipts(seed, lookalikes=True)` by a name that a recipe can give."""

    name = "receipts-lookalikes"

    def __init__(self, seed: int) -> None:
        super().__init__(seed, lookalikes=True)

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        return (*super().phrases(), *alike.phrases())


class A4Receipts(Lookalikes):
    """A receipt with look-alike rows in small print on an A4 sheet: of a crop, too, one has to look at a part."""

    name = "receipts-a4"

    def sample(self, index: int) -> Page:
        return on_sheet(super().sample(index), rng(self.seed, self.name, index), a4=True)


@dataclass(frozen=True)
class _Sheet:
    """Page size, left edge and width of the print, top of each row, and styles."""

    size: tuple[int, int]
    left: float
    width: float
    tops: tuple[float, ...]
    style: printing.Style
    bold: printing.Style


def _layout(script: text.Script, random: randomness.Random) -> _Sheet:
    """Choose the row pitch from the number of rows, so that a page fills the longest side as real ones do."""
    heights = [max((piece.size for piece in row), default=random.uniform(0.3, 1.0)) for row in script.rows]
    mono = random.random() < 0.72
    top, bottom = random.uniform(10, 200), random.uniform(10, 200)
    pitch = min((LONGEST - top - bottom) / sum(heights), random.uniform(22, 40))
    face = random.choice(printing.MONO if mono else printing.PROPORTIONAL)
    em = max(11, round(pitch * random.uniform(0.72, 0.98)))
    dots = random.choice((0, 0, 0, random.randint(14, 20))) if mono and em > 14 else 0
    style = printing.Style(face, em, 1.0, dots, 1 if random.random() < 0.2 else 0)
    unit = printing.width(style, "N0e1aT25-R") / 10
    columns = random.uniform(34, 46) if mono else random.uniform(38, 56)
    side = random.uniform(12, 130)
    widest = 905 - 2 * side
    stretch = min(random.uniform(0.72, 1.15), widest / (columns * unit))
    # quantized so that the glyph cache is hit from page to page
    stretch = max(0.6, round(stretch * 20) / 20)
    style = printing.Style(face, em, stretch, dots, style.strike)
    bold_face = {"mono": "mono-bold", "courier": "courier-bold", "sans": "sans-bold"}.get(face, face)
    bold = printing.Style(bold_face, em, stretch, dots, 1)
    width = min(columns * unit * stretch, widest)
    tops, y = [], top
    for height in heights:
        tops.append(y)
        y += height * pitch
    size = (max(330, round(width + 2 * side)), min(LONGEST, max(605, round(y + bottom))))
    left = (size[0] - width) / 2 + random.uniform(-0.5, 0.5) * min(side, 40)
    return _Sheet(size, left, width, tuple(tops), style, bold)


def _print(script: text.Script, sheet: _Sheet) -> tuple[np.ndarray, list[Line]]:
    import numpy as np

    ink = np.zeros((sheet.size[1], sheet.size[0]), np.uint8)
    lines = []
    for row, top in zip(script.rows, sheet.tops, strict=True):
        taken = MARGIN  # right end of the previous piece; pieces must not overlap
        for piece in row:
            placed = _print_piece(ink, piece, top, taken, sheet)
            if placed:
                lines.append(placed)
                taken = placed.box[2] + 4
    return ink, lines


def _print_piece(ink: np.ndarray, piece: text.Piece, top: float, taken: float, sheet: _Sheet) -> Line | None:
    """Print one piece, narrowed (never cut) where its row has too little space."""
    base = sheet.bold if piece.bold else sheet.style
    style = printing.Style(base.face, round(base.em * piece.size), base.stretch, base.dots, base.strike)
    content = piece.text
    end = min(sheet.left + sheet.width, sheet.size[0] - MARGIN)
    if len(content) == 60 and len(set(content)) == 1:  # a rule fills the width
        content = content[: max(2, int(sheet.width / printing.glyph(style, content[0])[3]))]
    edge = sheet.left + piece.at * sheet.width
    room = end - taken if piece.align != "l" else end - max(taken, edge)
    wide = printing.width(style, content)
    if wide > room and wide > 0:
        narrow = max(0.4, int(style.stretch * room / wide * 20) / 20)
        style = printing.Style(style.face, style.em, narrow, style.dots, style.strike)
        wide = printing.width(style, content)
    x = {"l": edge, "c": edge - wide / 2, "r": edge - wide}[piece.align]
    x = max(x, taken)
    printed = printing.print_line(ink, x, top, content, style)
    if printed is None or printed.text != content:  # a letter lies outside the sheet: drop its field
        return None if printed is None else Line(printed.text.upper(), printed.box, printed.boxes)
    return Line(content.upper(), printed.box, printed.boxes, piece.field, part=piece.part)


def _moved(line: Line, matrix: wear.Matrix, size: tuple[int, int]) -> Line:
    boxes = tuple(None if box is None else _moved_box(box, matrix, size) for box in line.boxes)
    middle = (line.box[1] + line.box[3]) / 2
    centres = tuple(None if b is None else wear.apply(matrix, (b[0] + b[2]) / 2, middle) for b in line.boxes)
    return Line(line.text, union([box for box in boxes if box]), boxes, line.field, centres, line.part)


def _moved_box(box: Box, matrix: wear.Matrix, size: tuple[int, int]) -> Box:
    """Bounds of the four transformed corners, clipped to the page, never empty."""
    corners = [wear.apply(matrix, x, y) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs, ys = [c[0] for c in corners], [c[1] for c in corners]
    x1, y1 = min(max(0, int(min(xs))), size[0] - 1), min(max(0, int(min(ys))), size[1] - 1)
    return x1, y1, max(x1 + 1, min(size[0], round(max(xs) + 0.5))), max(y1 + 1, min(size[1], round(max(ys) + 0.5)))


def _areas(lines: list[Line]) -> dict[str, Box]:
    """Map each field to the box of all its lines."""
    parts: dict[str, list[Box]] = {}
    for line in lines:
        if line.field:
            parts.setdefault(line.field, []).append(line.box)
    return {name: union(boxes) for name, boxes in parts.items()}


def _parts(lines: list[Line]) -> asked.Spots:
    """Map each part of items and payment that was printed whole to its boxes."""
    spots: asked.Spots = {}
    for line in lines:
        if line.part:
            spots.setdefault(line.part, []).append(line.box)
    return spots
