"""Means and other figures with bootstrap intervals, and tests of paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
_RESAMPLES_AT_ONCE = 256  # bounds the bootstrap's memory: 256 x n indices at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` items with its bootstrap interval [low, high]; all None where there was nothing to average."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def scaled(self, factor: float = 1) -> tuple[float, float, float] | None:
        """(mean, low, high) times the factor; None where there was nothing to average."""
        if self.mean is None or self.low is None or self.high is None:
            return None
        return factor * self.mean, factor * self.low, factor * self.high


def bootstrap(values: Sequence[float], *, clusters: Sequence[str] | None = None, seed: int = 0) -> Estimate:
    """The mean and its 95 % percentile bootstrap interval.

    Args:
        values: one for each item.
        clusters: of each item what it belongs to (its image). Clusters are drawn with replacement, all items of one
            together: items of a cluster are not independent. None: each item is one of its own.

    The same values and seed give the same interval. One cluster gives an interval without width, as do equal values.
    """
    parts = np.column_stack([np.asarray(values, dtype=float), np.ones(len(values))])
    return resampled(parts, lambda sums: ratio(sums[..., 0], sums[..., 1]), clusters=clusters, seed=seed)


def resampled(
    parts: np.ndarray,
    value: Callable[[np.ndarray], np.ndarray],
    *,
    clusters: Sequence[str] | None = None,
    seed: int = 0,
) -> Estimate:
    """A figure made of sums over items, and its 95 % percentile bootstrap interval (see `bootstrap`).

    Args:
        parts: (n, k), what each item adds.
        value: sums (..., k) to figures (...); NaN where a figure is not defined. Resamples without one are left out.
    """
    n = len(parts)
    whole = float(value(parts.sum(axis=0))) if n else float("nan")
    if np.isnan(whole):
        return Estimate(None, None, None, n)
    if clusters is not None:
        places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        sums = np.zeros((len(places), parts.shape[1]))
        np.add.at(sums, [places[name] for name in clusters], parts)
        parts = sums
    draws = _draws(len(parts), seed)
    starts = range(0, RESAMPLES, _RESAMPLES_AT_ONCE)
    figures = [value(draws[start : start + _RESAMPLES_AT_ONCE].astype(float) @ parts) for start in starts]
    low, high = np.nanquantile(np.concatenate(figures), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(whole, float(low), float(high), n)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=np.asarray(b) > 0)


@lru_cache(maxsize=8)
def _draws(n: int, seed: int) -> np.ndarray:
    """How often each of n clusters is drawn in each resample: uint8 (RESAMPLES, n); each row adds up to n."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((RESAMPLES, n), dtype=np.uint8)
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        block = counts[start : start + _RESAMPLES_AT_ONCE]
        drawn = rng.integers(0, n, block.shape)
        np.add.at(block, (np.arange(len(block))[:, None], drawn), 1)
    return counts


# ---- paired tests

DRAWS = 10_000
_TOLERANCE = 1e-9  # sums of floats that differ by less are equal


def paired_test(pairs: Sequence[tuple[str, float, float]], seed: int = 0) -> float | None:
    """Two-sided p of the difference between two scores of the same questions; None without questions.

    If two ways of answering were equally good, each question's difference could as well have the other sign: a
    permutation test, which assumes nothing about scores. Where a score is right or wrong and every question has an
    image of its own, this is McNemar's exact test; else the differences of one image, which are not independent, keep
    their signs together.

    Args:
        pairs: (image, first's score, second's) of every question that both answered.

    >>> paired_test([("a", 1, 0), ("b", 1, 0), ("c", 1, 0), ("d", 0, 0)])
    0.25
    """
    if not pairs:
        return None
    differences = np.array([x - y for _, x, y in pairs], dtype=float)
    images = {image: place for place, image in enumerate(dict.fromkeys(image for image, _, _ in pairs))}
    if len(images) == len(pairs) and bool(np.isin(differences, (-1.0, 0.0, 1.0)).all()):
        return mcnemar(int((differences > 0).sum()), int((differences < 0).sum()))
    return sign_flips(np.bincount([images[image] for image, _, _ in pairs], weights=differences), seed)


def mcnemar(first: int, second: int) -> float:
    """Two-sided exact p of `first` against `second` discordant pairs: a fair coin's (McNemar, Psychometrika 1947).

    >>> round(mcnemar(59, 121), 9)
    4.434e-06
    """
    n, fewer = first + second, min(first, second)
    return min(1.0, 2 * sum(comb(n, k) for k in range(fewer + 1)) / 2**n)


def sign_flips(sums: np.ndarray, seed: int = 0, draws: int = DRAWS) -> float:
    """Two-sided p of the sum of independent differences under random signs: over all signs, or over `draws`.

    Of drawn signs the observed ones are counted too, so that p is never 0 (Phipson & Smyth, 2010).
    """
    sums = sums[np.abs(sums) > _TOLERANCE]
    observed = abs(sums.sum()) - _TOLERANCE
    if 2 ** len(sums) <= draws:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((np.abs((1 - 2 * bits) @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    signs = rng.integers(0, 2, (draws, len(sums)), dtype=np.int8) * 2 - 1
    return float((1 + (np.abs(signs @ sums) >= observed).sum()) / (1 + draws))
