"""Notes: delivery notes of six suppliers, a document set as somebody might own one. A look is needed to read them.

A note has the supplier's heading, eight fields in a block, and a table of goods; each supplier has its own form (a row
of `FORMS`: paper, order of the fields, frames or rows, block above or below the goods, wording of the labels). Within a
form, the block moves with the lines above it. `Notes(1).sample(0)` is always the same page; pages take the first five
forms in turn, and `Notes(1, forms=FORMS[5:])` draws the sixth alone. Boxes as in `worlds.base`: the printed value of a
field, without its label.
"""

from __future__ import annotations

import math
import random as randomness
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from relook.io import rng
from zoo.worlds import receipts_print as printing
from zoo.worlds.base import QA, Area, Box, Glyph, Page

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Random = randomness.Random
DRIVERS = (
    *("A. MORGAN", "B. KELLER", "C. SANTOS", "D. NOVAK", "E. LARSEN", "F. BIANCHI", "G. DUBOIS", "H. WAGNER"),
    *("I. PETROV", "J. TANAKA", "K. OLSEN", "L. MARTIN", "M. KOWAL", "N. FISCHER", "O. REYES", "P. JANSEN"),
    *("R. MEYER", "S. COSTA", "T. WEBER", "V. HORVAT"),
)
GOODS = (
    *("BOLTS", "CABLE", "CEMENT", "FILTER", "GRAVEL", "HINGES", "LAMPS", "NAILS"),
    *("PAINT", "PIPES", "PUMPS", "SCREWS", "TILES", "TIMBER", "VALVES", "WIRE"),
)
STREETS = ("DOCK ROAD", "MILL LANE", "NORTH QUAY", "OLD YARD", "STATION WAY", "TOWER HILL")


@dataclass(frozen=True)
class Field:
    """How a field is filled in, asked for, and called by the suppliers (a form chooses one of the two labels)."""

    value: Callable[[Random], str]
    questions: tuple[str, str]
    labels: tuple[str, str]


FIELDS: dict[str, Field] = {
    "number": Field(
        lambda r: f"{r.randint(10000, 99999)}-{r.randint(0, 9)}",
        ("What is the delivery note number?", "Which number does this delivery note have?"),
        ("DELIVERY NOTE NO", "NOTE NUMBER"),
    ),
    "date": Field(
        lambda r: f"{r.randint(1, 28):02}/{r.randint(1, 12):02}/{r.randint(2016, 2019)}",
        ("What is the date of delivery?", "When was it delivered?"),
        ("DATE", "DELIVERED ON"),
    ),
    "order": Field(
        lambda r: f"PO {r.randint(10000, 99999)}",
        ("What is the order number?", "Which order does it belong to?"),
        ("YOUR ORDER", "ORDER NO"),
    ),
    "driver": Field(
        lambda r: r.choice(DRIVERS), ("Who is the driver?", "What is the name of the driver?"), ("DRIVER", "DRIVEN BY")
    ),
    "truck": Field(
        lambda r: f"{r.choice('BCDFGKLMST')}{r.choice('ADEHKNRS')} {r.randint(100, 9999)}",
        ("What is the plate of the truck?", "Which truck brought it?"),
        ("TRUCK", "PLATE NO"),
    ),
    "pallets": Field(
        lambda r: f"{r.randint(10, 99)}",
        ("How many pallets were delivered?", "What is the number of pallets?"),
        ("PALLETS", "NO OF PALLETS"),
    ),
    "weight": Field(
        lambda r: f"{r.randint(1, 24)},{r.randint(0, 999):03} KG",
        ("How much does the load weigh?", "What is the weight?"),
        ("WEIGHT", "GROSS WEIGHT"),
    ),
    "amount": Field(
        lambda r: f"{r.randint(1, 9)},{r.randint(0, 999):03}.{r.randint(0, 99):02}",
        ("What is the amount due?", "How much is to be paid?"),
        ("AMOUNT DUE", "TO PAY"),
    ),
}


@dataclass(frozen=True)
class Form:
    """A supplier's paper.

    Attributes:
        size: (width, height) in pixels, give or take 6 %.
        order: the fields by their first letters (p: pallets), row by row in `columns` columns.
        style: "frames" (label above the value, in a frame), "stacked" (without), "rows" (label left of the value).
        goods_first: whether the table of goods stands above the fields, which then move with its length.
        label: which of a field's two labels it uses.
    """

    supplier: str
    size: tuple[int, int]
    face: str
    order: str
    columns: int
    style: str
    goods_first: bool
    label: int


FORMS = (
    Form("NORDWIND FREIGHT", (760, 1080), "mono", "n d o D t p w a", 2, "frames", False, 0),
    Form("HARBOR & SONS", (800, 1120), "courier-bold", "d n t D a w p o", 1, "rows", True, 1),
    Form("KESTREL LOGISTICS", (1120, 800), "sans", "t w p a n d o D", 3, "frames", False, 1),
    Form("MILLER SUPPLIES", (720, 1020), "slab-mono", "a o d w D n p t", 2, "stacked", False, 0),
    Form("ATLAS HAULAGE", (1100, 780), "terminal", "o p a t D d n w", 2, "rows", True, 0),
    Form("QUARRY LINE", (780, 1060), "mono-bold", "w t n a p o D d", 2, "frames", True, 0),  # never taught
)
TAUGHT, HELD_OUT = FORMS[:5], FORMS[5:]
_INITIALS = {"D": "driver", **{name[0]: name for name in FIELDS if name != "driver"}}


class Notes:
    """The delivery notes (see the module)."""

    name = "notes"
    charset = "".join(chr(c) for c in range(33, 127) if not "a" <= chr(c) <= "z")
    labels = tuple(FIELDS)

    def __init__(self, seed: int, forms: Sequence[Form] = TAUGHT) -> None:
        self.seed, self.forms = seed, forms

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        return tuple(question for field in FIELDS.values() for question in field.questions)

    def sample(self, index: int) -> Page:
        """One note: a question about each field, in one of its two wordings."""
        form = self.forms[index % len(self.forms)]
        random = Random(int(rng(self.seed, self.name, form.supplier, index).integers(2**62)))
        sheet = _Sheet(form, random)
        values = {name: field.value(random) for name, field in FIELDS.items()}
        _write(sheet, form, values, random)
        image, turned = _scan(sheet.ink, random)
        boxes = {name: turned(box) for name, box in sheet.boxes.items()}
        qas = tuple(QA(random.choice(FIELDS[n].questions), values[n], (boxes[n],), n) for n in FIELDS)
        areas = tuple(Area(name, box) for name, box in boxes.items())
        return Page(image, qas, tuple(Glyph(char, turned(box)) for char, box in sheet.glyphs), areas)


class _Sheet:
    """The ink of a page as it is written, and where values and letters stand."""

    def __init__(self, form: Form, random: Random) -> None:
        import numpy as np

        scale = random.uniform(0.94, 1.06)
        self.width, self.height = (round(side * scale) for side in form.size)
        self.ink: np.ndarray = np.zeros((self.height, self.width), np.uint8)
        self.text = printing.Style(form.face, random.randint(20, 23), 1.0)
        self.small = printing.Style(form.face, 17, 0.95)
        self.large = printing.Style(form.face, 34, 1.0, 0, 1)
        self.boxes: dict[str, Box] = {}
        self.glyphs: list[tuple[str, Box]] = []

    def write(self, x: float, y: float, text: str, style: printing.Style, field: str = "") -> None:
        """Print a text with its upper left corner at x, y; with `field`, as its value."""
        line = printing.print_line(self.ink, x, y, text, style)
        if line is None or line.text != text:
            raise ValueError(f"{text!r} does not fit the sheet at {x}, {y}")
        self.glyphs += [(char, box) for char, box in zip(line.text, line.boxes, strict=True) if box is not None]
        if field:
            self.boxes[field] = line.box

    def rule(self, x1: float, y1: float, x2: float, y2: float, thick: int = 2) -> None:
        self.ink[round(y1) : round(y2) + thick, round(x1) : round(x2) + thick] = 255


def _write(sheet: _Sheet, form: Form, values: dict[str, str], random: Random) -> None:
    """Heading, fields and goods, from top to bottom."""
    left, y = random.uniform(36, 60), random.uniform(26, 60)
    sheet.write(left, y, form.supplier, sheet.large)
    y += 44
    for _ in range(random.randint(1, 3)):
        sheet.write(left, y, f"{random.randint(1, 99)} {random.choice(STREETS)}", sheet.small)
        y += 22
    parts = [_goods, _fields] if form.goods_first else [_fields, _goods]
    for part in parts:
        y = part(sheet, form, values, random, left, y + random.uniform(14, 34))


def _fields(sheet: _Sheet, form: Form, values: dict[str, str], random: Random, left: float, top: float) -> float:
    names = [_INITIALS[letter] for letter in form.order.split()]
    rows, across = math.ceil(len(names) / form.columns), (sheet.width - 2 * left) / form.columns
    down = 78.0 if form.style == "rows" and form.columns == 1 else 104.0
    down = min(down, (sheet.height - top - 20) / rows)
    for place, name in enumerate(names):
        x, y = left + place % form.columns * across, top + place // form.columns * down
        label = FIELDS[name].labels[form.label]
        if form.style == "rows":
            sheet.write(x, y + 8, label, sheet.small)
            sheet.write(x + 0.5 * across, y + 4, values[name], sheet.text, name)
            sheet.rule(x, y + down - 22, x + 0.92 * across, y + down - 22)
            continue
        if form.style == "frames":
            for x1, y1, x2, y2 in ((0, 0, 1, 0), (0, 1, 1, 1), (0, 0, 0, 1), (1, 0, 1, 1)):
                sheet.rule(x + x1 * across, y + y1 * down, x + x2 * across, y + y2 * down)
        sheet.write(x + 12, y + 10, label, sheet.small)
        sheet.write(x + 24, y + 46, values[name], sheet.text, name)
    return top + rows * down


def _goods(sheet: _Sheet, form: Form, values: dict[str, str], random: Random, left: float, top: float) -> float:
    """A table of some goods: numbers that nobody asks for."""
    room = sheet.height - top - 24 - (8 / form.columns * 100 if form.goods_first else 0)
    for row in range(min(random.randint(2, 7), max(1, int(room // 30)))):
        y = top + 30 * row
        if y + 30 > sheet.height:
            return y
        sheet.write(left, y, f"{random.randint(1, 400):3}", sheet.small)
        sheet.write(left + 70, y, f"{random.choice(GOODS)} {random.randint(2, 40)}MM", sheet.small)
        sheet.write(sheet.width - left - 110, y, f"{random.randint(1, 99)}.{random.randint(0, 99):02}", sheet.small)
        sheet.rule(left, y + 25, sheet.width - left, y + 25, 1)
    return y + 30


def _scan(ink: np.ndarray, random: Random) -> tuple[Image.Image, Callable[[Box], Box]]:
    """The page as a flatbed gives it (turned by a degree or less, grey, some noise), and how its boxes move."""
    import numpy as np
    from PIL import Image

    angle = math.radians(max(-1.0, min(1.0, random.gauss(0, 0.4))))
    cosine, sine = math.cos(angle), math.sin(angle)
    height, width = ink.shape
    cx, cy = width / 2, height / 2
    back = (cosine, sine, cx - cosine * cx - sine * cy, -sine, cosine, cy + sine * cx - cosine * cy)
    plane = Image.fromarray(ink).transform((width, height), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    paper, black = random.uniform(225, 255), random.uniform(0, 60)
    page = paper - np.asarray(plane, np.float32) * (paper - black) / 255
    page += np.random.default_rng(random.getrandbits(60)).standard_normal(page.shape) * random.uniform(0, 6)

    def turned(box: Box) -> Box:
        corners = [(x - cx, y - cy) for x in (box[0], box[2]) for y in (box[1], box[3])]
        xs, ys = [cosine * x - sine * y + cx for x, y in corners], [sine * x + cosine * y + cy for x, y in corners]
        x1, y1 = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
        return x1, y1, min(width, math.ceil(max(xs))), min(height, math.ceil(max(ys)))

    return Image.fromarray(np.clip(page, 0, 255).astype(np.uint8)).convert("RGB"), turned
