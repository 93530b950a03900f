"""Orders of records: shuffled within windows, and drawn from several sources by their shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

DRAWS = 1000  # draws between sources that are made at a time


def windowed(count: int, window: int, draw: np.random.Generator) -> np.ndarray:
    """The numbers below `count`, shuffled within windows that follow one another; where windows begin is drawn, too.

    So records are read nearly from front to back, and no two that are read in turn lie further apart than a window.
    """
    edges = [0, *range(int(draw.integers(window)) or window, count, window), count]
    return np.concatenate([draw.permutation(end - begin) + begin for begin, end in pairwise(edges)])


def interleaved(
    lengths: Sequence[int], shares: Sequence[float], over: bool, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch drawn from several sources, as `datasets.interleave_datasets` draws with probabilities.

    Args:
        lengths: of the sources.
        shares: their probabilities, which add up to 1.
        over: end when every source has run out once (one that runs out early starts again); else when the first does.

    Returns:
        (n,) the source of each draw; (n,) how many came from that source before.
    """
    which = np.empty(0, dtype=np.int64)
    while True:
        which = np.concatenate([which, draw.choice(len(lengths), size=DRAWS, p=np.asarray(shares))])
        places = [np.flatnonzero(which == source) for source in range(len(lengths))]
        ends = [int(place[n - 1]) for place, n in zip(places, lengths, strict=True) if len(place) >= n]
        if ends and (not over or len(ends) == len(lengths)):
            break
    which = which[: (max(ends) if over else min(ends)) + 1]
    before = np.empty(len(which), dtype=np.int64)
    for source in range(len(lengths)):
        place = np.flatnonzero(which == source)
        before[place] = np.arange(len(place))
    return which, before
