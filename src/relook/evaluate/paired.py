"""Two runs on the same questions: how often the difference between them would come about by chance.

The permutation test needs no assumption about scores: if two ways of answering were equally good, each question's
difference could as well have the other sign. Where a score is right or wrong it is McNemar's exact test, and is counted
as that; else signs are drawn. Questions about one image are not independent, so an image's differences keep their signs
together. Numbers in, numbers out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

DRAWS = 10_000
_TOLERANCE = 1e-9  # sums of floats that differ by less are equal


@dataclass(frozen=True)
class Paired:
    """Of `n` questions: on how many the first is better, the second, neither; `p` of a two-sided test (None: no pair).

    test   "mcnemar" (exact), "permutation" (exact over all signs, or of 10,000 draws)
    """

    n: int
    first: int
    second: int
    p: float | None
    test: str

    @property
    def same(self) -> int:
        return self.n - self.first - self.second


def paired_test(pairs: Sequence[tuple[str, float, float]], seed: int = 0) -> Paired:
    """Compare two scores of the same questions.

    Args:
        pairs: (image, first's score, second's) of every question that both answered.

    >>> paired_test([("a", 1, 0), ("b", 1, 0), ("c", 1, 0), ("d", 0, 0)])
    Paired(n=4, first=3, second=0, p=0.25, test='mcnemar')
    """
    differences = np.array([x - y for _, x, y in pairs], dtype=float)
    first, second = int((differences > 0).sum()), int((differences < 0).sum())
    images = [image for image, _, _ in pairs]
    binary = bool(np.isin(differences, (-1.0, 0.0, 1.0)).all()) and len(set(images)) == len(images)
    if not pairs:
        return Paired(0, 0, 0, None, "permutation")
    if binary:
        return Paired(len(pairs), first, second, mcnemar(first, second), "mcnemar")
    places = {image: place for place, image in enumerate(dict.fromkeys(images))}
    sums = np.bincount([places[image] for image in images], weights=differences)
    return Paired(len(pairs), first, second, sign_flips(sums, seed), "permutation")


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
