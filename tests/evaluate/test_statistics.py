"""Intervals and tests: they hold the true value as often as they say, also where questions share an image."""

from __future__ import annotations

import numpy as np
import pytest

from relook.evaluate.statistics import bootstrap, resampled
from relook.evaluate.summary import compare, pool, summarize


def record(number: int, image: str, score: float, look: str = "region") -> dict:
    fields = dict.fromkeys(("field", "recall", "iou", "failed", "skipped", "usage", "seconds"))
    plain = {
        "task": "t",
        "look": look,
        "index": number,
        "where": "",
        "image": image,
        "question": "q",
        "accepted": ["a"],
    }
    taken = [{"kind": "region", "cells": None, "box": None, "problem": None}] if look != "none" else []
    usage = {"lm_positions": 1, "vision_patches": 1}
    return fields | plain | {"scores": {"exact": score}, "looks": taken, "usage": usage}


def four_an_image(rng: np.random.Generator, images: int = 60, share: float = 0.5) -> list[tuple[str, float]]:
    """Questions right or wrong, four an image; images are easy or hard: Beta(share, 1 - share), mean `share`."""
    easy = rng.beta(share, 1 - share, images)
    return [(f"{i}.png", float(rng.random() < p)) for i, p in enumerate(easy) for _ in range(4)]


def coverage(trials: int) -> float:
    held, rng = 0, np.random.default_rng(0)
    for trial in range(trials):
        values = four_an_image(rng)
        found = summarize("t", "region", {"": [record(i, *each) for i, each in enumerate(values)]}, seed=trial % 50)
        held += found.measures["exact"].low <= 0.5 <= found.measures["exact"].high
    return held / trials


def gains_that_are_none(trials: int) -> float:
    """The share of intervals of a gain that exclude 0 where two looks are equally good, but not on one image."""
    excluded, rng = 0, np.random.default_rng(1)
    for trial in range(trials):
        first, second = [], []
        for i in range(60):
            better = rng.random() < 0.5
            for q in range(4):
                both = rng.random() < 0.5
                first.append(record(4 * i + q, f"{i}.png", float(both or better)))
                second.append(record(4 * i + q, f"{i}.png", float(both or not better), "none"))
        gain = compare("t", "exact", ("a", pool({"": first})), ("b", pool({"": second})), trial % 50).gain
        excluded += not gain.low <= 0 <= gain.high
    return excluded / trials


def test_95_of_100_intervals_hold_the_truth_where_questions_share_an_image():
    """Binomial error of 300 trials: one standard deviation is 1.3 points. By question, 76 of 100 would."""
    assert 0.92 <= coverage(300) <= 0.98
    assert gains_that_are_none(300) <= 0.085


@pytest.mark.slow
def test_95_of_100_intervals_hold_the_truth_long():
    assert 0.93 <= coverage(3000) <= 0.97
    assert 0.03 <= gains_that_are_none(3000) <= 0.07


def test_a_page_in_memory_that_comes_again_is_one_image():
    """HR-Bench holds an image in four rows, its options turned: not four independent images."""
    rows = [record(i, None, float(i < 4)) | {"where": f"row {i}", "pixels": f"hash {i // 4}"} for i in range(8)]
    found = summarize("t", "region", {"": rows})
    assert found.images == 2 and (found.measures["exact"].low, found.measures["exact"].high) == (0.0, 1.0)


def test_bootstrap_agrees_with_theory():
    """For shares the interval comes near the normal one, p +- 1.96 sqrt(p(1-p)/n); the same seed gives the same one."""
    values = [1.0] * 300 + [0.0] * 100
    estimate = bootstrap(values, seed=3)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert estimate.mean == 0.75 and estimate.n == 400
    assert (estimate.low, estimate.high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.01)
    assert estimate == bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert bootstrap([2.0, 2.0]).low == bootstrap([2.0, 2.0]).high == 2.0
    assert bootstrap([]).mean is None


def test_drawing_clusters_is_what_it_says():
    """Against a plain loop over resamples that puts the drawn pages' values together; pages of unlike sizes."""
    rng = np.random.default_rng(0)
    pages = [rng.normal(page % 7, 1, 1 + page % 4) for page in range(25)]
    found = bootstrap(np.concatenate(pages), clusters=[str(i) for i, each in enumerate(pages) for _ in each])
    draws = [np.concatenate([pages[i] for i in rng.integers(0, 25, 25)]).mean() for _ in range(20_000)]
    assert found.mean == pytest.approx(np.concatenate(pages).mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.06)  # of a width of 1.6


def test_clusters_of_one_are_the_plain_bootstrap():
    values = [1.0, 0.0, 0.0, 0.25, 1.0, 0.5, 0.0]
    apart = [str(place) for place in range(len(values))]
    assert bootstrap(values, clusters=apart, seed=3) == bootstrap(values, seed=3)
    parts = np.array([[v, 1.0] for v in values])
    assert resampled(parts, lambda s: s[..., 0] / s[..., 1], seed=3) == bootstrap(values, seed=3)
