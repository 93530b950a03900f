"""Records to numbers: the summary of a task's answers, and the comparison of two sets of answers to the same questions.

Records of several folders (seeds) are pooled: answers to one question are averaged first, so that a question counts
once however many seeds answered it. Intervals come from drawing images with replacement, all questions of an image
together: questions about one image are not independent. They say what other images would change, not what another
training would. The order of records changes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from relook.evaluate.groups import grouping
from relook.evaluate.metrics import SCORERS
from relook.evaluate.records import Record, answered, cluster_key
from relook.evaluate.settings import SETTINGS
from relook.evaluate.split_metrics import split_scores
from relook.evaluate.statistics import Estimate, bootstrap, paired_test

Measure = Callable[[Record], float | None]
Key = tuple[int, str, tuple[str, ...]]  # number of the question in its task, its text, the accepted answers

RIGHT = 0.5  # a score from which an answer counts as right
BY_FIELD = ("recall", "iou")  # measures given by field beside the scores: regions depend on what is asked
NONE = "none"
ANNOTATED = "annotated"
# what each look is compared with, besides `none`: the same look with a part of it taken away
INTERVENED = tuple(name for name, setting in SETTINGS.items() if setting.intervention and name != "blank")
WITHOUT = (
    *("once", "blank", *INTERVENED, "random", "oracle"),
    *("clip-unconditioned", "detection-unconditioned", "seg-unconditioned"),
)

# Measures of an answered record besides its scores; None where it has none.
MEASURES: dict[str, Measure] = {
    "recall": lambda record: record["recall"],
    "iou": lambda record: record["iou"],
    "first_recall": lambda record: record.get("first_recall"),
    "looked": lambda record: float(took_a_look(record)),
    "malformed": lambda record: float(any(look["problem"] is not None for look in record["looks"])),
    "lm_positions": lambda record: (record["usage"] or {})["lm_positions"],
    "vision_patches": lambda record: (record["usage"] or {})["vision_patches"],
    "generated_tokens": lambda record: (record["usage"] or {}).get("generated_tokens"),
    "seconds": lambda record: record["seconds"],
}


def took_a_look(record: Record) -> bool:
    return any(look["problem"] is None for look in record["looks"])


def measure_of(name: str) -> Measure:
    """The measure of that name; a name that `MEASURES` lacks is a score."""
    return MEASURES.get(name) or (lambda record: record["scores"].get(name))


# ---- questions


@dataclass(frozen=True)
class PooledQuestion:
    """One question, and the records of all folders that answered it (none: it failed in all).

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


def pool(records: Mapping[str, Sequence[Record]]) -> tuple[PooledQuestion, ...]:
    """The questions in records by folder, each once, sorted by number."""
    found: dict[Key, list[Record]] = defaultdict(list)
    for name in sorted(records):
        for record in records[name]:
            found[_key(record)].append(record)
    return tuple(
        PooledQuestion(
            key,
            min(map(cluster_key, found[key])),
            next((record["field"] for record in found[key] if record["field"]), None),
            tuple(filter(answered, found[key])),
        )
        for key in sorted(found)
    )


def in_groups(questions: Iterable[PooledQuestion], by: str) -> dict[str, list[PooledQuestion]]:
    """The answered questions by their group (`grouping`), sorted by its name."""
    group, found = grouping(by), defaultdict[str, list[PooledQuestion]](list)
    for each in questions:
        if name := next(filter(None, map(group, each.answers)), None):
            found[name].append(each)
    return dict(sorted(found.items()))


def estimate(questions: Iterable[PooledQuestion], measure: Measure, seed: int = 0) -> Estimate:
    """Mean over the questions that have a value, and its 95 % interval; `seed` is of the draws."""
    return _mean(((each.image, each.value(measure)) for each in questions), seed)


def _mean(values: Iterable[tuple[str, float | None]], seed: int) -> Estimate:
    """Of (image, value) pairs that have a value, with its interval."""
    known = [(image, value) for image, value in values if value is not None]
    return bootstrap([value for _, value in known], clusters=[image for image, _ in known], seed=seed)


def _key(record: Record) -> Key:
    return record["index"], record["question"], tuple(record["accepted"])


# ---- one setting


@dataclass(frozen=True)
class Summary:
    """One task under one look.

    questions  pooled and sorted; `asked` counts records: answered + failed
    skipped    records that the look does not apply to (nothing annotated, for `oracle`)
    unscored   answers that a score is missing for (a judge that failed); `missing` counts them by score. A score's
               mean and n leave them out
    measures   estimate by name: scores, also those that only a split has (F1); recall (share of the annotated area
               that was seen) and iou (of the cells named, before any widening), both over answers with a region look
               and of the last one where they nest (first_recall: of the first one);
               looked, malformed (shares of answers); costs
    fields     estimates by the question's field
    kinds      how often each kind of look was taken
    errors     the first few failures in words
    seeds      by folder: the plain means of the scores
    groups     by each `grouping` asked for: estimates by the name of the group
    uneven     whether the folders asked different questions
    located    how many questions have boxes, by what found them ("annotated" where people drew them)
    """

    task: str
    look: str
    questions: tuple[PooledQuestion, ...]
    answered: int
    failed: int
    skipped: int
    unscored: int
    missing: dict[str, int]
    measures: dict[str, Estimate]
    fields: dict[str, dict[str, Estimate]]
    kinds: dict[str, int]
    errors: list[str]
    seeds: dict[str, dict[str, float]]
    uneven: bool
    located: dict[str, int]
    groups: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)

    @property
    def asked(self) -> int:
        return self.answered + self.failed

    @property
    def images(self) -> int:
        return len({each.image for each in self.questions if each.answers})

    def to_dict(self) -> dict[str, Any]:
        """What results.json says of it."""
        names = (
            "task",
            "look",
            "answered",
            "failed",
            "skipped",
            "unscored",
            "measures",
            "fields",
            "kinds",
            "errors",
            "located",
        )
        plain = {name: getattr(self, name) for name in (*names, "asked")}
        plain |= {"measures": _plain(self.measures), "fields": _by_name(self.fields)}
        return plain | ({"groups": {by: _by_name(each) for by, each in self.groups.items()}} if self.groups else {})

    @property
    def found(self) -> str:
        """A sentence on boxes that were found and not annotated; "" where there are none."""
        found = {by: n for by, n in self.located.items() if by != ANNOTATED}
        if not found:
            return ""
        by = ", ".join(f"{n} by {name}" for name, n in found.items())
        every, number = sum(self.located.values()), sum(found.values())
        return f"{self.task}: of {every} questions with boxes, those of {number} were found ({by}), not annotated"


def _by_name(found: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {name: _plain(each) for name, each in found.items()}


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(each) for name, each in estimates.items()}


def summarize(
    task: str,
    look: str,
    records: Mapping[str, Sequence[Record]],
    scores: Sequence[str] | None = None,
    by_field: Sequence[str] = BY_FIELD,
    seed: int = 0,
    by: Sequence[str] = (),
) -> Summary:
    """The summary of one task under one look.

    Args:
        records: by folder; pooled.
        scores: None for those that any record has.
        by_field: measures that are given by field beside the scores.
        by: groupings by which the scores and `BY_FIELD` are given, too.
    """
    questions = pool(records)
    every = sorted((record for name in sorted(records) for record in records[name]), key=_key)
    answers = [record for record in every if answered(record)]
    scores = scored(answers) if scores is None else scores
    failed = [record for record in every if record["failed"] is not None]
    nested = any("first_recall" in record for record in answers)
    names = [name for name in (*scores, *MEASURES) if nested or name != "first_recall"]
    measures = {name: estimate(questions, measure_of(name), seed) for name in names}

    def split(by: str, names: Sequence[str]) -> dict[str, dict[str, Estimate]]:
        parts = in_groups(questions, by)
        return {name: {each: estimate(part, measure_of(each), seed) for each in names} for name, part in parts.items()}

    missing = {name: sum(name not in record["scores"] for record in answers) for name in scores}
    kinds = Counter(look["kind"] for record in answers for look in record["looks"] if look["problem"] is None)
    located = {_key(each): (each.get("located") or {}).get("by", ANNOTATED) for each in every if each.get("boxes")}
    return Summary(
        task,
        look,
        questions,
        answered=len(answers),
        failed=len(failed),
        skipped=sum(record["skipped"] is not None for record in every),
        unscored=sum(any(name not in record["scores"] for name in scores) for record in answers),
        missing={name: count for name, count in missing.items() if count},
        measures=measures | split_scores(answers, seed),
        fields=split("field", (*scores, *by_field)),
        kinds=dict(kinds.most_common()),
        errors=[f"{record['where']}: {record['failed']}" for record in failed[:5]],
        seeds={name: _means(records[name], scores) for name in sorted(records) if records[name]},
        uneven=len({frozenset(map(_key, each)) for each in records.values()}) > 1,
        located=dict(Counter(located.values())),
        groups={each: split(each, (*scores, *BY_FIELD)) for each in by},
    )


def scored(records: Iterable[Record]) -> tuple[str, ...]:
    """The scores that any record has: those of `SCORERS` in its order, then others (a judge's) by name."""
    names = {name for record in records for name in record["scores"]}
    return (*(name for name in SCORERS if name in names), *sorted(names - SCORERS.keys()))


def _means(records: Sequence[Record], scores: Sequence[str]) -> dict[str, float]:
    ordered = sorted(records, key=_key)  # a sum of floats depends on their order
    values = {name: [v for record in ordered if (v := measure_of(name)(record)) is not None] for name in scores}
    return {name: sum(each) / len(each) for name, each in values.items() if each}


# ---- one setting against another


@dataclass(frozen=True)
class Comparison:
    """One score of one task under `a` and under `b`, over the `n` questions that both answered.

    only_a, only_b, both, neither   how many questions are right so
    gain      mean of a - b: the paired bootstrap, what is hard about an image falls out of the difference
    looked    the same over the questions in which a look was taken under `a` ("gain given a look")
    p         of a two-sided paired test, None where there is nothing to compare
    group     of questions that are compared; "" for all
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
    group: str = ""


def compare(
    task: str,
    score: str,
    a: tuple[str, Sequence[PooledQuestion]],
    b: tuple[str, Sequence[PooledQuestion]],
    seed: int = 0,
) -> Comparison:
    """Compare two rows or looks, each its name and its questions, in one score."""
    measure, others = measure_of(score), {each.key: each for each in b[1]}
    pairs = [(each, each.value(measure), others[each.key].value(measure)) for each in a[1] if each.key in others]
    found = [(each, x, y) for each, x, y in pairs if x is not None and y is not None]
    right = Counter((x >= RIGHT, y >= RIGHT) for _, x, y in found)
    looked = [(each.image, x - y) for each, x, y in found if any(map(took_a_look, each.answers))]
    return Comparison(
        task,
        score,
        a[0],
        b[0],
        n=len(found),
        only_a=right[True, False],
        only_b=right[False, True],
        both=right[True, True],
        neither=right[False, False],
        gain=_mean([(each.image, x - y) for each, x, y in found], seed),
        looked=_mean(looked, seed),
        p=paired_test([(each.image, x, y) for each, x, y in found], seed),
    )


def compare_looks(records: Sequence[Record], seed: int = 0, by: Sequence[str] = ()) -> list[Comparison]:
    """Did the looks matter: every look of every task of one run against `none`, then the model's own looks against the
    same look with a part taken away (`WITHOUT`), in the task's first score. Empty for a task under one look only.

    Against `blank`, `random` or `clip-unconditioned`, the model's own look shows what is left of its gain when it sees
    nothing, something else, or features that do not depend on the question. Against `once`, what its further looks are
    worth. Then the same for each group of each of the groupings `by`.
    """
    found = list[Comparison]()
    for task in dict.fromkeys(record["task"] for record in records):
        looks: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            if record["task"] == task:
                looks[record["look"]].append(record)
        score = next((name for each in looks.values() for record in each for name in record["scores"]), None)
        if score is not None:
            pooled = {look: pool({"": each}) for look, each in looks.items()}
            found += [compare(task, score, (a, pooled[a]), (b, pooled[b]), seed) for a, b in _pairs(list(looks))]
    for group in map(grouping, by):
        parts = defaultdict[str | None, list[Record]](list)
        for record in records:
            parts[group(record)].append(record)
        for name in sorted(filter(None, parts)):
            found += [replace(each, group=name) for each in compare_looks(parts[name], seed)]
    return found


def _pairs(looks: Sequence[str]) -> list[tuple[str, str]]:
    plain = [(look, NONE) for look in looks if look != NONE and NONE in looks]
    own = [look for look in looks if look != NONE and look not in WITHOUT]
    return plain + [(look, less) for look in own for less in WITHOUT if less in looks and _comparable(look, less)]


def _comparable(look: str, less: str) -> bool:
    """Whether two settings differ in one part: a look and the same unconditioned; regions, and a free choice; a free
    choice and the same under an intervention.

    >>> _comparable("clip", "clip-unconditioned"), _comparable("region", "clip-unconditioned")
    (True, False)
    >>> _comparable("auto", "blurred"), _comparable("region", "blurred")
    (True, False)
    """
    if less in INTERVENED:
        return look == "auto"
    kind, _, unconditioned = less.partition("-")
    return look in (kind, "auto") if unconditioned else look in ("region", "auto")
