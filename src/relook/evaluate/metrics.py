"""Scores of answers and of looks, and their intervals. Numbers in, numbers out: no model, no file.

Boxes are x1, y1, x2, y2 in pixels of the upright original, x2 and y2 exclusive.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from relook.errors import UserError
from relook.regions import Box

_RESAMPLES_AT_ONCE = 256  # bounds the bootstrap's memory: 256 x n indices at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` items with its bootstrap interval [low, high]; all None where there was nothing to average."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def normalise(text: str) -> str:
    """Lower case, white space runs as one space, none at the ends: the only differences that exact match forgives.

    >>> normalise(" Sin  Thye\\n& Co ")
    'sin thye & co'
    """
    return re.sub(r"\s+", " ", text).strip().casefold()


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1.0 where the normalised answer is one of the normalised accepted ones, else 0.0."""
    return float(normalise(answer) in {normalise(each) for each in accepted})


def anls(answer: str, accepted: Sequence[str], threshold: float = 0.5) -> float:
    """Average Normalised Levenshtein Similarity of one item: best over the accepted answers.

    With NL = edit distance / length of the longer, after `normalise`: 1 - NL where NL < threshold, else 0
    (Biten et al., "Scene Text Visual Question Answering", arXiv 1905.13648, section 4).

    >>> anls("9,30", ["9.30"])    # one edit in four characters
    0.75
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UserError("ANLS needs rapidfuzz, which is not installed; pip install 'relook[eval]'") from None
    best = min(Levenshtein.normalized_distance(normalise(answer), normalise(each)) for each in accepted)
    return 1.0 - best if best < threshold else 0.0


SCORERS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact": exact_match, "anls": anls}


def region_overlap(looked: Sequence[Box], annotated: Sequence[Box]) -> tuple[float, float] | None:
    """(recall, IoU) of the area of `looked` against the area of `annotated`, overlaps counted once.

    Recall is the share of the annotated area that was looked at. None where either side has no area.

    >>> region_overlap([(0, 0, 10, 10)], [(5, 0, 15, 10)])    # 50 of 100 covered; 50 shared of 150
    (0.5, 0.3333333333333333)
    """
    corners = [*looked, *annotated]
    if not corners:
        return None
    xs = np.unique([edge for box in corners for edge in (box[0], box[2])])
    ys = np.unique([edge for box in corners for edge in (box[1], box[3])])
    areas = np.outer(np.diff(ys), np.diff(xs))  # the pieces into which all edges cut the plane
    seen, wanted = _pieces(looked, xs, ys), _pieces(annotated, xs, ys)
    shared, target = float(areas[seen & wanted].sum()), float(areas[wanted].sum())
    if not target or not seen.any():
        return None
    return shared / target, shared / float(areas[seen | wanted].sum())


def _pieces(boxes: Sequence[Box], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which pieces between the edges xs and ys lie in one of the boxes: bool (len(ys) - 1, len(xs) - 1)."""
    inside = np.zeros((len(ys) - 1, len(xs) - 1), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        inside |= np.outer((ys[:-1] >= y1) & (ys[1:] <= y2), (xs[:-1] >= x1) & (xs[1:] <= x2))
    return inside


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Estimate:
    """The mean and its percentile bootstrap interval, items drawn with replacement.

    The same values and seed give the same interval. One item gives an interval without width: read `n` beside it.
    """
    data = np.asarray(values, dtype=float)
    n = len(data)
    if not n:
        return Estimate(None, None, None, 0)
    rng = np.random.default_rng(seed)
    blocks = range(0, resamples, _RESAMPLES_AT_ONCE)
    sizes = [min(_RESAMPLES_AT_ONCE, resamples - start) for start in blocks]
    means = np.concatenate([data[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(data.mean()), float(low), float(high), n)
