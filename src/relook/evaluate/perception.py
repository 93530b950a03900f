"""Did the second look matter? The records of one question under several looks, laid side by side.

Every look is held against `none` on the questions that both answered: how many are right only with the look, only
without, with both, with neither; what the look is worth where one was taken; and how often that would come about by
chance (`paired`). Held against `blank`, `random` or `clip-unconditioned` in the same way, the model's own look shows
what is left of its gain when it sees nothing, something else, or features that do not know the question. Records in,
numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relook.evaluate.paired import paired_test
from relook.evaluate.statistics import Estimate, bootstrap

Record = Mapping[str, Any]

RIGHT = 0.5  # a score above which an answer counts as right
NONE = "none"
# what each look is held against, besides `none`: the same look with a part of it taken away
WITHOUT = ("blank", "random", "oracle", "clip-unconditioned", "detection-unconditioned", "seg-unconditioned")


@dataclass(frozen=True)
class Comparison:
    """One task under look `a` and under look `b`, question by question, in the task's first score.

    only_a, only_b, both, neither   how many questions are right so
    gain      mean of a - b over the `n` questions that both answered
    looked    the same over the questions in which a look was taken under `a` ("gain given a look")
    p         of a two-sided paired test, None where there is nothing to compare
    """

    task: str
    score: str
    a: str
    b: str
    n: int
    only_a: int
    only_b: int
    both: int
    neither: int
    gain: Estimate
    looked: Estimate
    p: float | None


def comparisons(records: Sequence[Record], seed: int = 0) -> list[Comparison]:
    """Every look of every task against `none`, then the model's own looks against what is left when a part goes.

    Empty where a task was asked under one look only.
    """
    found = []
    for task in dict.fromkeys(record["task"] for record in records):
        here = [record for record in records if record["task"] == task]
        looks = list(dict.fromkeys(record["look"] for record in here))
        score = next((name for record in here for name in record["scores"]), None)
        if score is not None:
            found += [compare(task, score, a, b, here, seed) for a, b in _pairs(looks)]
    return found


def _pairs(looks: Sequence[str]) -> list[tuple[str, str]]:
    plain = [(look, NONE) for look in looks if look != NONE and NONE in looks]
    own = [look for look in looks if look != NONE and look not in WITHOUT]
    return plain + [(look, less) for look in own for less in WITHOUT if less in looks and _comparable(look, less)]


def _comparable(look: str, less: str) -> bool:
    """A look without its condition says something of that look only; regions, of looks at regions and of a free choice.

    >>> _comparable("clip", "clip-unconditioned"), _comparable("region", "clip-unconditioned")
    (True, False)
    """
    kind, _, unconditioned = less.partition("-")
    return look in (kind, "auto") if unconditioned else look in ("region", "auto")


def compare(task: str, score: str, a: str, b: str, records: Sequence[Record], seed: int = 0) -> Comparison:
    """Look `a` against look `b` on the questions of one task that both answered and that have the score."""
    first, second = (_answered(records, look, score) for look in (a, b))
    pairs = [(first[index], second[index]) for index in first if index in second]
    values = [(x["scores"][score], y["scores"][score]) for x, y in pairs]
    right = [(x >= RIGHT, y >= RIGHT) for x, y in values]
    looked = [
        x - y
        for (record, _), (x, y) in zip(pairs, values, strict=True)
        if any(k["problem"] is None for k in record["looks"])
    ]
    tested = paired_test(
        [(str(r["image"] or r["where"]), x, y) for (r, _), (x, y) in zip(pairs, values, strict=True)], seed
    )
    return Comparison(
        task,
        score,
        a,
        b,
        len(pairs),
        only_a=right.count((True, False)),
        only_b=right.count((False, True)),
        both=right.count((True, True)),
        neither=right.count((False, False)),
        gain=bootstrap([x - y for x, y in values], seed=seed),
        looked=bootstrap(looked, seed=seed),
        p=tested.p,
    )


def _answered(records: Sequence[Record], look: str, score: str) -> dict[int, Record]:
    return {record["index"]: record for record in records if record["look"] == look and score in record["scores"]}


def table(found: Sequence[Comparison]) -> list[list[str]]:
    """The comparisons as rows of cells with a heading; empty where there are none."""
    if not found:
        return []
    heading = ["did the look matter", "n", "only with", "only without", "both", "neither"]
    rows = [[*heading, "gain, points", "where it looked", "p"]]
    for each in found:
        counts = [str(n) for n in (each.n, each.only_a, each.only_b, each.both, each.neither)]
        p = "-" if each.p is None else f"{each.p:.3f}" if each.p >= 0.001 else "< 0.001"
        rows.append([f"{each.task}: {each.a} - {each.b}", *counts, _points(each.gain), _points(each.looked), p])
    return rows


def _points(value: Estimate) -> str:
    if value.mean is None or value.low is None or value.high is None:
        return "-"
    mean, low, high = (f"{100 * each:+.1f}" for each in (value.mean, value.low, value.high))
    return f"{mean} ({low} to {high})"
