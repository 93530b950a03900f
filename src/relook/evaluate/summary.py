"""Rows of a report as statistics: several folders (seeds) pooled question by question, intervals, paired differences.

Answers of the several seeds to one question are averaged first, so that a question counts once however many seeds
answered it. Intervals come from drawing *images* with replacement, all questions of an image together: questions about
one page are not independent, and where every question has a page of its own this is the plain bootstrap of `metrics`.
They say what another set of pages would change, not what another training would; of that the seeds' means say a little.

Records in, numbers out; no file, no text. The order of records changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from relook.evaluate.metrics import SCORERS
from relook.evaluate.paired import paired_test
from relook.evaluate.results import MEASURES
from relook.evaluate.split_metrics import split_scores
from relook.evaluate.statistics import Estimate

Record = Mapping[str, Any]
Measure = Callable[[Record], float | None]
Key = tuple[int, str, tuple[str, ...]]  # number of the question in its task, its text, the accepted answers

_DRAWS_AT_ONCE = 256  # bounds the memory of drawing: 256 x n indices at a time


def _score(name: str) -> Measure:
    return lambda record: record["scores"].get(name)


MEASURED: dict[str, Measure] = {**{name: _score(name) for name in SCORERS}, **MEASURES}


@dataclass(frozen=True)
class Asked:
    """One question of a row, and the records of all folders that answered it (none: it failed in all).

    image   what is drawn together in the bootstrap: the image's path; of a page drawn in memory, which page
    """

    key: Key
    image: str
    field: str | None
    answers: tuple[Record, ...]

    def value(self, measure: Measure) -> float | None:
        """The mean over the answers that have one."""
        values = [value for value in map(measure, self.answers) if value is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Difference:
    """Row `a` minus row `b` in one measure of one task, over the questions that both answered; `p` of a paired test."""

    a: str
    b: str
    task: str
    measure: str
    estimate: Estimate
    p: float | None = None


BY_FIELD = ("recall", "iou")  # measures told by field beside the scores: what a region covers depends on what is asked


@dataclass(frozen=True)
class Summary:
    """One row on one task.

    asked     questions, sorted; a question counts once, however many folders asked it
    answered, failed, skipped   records of all folders together
    measures  estimate by name: the scores that any record has, `MEASURES`, and what only a split has (over all
              answers, drawn one by one)
    fields    estimates of the scores and of `BY_FIELD` by the question's field
    seeds     by folder: the plain means of the scores
    errors    the first few failures in words
    uneven    whether the folders asked different questions
    unscored  answers that a score is missing for (a judge that failed), by score; none of its estimates counts them
    """

    asked: tuple[Asked, ...]
    answered: int
    failed: int
    skipped: int
    measures: dict[str, Estimate]
    fields: dict[str, dict[str, Estimate]]
    seeds: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    uneven: bool = False
    unscored: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return len({asked.image for asked in self.asked if asked.answers})


def summarise(records: Mapping[str, Sequence[Record]], seed: int = 0) -> Summary:
    """The records of one task and look, by folder, pooled."""
    asked = pool(records)
    every = [record for name in sorted(records) for record in records[name]]
    answered = [record for record in every if record["failed"] is None and record["skipped"] is None]
    scores = scored(answered)
    failed = sorted(f"{record['where']}: {record['failed']}" for record in every if record["failed"] is not None)
    skipped = sum(record["skipped"] is not None for record in every)
    fields = sorted({each.field for each in asked if each.field and each.answers})
    return Summary(
        asked=asked,
        answered=len(answered),
        failed=len(failed),
        skipped=skipped,
        measures={
            name: estimate(asked, measure, seed)
            for name, measure in {**{score: measure_of(score) for score in scores}, **MEASURES}.items()
        }
        | split_scores(answered, seed),
        fields={
            name: {
                score: estimate([each for each in asked if each.field == name], measure_of(score), seed)
                for score in (*scores, *BY_FIELD)
            }
            for name in fields
        },
        seeds={name: _means(records[name], scores) for name in sorted(records) if records[name]},
        errors=tuple(failed[:5]),
        uneven=len({frozenset(map(_key, each)) for each in records.values()}) > 1,
        unscored={name: n for name in scores if (n := sum(name not in record["scores"] for record in answered))},
    )


def scored(records: Iterable[Record]) -> tuple[str, ...]:
    """The scores that any record has: those of `SCORERS` in its order, then others (a judge's) by name."""
    names = {name for record in records for name in record["scores"]}
    return (*(name for name in SCORERS if name in names), *sorted(names - SCORERS.keys()))


def measure_of(name: str) -> Measure:
    """The measure of that name; a name that no table knows is a score."""
    return MEASURED.get(name) or _score(name)


def pool(records: Mapping[str, Sequence[Record]]) -> tuple[Asked, ...]:
    """The questions of several folders, each once, sorted by number."""
    found: dict[Key, list[Record]] = defaultdict(list)
    for name in sorted(records):
        for record in records[name]:
            found[_key(record)].append(record)
    return tuple(
        Asked(
            key,
            min(str(record["image"] or record["where"]) for record in found[key]),
            next((record["field"] for record in found[key] if record["field"]), None),
            tuple(record for record in found[key] if record["failed"] is None and record["skipped"] is None),
        )
        for key in sorted(found)
    )


def estimate(asked: Sequence[Asked], measure: Measure, seed: int = 0) -> Estimate:
    """Mean over the questions that have a value, and its 95 % interval, images drawn with replacement."""
    values = ((each.image, each.value(measure)) for each in asked)
    return clustered([(image, value) for image, value in values if value is not None], seed)


def difference(a: Sequence[Asked], b: Sequence[Asked], measure: Measure, seed: int = 0) -> Estimate:
    """Mean of a - b over the questions that both answered, and its 95 % interval: the paired bootstrap.

    The same images are drawn on both sides, so what is hard about a page falls out of the difference.
    """
    return clustered([(image, x - y) for image, x, y in _pairs(a, b, measure)], seed)


def chance(a: Sequence[Asked], b: Sequence[Asked], measure: Measure, seed: int = 0) -> float | None:
    """p of a two-sided paired test of that difference (`paired`); None where no question was answered by both."""
    return paired_test(_pairs(a, b, measure), seed).p


def _pairs(a: Sequence[Asked], b: Sequence[Asked], measure: Measure) -> list[tuple[str, float, float]]:
    """(image, a's value, b's) of the questions that have both."""
    others = {each.key: each for each in b}
    both = ((each.image, each.value(measure), others[each.key].value(measure)) for each in a if each.key in others)
    return [(image, x, y) for image, x, y in both if x is not None and y is not None]


def clustered(values: Sequence[tuple[str, float]], seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of (cluster, value) pairs with its 95 % percentile interval, clusters drawn with replacement.

    One cluster gives an interval without width; so do values that are all the same.
    """
    if not values:
        return Estimate(None, None, None, 0)
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in values))}
    owner = np.array([places[name] for name, _ in values])
    sums = np.bincount(owner, weights=[value for _, value in values])
    sizes = np.bincount(owner).astype(float)
    draws = _draws(len(places), seed, resamples)
    means = (draws @ sums) / (draws @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(sums.sum() / sizes.sum()), float(low), float(high), len(values))


@lru_cache(maxsize=8)
def _draws(n: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of n clusters is drawn in each resample: float (resamples, n); each row adds up to n."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, n))
    for start in range(0, resamples, _DRAWS_AT_ONCE):
        block = counts[start : start + _DRAWS_AT_ONCE]
        drawn = rng.integers(0, n, block.shape)
        np.add.at(block, (np.arange(len(block))[:, None], drawn), 1)
    return counts


def _means(records: Sequence[Record], scores: Sequence[str]) -> dict[str, float]:
    ordered = sorted(records, key=_key)  # a sum of floats depends on their order
    values = {name: [v for record in ordered if (v := measure_of(name)(record)) is not None] for name in scores}
    return {name: sum(each) / len(each) for name, each in values.items() if each}


def _key(record: Record) -> Key:
    return record["index"], record["question"], tuple(record["accepted"])
