"""A report as tables: headings and cells in words, which `writers` sets as Markdown and `page` as HTML.

Formats what `rows` collected; computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from relook.evaluate.report.rows import Report, Row
from relook.evaluate.results import COLUMNS as PRINTED
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.statistics import Estimate
from relook.evaluate.summary import BY_FIELD, Difference
from relook.evaluate.tasks import named_task

SCORE_NAMES = {score: name.removesuffix(" %") for name, (score, *_) in PRINTED.items()} | {"exact": "exact match"}
Column = tuple[str, float, int, bool]  # measure, factor, decimals, interval shown

# column heading -> its measure; the scores' columns stand before these
COLUMNS: dict[str, Column] = {
    "region recall %": ("recall", 100, 1, True),
    "IoU %": ("iou", 100, 1, True),
    "looked %": ("looked", 100, 1, False),
    "LM positions": ("lm_positions", 1, 0, False),
    "s / answer": ("seconds", 1, 2, False),
}
FACT_HEADINGS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f} M"),
    "samples": ("training samples", lambda value: f"{value:,.0f}"),
    "train_seconds": ("training s", lambda value: f"{value:,.0f}"),
}
NOT_RUN = "not run"
WORDS = ("row", "what", "difference")  # headings of columns that hold words; all others hold numbers

CAPTION = """\
Means, with 95 % intervals in brackets. An interval comes from 2,000 bootstrap resamples of the images, all questions of
an image drawn together, as percentiles. Where a row has several seeds (trainings), their answers to a question are
averaged first, so a question counts once; the intervals say what other pages would change, and the column of seeds
gives the lowest and highest exact match of the single seeds. Failed answers are counted under Notes and not scored.
Region recall is the share of the annotated area that was seen, IoU that of the cells named, both over the answers with
a region look. LM positions are token positions pushed through the language model for an answer; seconds are wall
time."""


@dataclass(frozen=True)
class Table:
    """A table: what stands above it, the columns' headings, and lines with a cell for each."""

    caption: str
    heading: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def heading(report: Report, task: str) -> str:
    """`task`, and what it is where that is known."""
    known = named_task(task)
    return f"{task}: {known.about}" if known else task


def tables(report: Report, task: str) -> list[Table]:
    """All tables of a task: the rows, their paired differences, and every score and `BY_FIELD` by field."""
    found = [_main(report, task), _differences(report, task)]
    by_field = [score for score in report.scores(task) if score not in SPLIT_SCORES]
    found += [_by_field(report, task, measure) for measure in (*by_field, *BY_FIELD)]
    return [table for table in found if table.lines]


def _main(report: Report, task: str) -> Table:
    scores = report.scores(task)
    columns: dict[str, Column] = {f"{score_name(score)} %": (score, 100, 1, True) for score in scores} | COLUMNS
    lines = []
    for row in report.shown(task):
        result = row.results.get(task)
        facts = [_fact(row.facts[name], form) for name, (_, form) in FACT_HEADINGS.items()]
        if result is None:
            cells = ["-", NOT_RUN, *("-" for _ in columns)]
        else:
            shown = [cell(result.measures.get(name), by, digits, wide) for name, by, digits, wide in columns.values()]
            count = result.measures[scores[0]].n if scores[0] in result.measures else 0
            cells = [str(count), _seeds(result.seeds, scores[0]), *shown]
        lines.append((row.name, row.title, *cells, *facts))
    names = ("row", "what", "questions", "seeds", *columns, *(name for name, _ in FACT_HEADINGS.values()))
    return Table("", names, tuple(lines))


def _differences(report: Report, task: str) -> Table:
    """The paired comparisons of one task, a line a pair; those that lack records stay, as not run."""
    scores = [score for score in report.scores(task) if score not in SPLIT_SCORES]
    found = [each for each in report.differences if each.task == task]
    lines = []
    for a, b in report.compare:
        pair = {each.measure: each for each in found if (each.a, each.b) == (a, b)}
        shown = [_difference(pair.get(score)) if pair else NOT_RUN for score in scores]
        count = str(max(each.estimate.n for each in pair.values())) if pair else "-"
        lines.append((f"{a} - {b}", *shown, count))
    names = ("difference", *(f"{score_name(score)}, points" for score in scores), "questions")
    text = (
        "Paired differences, question by question, over the questions that both rows answered (the same resampling; "
        "p: of a paired permutation test, the signs of an image together; McNemar's exact test for one right or wrong "
        "answer an image):"
    )
    return Table(text, names, tuple(lines))


def _difference(found: Difference | None) -> str:
    """A difference in points with its interval and the p of a paired test."""
    if found is None or found.estimate.mean is None or found.p is None:
        return "-"
    p = f"p = {found.p:.3f}" if found.p >= 0.001 else "p < 0.001"
    return f"{cell(found.estimate, 100, 1, True, signed=True)}, {p}"


def _by_field(report: Report, task: str, measure: str) -> Table:
    """The rows that have the measure at all, by field."""
    counts = field_counts(report, task, measure)
    named = {name: heading for heading, (name, *_) in COLUMNS.items()}
    caption = f"{task}, {named.get(measure, score_name(measure) + ' %')} by field:"
    if len(counts) < 2:
        return Table(caption, (), ())
    lines = []
    for row in report.rows:
        found = (
            {name: each.get(measure) for name, each in row.results[task].fields.items()} if task in row.results else {}
        )
        if any(estimate is not None and estimate.n for estimate in found.values()):
            lines.append((row.name, row.title, *(cell(found.get(name), 100, 1, True) for name in counts)))
    return Table(caption, ("row", "what", *(f"{name} (n = {n})" for name, n in counts.items())), tuple(lines))


def field_counts(report: Report, task: str, score: str) -> dict[str, int]:
    """The fields of a task, sorted, and in each the most questions that any row has the score for."""
    counts: dict[str, int] = {}
    for row in report.rows:
        for name, scores in row.results[task].fields.items() if task in row.results else ():
            counts[name] = max(counts.get(name, 0), scores[score].n if score in scores else 0)
    return dict(sorted(counts.items()))


def notes(report: Report) -> Iterator[str]:
    """What a reader of the tables must know besides."""
    for row in report.rows:
        if row.missing:
            yield f"{row.name} was not run: {row.missing}."
        for task in row.results:
            yield from _row_notes(report, row, task)
    for machine, names in machines(report).items():
        yield f"{machine}: {', '.join(names)}."


def _row_notes(report: Report, row: Row, task: str) -> Iterator[str]:
    result = row.results[task]
    if result.failed or result.skipped:
        first = f"; first failure: {result.errors[0]}" if result.errors else ""
        yield (
            f"{row.name}, {task}: {result.answered} answered, {result.failed} failed, "
            f"{result.skipped} skipped (the look does not apply){first}"
        )
    for score, count in result.unscored.items():
        yield f"{row.name}, {task}: {count} answers have no {score_name(score)} score; its means leave them out."
    if result.uneven:
        yield f"{row.name}, {task}: the seeds were asked different questions, so their means do not compare."
    main = result.measures.get(report.scores(task)[0])
    if main is not None and main.n and main.low == main.high:
        away = min(3 / result.images, 1)
        yield (
            f"{row.name}, {task}: every resample gives the same share, so the interval has no width; the true "
            f"share may be {100 * away:.1f} points away (rule of three, {result.images} images)."
        )


def machines(report: Report) -> dict[str, list[str]]:
    """Rows by the machine on which they were evaluated, in words."""
    found: dict[str, list[str]] = {}
    for row in report.run:
        for folder in row.folders:
            facts = folder.run.get("machine") or {}
            text = ", ".join(f"{key} {value}" for key, value in facts.items()) or "a machine that was not recorded"
            names = found.setdefault(f"Evaluated on {text}", [])
            names += [row.name] if row.name not in names else []
    return found


def score_name(score: str) -> str:
    """A score as people call it; its own name where none is known."""
    return SCORE_NAMES.get(score, score)


def cell(value: Estimate | None, factor: float, digits: int, interval: bool, signed: bool = False) -> str:
    """An estimate as text, "-" where there was nothing to average.

    >>> cell(Estimate(0.125, 0.05, 0.25, 8), 100, 1, True)
    '12.5 (5.0-25.0)'
    """
    if value is None or value.mean is None or value.low is None or value.high is None:
        return "-"
    sign, to = ("+", " to ") if signed else ("", "-")
    mean, low, high = (f"{each * factor:{sign}.{digits}f}" for each in (value.mean, value.low, value.high))
    return f"{mean} ({low}{to}{high})" if interval else mean


def _seeds(seeds: dict[str, dict[str, float]], score: str) -> str:
    values = [100 * means[score] for means in seeds.values() if score in means]
    return f"{len(seeds)} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else str(len(seeds))


def _fact(values: Sequence[float], form: Callable[[float], str]) -> str:
    texts = list(dict.fromkeys(form(value) for value in sorted(values)))
    return "-" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"
