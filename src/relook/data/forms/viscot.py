"""Visual-CoT's records: a question, one box, an answer, in four turns.

    {"dataset": "gqa", "question_id": 7,
     "image": ["cot/gqa/2316539.jpg", "cot/gqa/2316539.jpg###[217, 343, 242, 393]"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat ...? Please provide the bounding box coordinate ..."},
                       {"from": "gpt", "value": "[0.542, 0.686, 0.592, 0.786]"},
                       {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "window"}]}

The box after `###` is x1, y1, x2, y2 in pixels of the image. The fractions of the second turn are *not* of the image:
they are of the square that holds it, with equal bands on both sides of its shorter axis. So the two boxes together say
how large the image was, which nothing else in the file does: above, 217/0.542 and 242/0.592 do not agree on a width,
but (217 + 54) / 0.542 = (242 + 54) / 0.592 = 343 / 0.686 = 500 do: 500 high, 500 - 2 * 54 = 392 wide.
Three decimals make that an interval, which `padded_size` returns with the size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from relook.data.items import Question
from relook.errors import UserError
from relook.regions import Box

ASKS_FOR_BOX = re.compile(
    r"\s*Please provide the bounding box coordinate of the region that can help you answer the question better\.\s*$"
)
_BOX = re.compile(r"(?P<path>.*)###\[(?P<box>[^\]]*)\]", re.DOTALL)
_HALF_DIGIT = 0.0005  # fractions are written with three decimals
LARGEST_SIDE = 1e5  # pixels; what a box at the very edge would otherwise leave open


def viscot_question(data: Mapping[str, Any], where: str) -> Question:
    """The question of one record, its size worked out from the box and its fractions (`Question.slack` says how well).

    Raises:
        UserError: not a record of this form; with `where`.
    """
    images, turns = data.get("image"), data.get("conversations")
    if not isinstance(images, list) or len(images) != 2 or not all(isinstance(ref, str) for ref in images):
        raise UserError(f"{where}: 'image' is {images!r}; expected [path, path###[x1, y1, x2, y2]]")
    match = _BOX.fullmatch(images[1])
    if match is None:
        raise UserError(f"{where}: {images[1]!r} names no box; expected path###[x1, y1, x2, y2]")
    if not isinstance(turns, list) or len(turns) != 4 or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: expected four turns under 'conversations' (question, box, <image>, answer)")
    asked, fractions, _, answer = (str(turn.get("value", "")) for turn in turns)
    pixels = _numbers(match["box"], where)
    box = (math.floor(pixels[0]), math.floor(pixels[1]), math.ceil(pixels[2]), math.ceil(pixels[3]))
    size, slack = padded_size(box, _numbers(fractions.strip().strip("[]"), where)) or (None, (0, 0))
    text = ASKS_FOR_BOX.sub("", asked.removeprefix("<image>").strip())
    if not text:
        raise UserError(f"{where}: the question is empty")
    name = data.get("dataset")
    return Question(images[0], text, (answer,), (box,), size, None if name is None else str(name), where, slack)


def padded_size(box: Box, fractions: Sequence[float]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size (width, height) of the image and how far each side may be off, both in pixels; None if nothing fits.

    `box` is in pixels of the image, `fractions` the same box in the image padded to a square on both sides of its
    shorter axis. A pixel of rounding is allowed on top of the decimals.

    >>> padded_size((217, 343, 242, 393), (0.542, 0.686, 0.592, 0.786))
    ((392, 500), (3, 2))
    """
    across = [(box[0], fractions[0]), (box[2], fractions[2])]
    down = [(box[1], fractions[1]), (box[3], fractions[3])]
    for tolerance in (1.0, 2.0, 4.0, 8.0):
        wide = _fits(across, down, tolerance)
        tall = [(side, other) for other, side in _fits(down, across, tolerance)]
        if fitting := wide + tall:
            widths, heights = zip(*fitting, strict=True)
            return _middle(widths, heights)
    return None


def _fits(long: list[tuple[int, float]], short: list[tuple[int, float]], tolerance: float) -> list[tuple[float, float]]:
    """Extreme (long side, short side) of an image whose long axis is not padded; edges as (pixel, fraction).

    With side S and a band p on each end of the short axis, an edge v at fraction f says |f S - p - v| <= S/2000 + t:
    half planes in (S, p). What they leave is a polygon, and its corners are the extremes of S and of S - 2 p.
    """
    telling = [(pixel, share) for pixel, share in long if share > _HALF_DIGIT]  # an edge at 0 says nothing of the side
    low = max([1.0, *((pixel - tolerance) / (share + _HALF_DIGIT) for pixel, share in telling)])
    high = min([LARGEST_SIDE, *((pixel + tolerance) / (share - _HALF_DIGIT) for pixel, share in telling)])
    if low > high:
        return []
    planes = [(1.0, 0.0, high), (-1.0, 0.0, -low), (0.0, -1.0, 0.0), (-1.0, 2.0, -1.0)]  # a S + b p <= c
    for pixel, share in short:
        planes.append((share - _HALF_DIGIT, -1.0, pixel + tolerance))
        planes.append((-share - _HALF_DIGIT, 1.0, tolerance - pixel))
    corners = []
    for (a, b, c), (d, e, f) in combinations(planes, 2):
        if det := a * e - b * d:
            side, band = (c * e - b * f) / det, (a * f - c * d) / det
            if all(x * side + y * band <= z + 1e-6 for x, y, z in planes):
                corners.append((side, side - 2 * band))
    return corners


def _middle(widths: Sequence[float], heights: Sequence[float]) -> tuple[tuple[int, int], tuple[int, int]]:
    width, height = (round((min(sides) + max(sides)) / 2) for sides in (widths, heights))
    off = (math.ceil((max(sides) - min(sides)) / 2) for sides in (widths, heights))
    return (width, height), (next(off), next(off))


def _numbers(text: str, where: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise UserError(f"{where}: {text!r} is not a box; expected four numbers x1, y1, x2, y2")
    return values
