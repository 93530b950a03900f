"""Boxes as models and annotation tools write them: units, orders, and conversions to pixels and back.

One table, `BOX_FORMS`, holds the units; `ORDERS` says which number is which. `read_box` and `write_box` go from a
dialect ("0-1000 xywh": units and order) to x1, y1, x2, y2 in pixels of the upright image, and back. Pure arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from relook.errors import UserError
from relook.regions import GRID, Box, box_to_cells, cells_to_box, check_cells

Numbers: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True)
class BoxForm:
    """A unit in which models and tools write the numbers of a box.

    side   what the image's whole width, and its whole height, count as; None: pixels
    by     who writes so: corners (x1, y1, x2, y2), and after the name of an order, those that have another
    said   regular expression that finds this unit in a tool's description
    """

    side: int | None
    by: str
    said: str = ""


BOX_FORMS = {  # units; in the order in which a description is read
    "0-1000": BoxForm(1000, "Qwen-VL, Qwen2-VL, Qwen3-VL, InternVL, GLM-V, LayoutLM; yxyx: Gemini", r"1,?000|relative"),
    "0-1": BoxForm(
        1,
        "Shikra; xywh: Amazon Textract; cxcywh: YOLO",
        r"\b0(\.0)?\s*(-|–|to|and|,|\.\.)\s*1(\.0)?\b|normali[sz]ed",
    ),
    "pixels": BoxForm(None, "of the upright original: Pascal VOC, LabelMe, CVAT; xywh: COCO, VIA, Visual Genome"),
    "resized": BoxForm(None, "of the view that a model's processor makes of the image: Qwen2.5-VL, DeepEyes"),
    "stored": BoxForm(None, "of the file as stored, before EXIF turns it: labelImg, and others that read no EXIF"),
    "0-999": BoxForm(999, "DeepSeek-VL2, DeepSeek-OCR, CogVLM"),
    "percent": BoxForm(100, "xywh: Label Studio"),
    "cells": BoxForm(None, "of a grid, both ends included: relook's region calls, Kosmos-2 (32 cells a side)"),
}

ORDERS: dict[str, tuple[Callable[..., Numbers], Callable[..., Numbers]]] = {  # to corners x1, y1, x2, y2, and from them
    "xyxy": (lambda *corners: corners, lambda *corners: corners),
    "xywh": (lambda x, y, w, h: (x, y, x + w, y + h), lambda x1, y1, x2, y2: (x1, y1, x2 - x1, y2 - y1)),
    "cxcywh": (
        lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
        lambda x1, y1, x2, y2: ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1),
    ),
    "yxyx": (lambda y1, x1, y2, x2: (x1, y1, x2, y2), lambda x1, y1, x2, y2: (y1, x1, y2, x2)),
}


def parse_units(text: str) -> tuple[str, str]:
    """Units and order of a dialect in words: `parse_units("0-1000 xywh")` is ("0-1000", "xywh").

    What is not said is pixels, and x1, y1, x2, y2. Raises UserError for words that are neither.
    """
    words = text.replace(",", " ").split()
    units, orders = [word for word in words if word in BOX_FORMS], [word for word in words if word in ORDERS]
    if len(units) > 1 or len(orders) > 1 or len(units) + len(orders) != len(words) or not words:
        raise UserError(
            f"units {text!r}: expected one of {', '.join(BOX_FORMS)}, and one of {', '.join(ORDERS)} where boxes are "
            'not x1, y1, x2, y2, such as "0-1000 xywh"'
        )
    return units[0] if units else "pixels", orders[0] if orders else "xyxy"


def write_box(
    box: Box,
    size: tuple[int, int],
    units: str = "pixels",
    order: str = "xyxy",
    *,
    whole: bool = False,
    view: tuple[int, int] | None = None,
    turn: int = 1,
    grid: int = GRID,
) -> list[float]:
    """The numbers of a pixel box in the units of a row of `BOX_FORMS`, in an order of `ORDERS`.

    Where division leaves less than the pixel, the seventh digit is raised: whoever rounds or truncates what he computes
    from the numbers has the same pixels again.

    Args:
        box, size: in pixels of the upright image.
        whole: corners as whole numbers, grown outwards.
        view: (width, height) of the view, where the units are "resized".
        turn: the EXIF orientation of the file, where they are "stored".
        grid: cells per side, where they are "cells".

    >>> write_box((80, 100, 320, 250), (640, 400), "0-1000")
    [125, 250, 500, 625]
    >>> write_box((80, 100, 320, 250), (640, 400), "percent", "xywh")
    [12.5, 25, 37.5, 37.5]
    """
    arrange = ORDERS[order][1]
    if units == "cells":
        x0, y0, x1, y1 = box_to_cells(box, size, grid)
        end = 0 if order in ("xyxy", "yxyx") else 1
        return [*arrange(x0, y0, x1 + end, y1 + end)]
    if units == "stored":
        return [*arrange(*turned_box(box, size, turn, back=True))]
    sides = _sides(units, size, view)
    if sides == size:
        return [*arrange(*box)]
    exact = [Fraction(v * s, n) for v, s, n in zip(box, sides * 2, size * 2, strict=True)]
    if whole:
        return [*arrange(*(math.floor(v) if i < 2 else math.ceil(v) for i, v in enumerate(exact)))]
    axes, found = (1, 0, 1, 0) if order == "yxyx" else (0, 1, 0, 1), [*arrange(*exact)]
    return [_decimal(Fraction(v), sides[i], size[i]) for v, i in zip(found, axes, strict=True)]


def _decimal(units: Fraction, side: int, length: int) -> float:
    """Units, `side` of which are `length` pixels, as a number of seven digits at most."""
    fine = 10 ** max(7 - len(str(side)), 0)
    exact = int(units) if units.denominator == 1 else float(units)
    if (units * fine).denominator == 1 and int(exact / side * length) == units * length // side:
        return exact
    return (math.floor(units * fine) + 1) / fine


def read_box(
    values: Sequence[float],
    size: tuple[int, int],
    units: str = "pixels",
    order: str = "xyxy",
    *,
    view: tuple[int, int] | None = None,
    turn: int = 1,
    grid: int = GRID,
) -> Numbers:
    """The inverse of `write_box`: x1, y1, x2, y2 in pixels of the upright image, whole where the rounding allows it.

    >>> read_box((125, 250, 500, 625), (640, 400), "0-1000")
    (80.0, 100.0, 320.0, 250.0)
    >>> read_box((12.5, 25, 37.5, 37.5), (640, 400), "percent", "xywh")
    (80.0, 100.0, 320.0, 250.0)
    """
    if len(values) != 4:
        raise UserError(f"box {tuple(values)} is not four numbers: expected {order}")
    x1, y1, x2, y2 = ORDERS[order][0](*values)
    if units == "cells":
        end = 0 if order in ("xyxy", "yxyx") else 1
        return cells_to_box(check_cells((x1, y1, x2 - end, y2 - end), grid), size, grid)
    if units == "stored":
        x1, y1, x2, y2 = turned_box((x1, y1, x2, y2), size, turn)
    sides = _sides(units, size, view)
    found = [float(value) for value in (x1, y1, x2, y2)]
    for i, value in enumerate(found if sides != size else ()):
        length = size[i % 2]
        pixel = value * length / sides[i % 2]
        found[i] = float(round(pixel)) if abs(pixel - round(pixel)) <= 4e-6 * length else pixel
    return found[0], found[1], found[2], found[3]


def _sides(units: str, size: tuple[int, int], view: tuple[int, int] | None) -> tuple[int, int]:
    """What the whole width and the whole height count as."""
    side = BOX_FORMS[units].side
    if units == "resized" and view is None:
        raise UserError(
            "the size of the resized view is not known; state resized_width and resized_height, or --for MODEL"
        )
    return (side, side) if side is not None else view if units == "resized" and view is not None else size


def turned_box(box: Numbers, size: tuple[int, int], turn: int, back: bool = False) -> Numbers:
    """A box of the stored image in the upright one, of `size`, that EXIF orientation `turn` (1..8) makes of it.

    `back`: the other way round.

    >>> turned_box((0, 0, 10, 20), (400, 640), 6)  # the top left of a file that is turned a quarter clockwise
    (380, 0, 400, 10)
    """
    (x1, y1, x2, y2), (width, height) = box, size
    if turn >= 5 and not back:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if turn in (2, 3, 6, 7):
        x1, x2 = width - x2, width - x1
    if turn in (3, 4, 7, 8):
        y1, y2 = height - y2, height - y1
    return (y1, x1, y2, x2) if turn >= 5 and back else (x1, y1, x2, y2)
