"""What objectives on synthetic pages share: which page an example shows, and where on it the truth lies.

Frames: boxes (x1, y1, x2, y2) in pixels of the page, x2 and y2 exclusive; grids (rows, columns) of patches.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from relook.data.items import Question, from_page
from relook.errors import UserError
from relook.io import rng
from relook.train.objective import Examples, Objective, Setup
from relook.train.recipe import Stage
from zoo.worlds import Box, Page


class PageObjective(Objective):
    """An objective whose examples are drawn on pages of a synthetic dataset."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.train, self.eval = Examples(self.example), Examples(self.held_out, setup.validation.examples)

    @classmethod
    def check(cls, stage: Stage, from_items: bool) -> Any:
        if from_items:
            raise UserError(f"Stage {stage.name!r} ({stage.objective}) needs a synthetic dataset; set data.world.")
        return super().check(stage, from_items)

    @abstractmethod
    def example(self, index: int) -> Any:
        """One training example, a function of the seed, the stage and `index` only."""

    def page(self, index: int) -> Page:
        """Page `index` of the world. Indices of one stage are never those of another (each has its own 2**24)."""
        return self.source.sample(page_offset(self.stage.name) + index)

    def held_out(self, index: int) -> Any:
        """Example `index` for validation: drawn as the others are, from pages that no training gets to."""
        return self.example(first_held_out(self.stage) + index)

    def questions(self) -> Iterator[Question]:
        """One question about each of the pages that are held out."""
        first = page_offset(self.stage.name) + first_held_out(self.stage)
        for number in range(self.setup.validation.questions):
            page = self.source.sample(first + number)
            chosen = int(rng(self.seed, "validation", number).integers(len(page.qas)))
            yield from_page(page, chosen, f"held out page {number}")


def first_held_out(stage: Stage) -> int:
    """Number of a stage's first example for validation: half way through its pages, at the start of a batch."""
    return -(-(1 << 23) // stage.batch) * stage.batch


def page_offset(stage_name: str) -> int:
    """First page index of a stage: its own block of 2**24 pages, above the low block kept for evaluation."""
    return (1 + zlib.crc32(stage_name.encode()) % 127) << 24


def coverage(boxes: Sequence[Box], window: Box, grid: tuple[int, int]) -> np.ndarray:
    """How much of each cell of a grid over a window lies in the boxes.

    Args:
        boxes: pixels of the page.
        window: what the grid covers, pixels of the page.
        grid: rows, columns.

    Returns:
        (rows, columns) shares in 0..1; overlapping boxes count once each and are capped at 1.

    Example: a window of 64 x 32 with a 1 x 2 grid and the box (16, 0, 32, 32) gives [[0.5, 0.0]].
    """
    x1, y1, x2, y2 = window
    rows, columns = grid
    xs, ys = np.linspace(x1, x2, columns + 1), np.linspace(y1, y2, rows + 1)
    total = np.zeros((rows, columns))
    for a, b, c, d in boxes:
        across = np.clip(np.minimum(xs[1:], c) - np.maximum(xs[:-1], a), 0, None) / (xs[1:] - xs[:-1])
        down = np.clip(np.minimum(ys[1:], d) - np.maximum(ys[:-1], b), 0, None) / (ys[1:] - ys[:-1])
        total += down[:, None] * across[None, :]
    return np.clip(total, 0, 1)


def merge_order(grid: np.ndarray, merge: int = 2) -> np.ndarray:
    """(rows, columns, ...) per patch -> (tokens, merge * merge, ...) in the order of Qwen2-VL's merged tokens.

    Tokens run row by row; within a token its patches run row by row.
    """
    rows, columns = grid.shape[:2]
    split = grid.reshape(rows // merge, merge, columns // merge, merge, *grid.shape[2:])
    return split.swapaxes(1, 2).reshape(rows * columns // merge**2, merge * merge, *grid.shape[2:])


def patch_grid(thw: Tensor) -> tuple[int, int]:
    """(t, h, w) of one image -> (rows, columns) of patches."""
    return int(thw[1]), int(thw[2])


def patch_truth(page: Page, window: Box, grid: tuple[int, int], charset: str, labels: Sequence[str]):
    """What is printed in every patch of a window.

    Returns:
        glyph (tokens, 4): index in charset, plus one, of the glyph whose centre lies in the patch; 0 for none.
        area (tokens, 4, labels): share of the patch that areas of each label cover.
        Both in `merge_order`.
    """
    x1, y1, x2, y2 = window
    rows, columns = grid
    glyph = np.zeros(grid, dtype=np.int64)
    for mark in page.glyphs:
        a, b, c, d = mark.box
        column, row = ((a + c) / 2 - x1) / (x2 - x1) * columns, ((b + d) / 2 - y1) / (y2 - y1) * rows
        if 0 <= column < columns and 0 <= row < rows:
            glyph[int(row), int(column)] = charset.find(mark.char) + 1
    area = np.zeros((*grid, len(labels)))
    for k, label in enumerate(labels):
        area[..., k] = coverage([a.box for a in page.areas if a.label == label], window, grid)
    return merge_order(glyph), merge_order(area)
