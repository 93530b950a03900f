"""Pieces of pages and scans to read from: what is shown of a sheet, at which size, and what is printed there.

Which pieces there are is the table `PIECES`. Frames: boxes are (x1, y1, x2, y2) in pixels of the sheet, x2 and y2
exclusive; a grid is (rows, columns) of merged tokens over a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.scans import Scan
from zoo.worlds import Box, Page
from zoo.worlds.receipts_text import MAIN

SLOTS = 3  # columns per token in which a letter can lie
LONGEST = 480  # pixels of a piece's longest side as seen; larger ones are shown smaller


@dataclass
class Sheet:
    """A page or a scan, as this objective knows it: grey pixels, what is printed where, which field lies where.

    lines: (box, text in upper case); letters: the world's own lines with the place of each letter, None for a scan.
    fields: field -> boxes; known: the fields that are marked wherever they occur.
    """

    image: Image.Image
    lines: Sequence[tuple[Box, str]]
    letters: Sequence[Any] | None
    fields: Mapping[str, Sequence[Box]]
    known: tuple[str, ...]

    @classmethod
    def of_page(cls, page: Page, known: tuple[str, ...]) -> Sheet:
        printed: Any = page.meta["lines"]
        boxes = {area.label: (area.box,) for area in page.areas}
        return cls(page.image.convert("L"), [(line.box, line.text) for line in printed], printed, boxes, known)

    @classmethod
    def of_scan(cls, scan: Scan) -> Sheet:
        return cls(scan.image, scan.lines, None, {qa.field: qa.boxes for qa in scan.qas}, MAIN)


# What a piece shows of a sheet: the window in the sheet's pixels and the size (width, height) at which it is seen.
Piece = tuple[Box, tuple[float, float]]


def strip(sheet: Sheet, options: Any, random: np.random.Generator) -> Piece:
    """A line with little around it."""
    box, _ = some_line(sheet, options.digits, random)
    left, above, right, below = random.integers((0, 1, 0, 1), (12, 10, 12, 10))
    window = clamp((box[0] - left, box[1] - above, box[2] + right, box[3] + below), sheet.image.size)
    return window, seen_at(window, float(random.uniform(*options.scale)))


def window(sheet: Sheet, options: Any, random: np.random.Generator, shrink: float = 1.0) -> Piece:
    """A piece of about `options.size` around a line, with all that is printed near it."""
    scale = shrink * float(random.uniform(*options.scale))
    width, height = options.size
    box, _ = some_line(sheet, options.digits, random)
    x1 = (box[0] + box[2]) / 2 + random.uniform(-0.9, 0.5) * width / scale
    y1 = (box[1] + box[3]) / 2 - random.uniform(0.2, 0.8) * height / scale
    inside = clamp((x1, y1, x1 + width / scale, y1 + height / scale), sheet.image.size)
    return inside, seen_at(inside, scale)


def small(sheet: Sheet, options: Any, random: np.random.Generator) -> Piece:
    """A window at half scale, as a whole page is re-encoded."""
    return window(sheet, options, random, shrink=0.5)


def crop(sheet: Sheet, options: Any, random: np.random.Generator) -> Piece:
    """What a region look might show: the rows of a field and some more; without fields, a window."""
    if not sheet.fields:
        return window(sheet, options, random)
    boxes = sheet.fields[list(sheet.fields)[int(random.integers(len(sheet.fields)))]]
    box = beside(boxes, [line for line, _ in sheet.lines])
    left, above, right, below = random.integers((5, 15, 5, 15), (60, 120, 60, 120))
    inside = clamp((box[0] - left, box[1] - above, box[2] + right, box[3] + below), sheet.image.size)
    return inside, seen_at(inside, float(random.uniform(0.9, 1.1)))


PIECES: dict[str, Callable[[Sheet, Any, np.random.Generator], Piece]] = {
    "strip": strip,
    "window": window,
    "small": small,
    "crop": crop,
}
WITH_FIELDS = ("crop", "first")  # pieces that show enough to tell a field ("first": the page as it is first seen)


def some_line(sheet: Sheet, digits: float, random: np.random.Generator) -> tuple[Box, str]:
    """A line with at least two letters and some size; with probability `digits` one that is mostly digits."""
    wanted = random.random() < digits
    line = sheet.lines[0]
    for _ in range(40):
        line = sheet.lines[int(random.integers(len(sheet.lines)))]
        (x1, y1, x2, y2), text = line
        letters = text.replace(" ", "")
        sized = x2 - x1 > 12 and y2 - y1 > 6 and len(set(letters)) >= 2
        if sized and (not wanted or sum(c.isdigit() for c in letters) >= max(2, len(letters) / 2)):
            break
    return line


def beside(boxes: Sequence[Box], lines: Sequence[Box]) -> Box:
    """The boxes of an answer together with what is printed in the same rows: "TOTAL" goes with its amount.

    A line belongs to a row if half of its height, or of the box's, is shared.

    >>> beside([(300, 50, 360, 70)], [(20, 48, 90, 68), (20, 80, 90, 100)])
    (20, 48, 360, 70)
    """
    kept = list(boxes)
    for box in boxes:
        for line in lines:
            shared = min(box[3], line[3]) - max(box[1], line[1])
            if 2 * shared > min(box[3] - box[1], line[3] - line[1]):
                kept.append(line)
    return min(b[0] for b in kept), min(b[1] for b in kept), max(b[2] for b in kept), max(b[3] for b in kept)


def seen_at(box: Box, scale: float) -> tuple[float, float]:
    """The size (width, height) of a window at a scale, no side over LONGEST pixels."""
    scale = min(scale, LONGEST / max(box[2] - box[0], box[3] - box[1]))
    return (box[2] - box[0]) * scale, (box[3] - box[1]) * scale


def letters_in_slots(lines: Sequence[Any], box: Box, grid: tuple[int, int], classes: dict[str, int]) -> np.ndarray:
    """(rows, columns * SLOTS) of a grid over `box`: the class of the letter whose centre lies in the slot, else 0."""
    found = np.zeros((grid[0], grid[1] * SLOTS), np.int64)
    across, down = grid[1] * SLOTS / (box[2] - box[0]), grid[0] / (box[3] - box[1])
    for line in lines:
        if line.box[3] <= box[1] or line.box[1] >= box[3] or line.box[2] <= box[0] or line.box[0] >= box[2]:
            continue
        for char, centre in zip(line.text, line.centres, strict=True):
            if centre is not None and box[0] <= centre[0] < box[2] and box[1] <= centre[1] < box[3]:
                row, slot = int((centre[1] - box[1]) * down), int((centre[0] - box[0]) * across)
                found[min(row, grid[0] - 1), min(slot, found.shape[1] - 1)] = classes.get(char, 0)
    return found


def lines_in(
    lines: Sequence[tuple[Box, str]], box: Box, grid: tuple[int, int], classes: dict[str, int]
) -> list[tuple[slice, slice, Tensor]]:
    """Rows and slots of a grid over `box` on which each line wholly inside it lies, and its letters' classes."""
    found = []
    high, wide = (box[3] - box[1]) / grid[0], (box[2] - box[0]) / (grid[1] * SLOTS)
    for (x1, y1, x2, y2), text in lines:
        letters = [classes[c] for c in text if c in classes]
        if not letters or x1 < box[0] - 2 or y1 < box[1] - 2 or x2 > box[2] + 2 or y2 > box[3] + 2:
            continue
        edge = 0.22 * (y2 - y1)
        middles = [box[1] + (r + 0.5) * high for r in range(grid[0])]
        rows = [r for r, y in enumerate(middles) if y1 + edge <= y <= y2 - edge]
        rows = rows or [max(0, min(grid[0] - 1, int(((y1 + y2) / 2 - box[1]) / high)))]
        left = max(0, int((x1 - box[0]) / wide) - SLOTS)
        right = min(grid[1] * SLOTS, int((x2 - box[0]) / wide) + 1 + SLOTS)
        found.append((slice(rows[0], rows[-1] + 1), slice(left, right), torch.tensor(letters)))
    return found


def letters_under(lines: Sequence[Any], box: Box, grid: tuple[int, int], classes: dict[str, int]) -> np.ndarray:
    """(rows, columns) of a grid over `box`: the class of the letter that the cell's centre lies on, 0 for none.

    A letter is as high as its line and as wide as its ink.
    """
    found = np.zeros(grid, np.int64)
    across, down = grid[1] / (box[2] - box[0]), grid[0] / (box[3] - box[1])
    for line in lines:
        if line.box[3] <= box[1] or line.box[1] >= box[3] or line.box[2] <= box[0] or line.box[0] >= box[2]:
            continue
        high = max((b[3] - b[1] for b in line.boxes if b), default=0) / 2
        for char, ink, centre in zip(line.text, line.boxes, line.centres, strict=True):
            if ink is not None:
                x1, x2 = ((x - box[0]) * across - 0.5 for x in (ink[0], ink[2]))
                y1, y2 = ((centre[1] + dy - box[1]) * down - 0.5 for dy in (-high, high))
                rows = slice(max(0, int(np.ceil(y1))), max(0, int(np.floor(y2)) + 1))
                found[rows, max(0, int(np.ceil(x1))) : max(0, int(np.floor(x2)) + 1)] = classes.get(char, 0)
    return found


def clamp(box: tuple[Any, Any, Any, Any], size: tuple[int, int]) -> Box:
    """A box moved or cut into an image, at least 8 pixels wide and high."""
    x1, y1 = max(0, min(int(box[0]), size[0] - 8)), max(0, min(int(box[1]), size[1] - 8))
    return x1, y1, max(x1 + 8, min(int(box[2]), size[0])), max(y1 + 8, min(int(box[3]), size[1]))


def cut(size: tuple[int, int], random: np.random.Generator) -> Box:
    """A frame that takes up to 6 % from each side of a page, three times in four."""
    w, h = size
    off = [int(v) for v in random.uniform(0, 0.06, 4) * (w, h, w, h) * (random.random() < 0.7)]
    return clamp((off[0], off[1], w - off[2], h - off[3]), size)


def shade(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Another exposure of a piece of a scan: contrast, brightness, a little noise. Mode "L"."""
    if random.random() < 0.4:
        return image
    values = np.asarray(image, np.float32)
    values = (values - 128) * random.uniform(0.6, 1.3) + 128 + random.uniform(-25, 25)
    values += random.standard_normal(values.shape) * random.uniform(0, 6)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
