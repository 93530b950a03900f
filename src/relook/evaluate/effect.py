"""Did the look matter: the numbers of one evaluation, task by task. docs/matter.md explains each of them.

`BASE` is how the model answers by itself; every other row is that with something taken away or given. An answer is
right from a score of `summary.RIGHT` on. All intervals are 95 % bootstraps over images (`statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from relook.errors import UserError
from relook.evaluate.metrics import normalize
from relook.evaluate.records import Folder, Record
from relook.evaluate.settings import SETTINGS, UNCONDITIONED
from relook.evaluate.statistics import LEVEL, Estimate, bootstrap, paired_test, ratio, resampled
from relook.evaluate.summary import RIGHT, Comparison, PooledQuestion, compare, measure_of, pool, took_a_look
from relook.regions import clamp_box, union

BASE, NONE, ORACLE = "auto", "none", "oracle"
OUTCOMES = ("needed", "idle", "harmful", "useless", "no look")
UNSEEN = ("auto-blank", "other")  # rows under which nothing of the crop called is seen
EDGES = (8, 16, 32, 64, 128)  # of the sizes of annotated regions, pixels of the first look
Prices = tuple[float, float]  # of a million input and a million output tokens


def side_seen(record: Record) -> float | None:
    """How large the annotated region is in the first look: the side, in its pixels, of a square of the same area.

    None where nothing is annotated, or the size of the first look was not recorded.

    >>> side_seen({"boxes": [[80, 100, 320, 250]], "size": [640, 400], "seen": [320, 200]})  # 120 x 75 pixels there
    94.86832980505138
    """
    boxes, size, seen = record.get("boxes"), record.get("size"), record.get("seen")
    if not boxes or not size or not seen:
        return None
    x1, y1, x2, y2 = clamp_box(union([(b[0], b[1], b[2], b[3]) for b in boxes]), (size[0], size[1]))
    return float(((x2 - x1) * seen[0] / size[0] * (y2 - y1) * seen[1] / size[1]) ** 0.5)


@dataclass(frozen=True)
class Row:
    """One setting.

    against     the row it is compared with, minus it: `BASE`, or of an unconditioned look the look; None for `BASE`
    changed     share of the questions in which that row looked, whose answer is another one here
    per_right   what all answers cost, for each right one: tokens of all turns, patches through vision encoders,
                seconds, and money where prices were given
    """

    look: str
    answered: int
    failed: int
    skipped: int
    accuracy: Estimate
    looked: Estimate
    malformed: Estimate
    against: Comparison | None
    changed: Estimate | None
    per_right: dict[str, Estimate]


@dataclass(frozen=True)
class Bin:
    """Questions whose annotated region has `low` <= side < `high` (None: no bound) in the first look."""

    low: float
    high: float | None
    n: int
    with_look: Estimate
    without: Estimate
    gain: Estimate
    p: float | None


@dataclass(frozen=True)
class Effect:
    """One task of one model.

    outcomes  shares of `OUTCOMES`, which add up to 1, over the questions answered under `BASE` and `NONE`
    bins      by size, over the same questions; empty where sizes are not known
    pays_to   up to which side of the annotated region a look pays: the upper edge of the last bin whose gain is `sure`;
              None where it is in none, infinity where in the last one
    gap       `ORACLE` minus `NONE`: the zooming gap; None where they were not run
    verdict   a name of `VERDICTS`
    """

    model: str
    task: str
    score: str
    rows: tuple[Row, ...]
    outcomes: dict[str, Estimate]
    bins: tuple[Bin, ...]
    pays_to: float | None
    gap: Comparison | None
    verdict: str

    def row(self, look: str) -> Row | None:
        return next((row for row in self.rows if row.look == look), None)

    @property
    def said(self) -> str:
        """The verdict in a sentence."""
        return VERDICTS[self.verdict].format(**_words(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; infinity as "any"."""
        pays = "any" if self.pays_to == float("inf") else self.pays_to
        return {**asdict(replace(self, pays_to=None)), "pays_to": pays, "said": self.said}


def effects(folder: Folder, prices: Prices | None = None, seed: int = 0) -> list[Effect]:
    """The effect of looking in every task of an evaluation.

    Raises:
        UserError: a task that was not asked under `BASE` and `NONE`.
    """
    return [_effect(folder, task, prices, seed) for task in dict.fromkeys(record["task"] for record in folder.records)]


def _effect(folder: Folder, task: str, prices: Prices | None, seed: int) -> Effect:
    looks = {record["look"] for record in folder.records if record["task"] == task}
    if missing := {BASE, NONE} - looks:
        raise UserError(
            f"{folder.path}: {task} was not asked under {', '.join(sorted(missing))}; whether a look mattered needs "
            f"{BASE} and {NONE}"
        )
    records = {look: folder.under(task, look) for look in sorted(looks, key=_place)}
    score = next((name for each in records.values() for record in each for name in record["scores"]), "exact")
    pooled = {look: pool({"": each}) for look, each in records.items()}

    def compared(a: str, b: str) -> Comparison:
        return compare(task, score, (a, pooled[a]), (b, pooled[b]), seed)

    rows = tuple(_row(look, records, pooled, score, compared, prices, seed) for look in records)
    pairs = _pairs(pooled[BASE], pooled[NONE], score)
    bins = _bins(pairs, seed)
    effect = Effect(
        str(folder.run.get("model") or folder.name),
        task,
        score,
        rows,
        _outcomes(pairs, seed),
        bins,
        _pays_to(bins),
        compared(ORACLE, NONE) if ORACLE in records else None,
        "unlike",
    )
    return replace(effect, verdict=_verdict(effect))


def _place(look: str) -> tuple[int, str]:
    order = [BASE, NONE, ORACLE, *SETTINGS]
    return (order.index(look) if look in order else len(order)), look


# ---- rows


def _row(
    look: str,
    records: Mapping[str, Sequence[Record]],
    pooled: Mapping[str, Sequence[PooledQuestion]],
    score: str,
    compared: Callable[[str, str], Comparison],
    prices: Prices | None,
    seed: int,
) -> Row:
    with_part = look.removesuffix(UNCONDITIONED)
    base = with_part if with_part != look and with_part in records else BASE
    questions = [each for each in pooled[look] if each.answers]
    measured = {name: _mean([(q.image, q.value(measure_of(name))) for q in questions], seed) for name in _SHARES}
    return Row(
        look,
        len(questions),
        sum(record["failed"] is not None for record in records[look]),
        sum(record["skipped"] is not None for record in records[look]),
        _mean([(q.image, q.value(measure_of(score))) for q in questions], seed),
        **measured,
        against=None if look == base else compared(base, look),
        changed=None if look == base else _changed(pooled[base], questions, seed),
        per_right=_per_right(questions, score, prices, seed),
    )


_SHARES = ("looked", "malformed")


def _changed(base: Sequence[PooledQuestion], others: Sequence[PooledQuestion], seed: int) -> Estimate:
    said = {each.key: each.answers[0].get("answer") or "" for each in others}
    looked = [each for each in base if each.key in said and any(map(took_a_look, each.answers))]
    pairs = [(each.image, normalize(each.answers[0].get("answer") or ""), normalize(said[each.key])) for each in looked]
    return _mean([(image, float(one != other)) for image, one, other in pairs], seed)


def _per_right(
    questions: Sequence[PooledQuestion], score: str, prices: Prices | None, seed: int
) -> dict[str, Estimate]:
    """What all answers cost, divided by how many are right; nothing where none is."""
    costs: dict[str, Callable[[dict[str, Any], Record], float | None]] = {
        "tokens": lambda usage, record: _tokens(usage),
        "patches": lambda usage, record: usage.get("vision_patches"),
        "seconds": lambda usage, record: record["seconds"],
    }
    if prices is not None:
        costs["money"] = lambda usage, record: _money(usage, prices)
    found = {}
    for name, cost in costs.items():
        values = [cost(each.answers[0]["usage"] or {}, each.answers[0]) for each in questions]
        known = [(each, value) for each, value in zip(questions, values, strict=True) if value is not None]
        parts = np.array([[value, float((each.value(measure_of(score)) or 0) >= RIGHT)] for each, value in known])
        images = [each.image for each, _ in known]
        if known:
            found[name] = resampled(parts, lambda sums: ratio(sums[..., 0], sums[..., 1]), clusters=images, seed=seed)
    return found


def _tokens(usage: Mapping[str, Any]) -> float | None:
    """Tokens of all turns, kept in a server's cache or not: later rows find there what earlier ones left."""
    run = usage.get("lm_positions")
    return None if run is None else run + usage.get("cached_tokens", 0)


def _money(usage: Mapping[str, Any], prices: Prices) -> float | None:
    """What the tokens of an answer cost; all are input that were not generated."""
    out, every = usage.get("generated_tokens"), _tokens(usage)
    return None if out is None or every is None else ((every - out) * prices[0] + out * prices[1]) / 1e6


# ---- with against without


@dataclass(frozen=True)
class _Pair:
    """A question answered under both: scores with and without, whether a look was taken, the region's side."""

    image: str
    with_look: float
    without: float
    looked: bool
    side: float | None

    @property
    def outcome(self) -> str:
        if not self.looked:
            return "no look"
        right, before = self.with_look >= RIGHT, self.without >= RIGHT
        return {(True, False): "needed", (True, True): "idle", (False, True): "harmful"}.get((right, before), "useless")


def _pairs(base: Sequence[PooledQuestion], none: Sequence[PooledQuestion], score: str) -> list[_Pair]:
    measure, others = measure_of(score), {each.key: each for each in none}
    found = []
    for each in base:
        x = each.value(measure)
        y = others[each.key].value(measure) if each.key in others else None
        if x is not None and y is not None:
            looked = any(map(took_a_look, each.answers))
            found.append(_Pair(each.image, x, y, looked, side_seen(each.answers[0])))
    return found


def _outcomes(pairs: Sequence[_Pair], seed: int) -> dict[str, Estimate]:
    return {name: _mean([(each.image, float(each.outcome == name)) for each in pairs], seed) for name in OUTCOMES}


def _bins(pairs: Sequence[_Pair], seed: int) -> tuple[Bin, ...]:
    found = []
    for low, high in zip((0, *EDGES), (*EDGES, None), strict=True):
        those = [p for p in pairs if p.side is not None and low <= p.side and (high is None or p.side < high)]
        if those:
            own = _mean([(p.image, p.with_look) for p in those], seed)
            without = _mean([(p.image, p.without) for p in those], seed)
            gain = _mean([(p.image, p.with_look - p.without) for p in those], seed)
            test = paired_test([(p.image, p.with_look, p.without) for p in those], seed)
            found.append(Bin(low, high, len(those), own, without, gain, test))
    return tuple(found)


def _pays_to(bins: Sequence[Bin]) -> float | None:
    paying = [each for each in bins if sure(each.gain, each.p) > 0]
    return None if not paying else float("inf") if paying[-1] is bins[-1] else paying[-1].high


def sure(gain: Estimate, p: float | None) -> int:
    """The sign of a difference whose interval leaves 0 out and whose p is below 5 %, else 0: of few questions alike, an
    interval has no width, and says nothing."""
    if gain.low is None or gain.high is None or p is None or p >= 1 - LEVEL:
        return 0
    return (gain.low > 0) - (gain.high < 0)


def _mean(values: Sequence[tuple[str, float | None]], seed: int) -> Estimate:
    known = [(image, value) for image, value in values if value is not None]
    return bootstrap([value for _, value in known], clusters=[image for image, _ in known], seed=seed)


# ---- the verdict

VERDICTS = {
    "no looks": "The model takes no look by itself.",
    "ignored": "The look is ignored: with its crop {unseen}, not one of {n} answers changed ({bound}).",
    "needed": "The look is needed: {gain} points over no look, and {left} over a crop {unseen}.",
    "unseen": "Looking helps, what is seen does not: {gain} points over no look, but {left} over a crop {unseen}.",
    "helps": "The look helps: {gain} points over no look; whether by what is seen was not asked.",
    "harmful": "The look does harm: {gain} points over no look.",
    "no better": "That the look makes more or fewer answers right is not shown: {gain} points over no look.",
}
_SHOWN = {"auto-blank": "shown blank", "other": "of another question's image"}


def _verdict(effect: Effect) -> str:
    """Which of `VERDICTS` holds."""
    base, none = effect.row(BASE), effect.row(NONE)
    assert base is not None and none is not None and none.against is not None
    unseen = _unseen(effect)
    if not base.looked.mean:
        return "no looks"
    if unseen and all(row.changed is not None and row.changed.n and not row.changed.mean for row in unseen):
        return "ignored"
    gain = sure(none.against.gain, none.against.p)
    if gain <= 0:
        return "harmful" if gain < 0 else "no better"
    left = [sure(row.against.gain, row.against.p) for row in unseen if row.against is not None]
    return "helps" if not left else "needed" if min(left) > 0 else "unseen"


def _unseen(effect: Effect) -> list[Row]:
    return [row for row in map(effect.row, UNSEEN) if row is not None and row.answered]


def _words(effect: Effect) -> dict[str, str]:
    """What the sentences of `VERDICTS` are filled with; of the rows unseen, the one that leaves the least gain."""
    none, unseen = effect.row(NONE), _unseen(effect)
    gains = {row.look: row.against.gain for row in unseen if row.against is not None}
    least = min(gains, key=lambda look: gains[look].mean or 0.0, default=None)
    n = min((row.changed.n for row in unseen if row.changed is not None), default=0)
    return {
        "gain": _points(none.against.gain if none is not None and none.against is not None else None),
        "left": _points(gains[least] if least is not None else None),
        "unseen": " or ".join(_SHOWN[row.look] for row in unseen)
        if effect.verdict == "ignored"
        else _SHOWN.get(str(least), ""),
        "n": str(n),
        "bound": f"at most {100 * min(3 / n, 1):.1f} % would, by the rule of three" if n else "",
    }


def _points(value: Estimate | None) -> str:
    numbers = value and value.scaled(100)
    if not numbers:
        return "an unknown number of"
    return f"{numbers[0]:+.1f} ({numbers[1]:+.1f} to {numbers[2]:+.1f})"
