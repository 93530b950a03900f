"""A report as tables: for people as Markdown (`table_md`), and every number in long form (`table_csv`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any

from relook.evaluate.report.rows import FACTS, Report, Row
from relook.evaluate.results import Column, Table, cell, escaped, p_value, points, score_name
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.statistics import Estimate
from relook.evaluate.summary import BY_FIELD, Comparison
from relook.evaluate.tasks import named_task

# column heading -> its measure; the scores' columns stand before these
COLUMNS: dict[str, Column] = {
    "region recall %": ("recall", 100, 1, True),
    "first recall %": ("first_recall", 100, 1, True),
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

CAPTION = """\
Means, with 95 % intervals in brackets. An interval comes from 2,000 bootstrap resamples of the images, all questions of
an image drawn together, as percentiles. Where a row has several seeds (trainings), their answers to a question are
averaged first, so a question counts once; the intervals say what other pages would change, and the column of seeds
gives the lowest and highest exact match of the single seeds. Failed answers are counted under Notes and not scored.
Region recall is the share of the annotated area that was seen, IoU that of the cells named, both over the answers with
a region look. LM positions are token positions pushed through the language model for an answer; seconds are wall
time."""


def heading(report: Report, task: str) -> str:
    """`task`, and what it is where that is known."""
    known = named_task(task)
    return f"{task}: {known.about}" if known else task


def tables(report: Report, task: str) -> list[Table]:
    """All tables of a task: the rows, their paired differences, and every score and `BY_FIELD` by field; then by each
    group that is asked for, with the differences."""
    found = [_main(report, task), _differences(report, task)]
    measures = [*(score for score in report.scores(task) if score not in SPLIT_SCORES), *BY_FIELD]
    found += [_by_field(report, task, measure) for measure in measures]
    for by in report.by:
        found += [_by_field(report, task, measure, by) for measure in measures if by != "field"]
        found.append(_differences(report, task, by))
    return [table for table in found if table.lines]


def _main(report: Report, task: str) -> Table:
    scores = report.scores(task)
    there = {name for row in report.rows if task in row.results for name in row.results[task].measures}
    columns: dict[str, Column] = {f"{score_name(score)} %": (score, 100, 1, True) for score in scores}
    columns |= {name: column for name, column in COLUMNS.items() if column[0] in there}
    lines = []
    for row in report.shown(task):
        result = row.results.get(task)
        facts = [_fact(row.facts[name], form) for name, (_, form) in FACT_HEADINGS.items()]
        if result is None:
            cells = ["-", NOT_RUN, *("-" for _ in columns)]
        else:
            shown = [cell(result.measures.get(column[0]), column) for column in columns.values()]
            count = result.measures[scores[0]].n if scores[0] in result.measures else 0
            cells = [str(count), _seeds(result.seeds, scores[0]), *shown]
        lines.append((row.name, row.title, *cells, *facts))
    names = ("row", "what", "questions", "seeds", *columns, *(name for name, _ in FACT_HEADINGS.values()))
    return Table("", names, tuple(lines))


def _differences(report: Report, task: str, by: str = "") -> Table:
    """The paired comparisons of one task, a line a pair (and group); those that lack records stay, as not run."""
    scores = [score for score in report.scores(task) if score not in SPLIT_SCORES]
    groups = field_counts(report, task, scores[0], by) if by else [""]
    lines = []
    for (a, b), group in product(report.compare, groups):
        found = [each for each in report.differences if (each.task, each.group) == (task, group)]
        pair = {each.score: each for each in found if (each.a, each.b) == (a, b)}
        shown = [_difference(pair.get(score)) if pair else NOT_RUN for score in scores]
        count = str(max(each.n for each in pair.values())) if pair else "-"
        lines.append((f"{a} - {b}{group and ': '}{group}", *shown, count))
    names = ("difference", *(f"{score_name(score)}, points" for score in scores), "questions")
    text = (
        "Paired differences, question by question, over the questions that both rows answered (the same resampling; "
        "p: of a paired permutation test, the signs of an image together; McNemar's exact test for one right or wrong "
        "answer an image):"
    )
    return Table(f"{task}, the same by {by}:" if by else text, names, tuple(lines))


def _difference(found: Comparison | None) -> str:
    """A difference in points with its interval and the p of a paired test."""
    if found is None or found.gain.mean is None or found.p is None:
        return "-"
    p = p_value(found.p)
    return f"{points(found.gain)}, p {p if p.startswith('<') else f'= {p}'}"


def _by_field(report: Report, task: str, measure: str, by: str = "field") -> Table:
    """The rows that have the measure at all, by field, or by other groups."""
    counts = field_counts(report, task, measure, by)
    named = {name: heading for heading, (name, *_) in COLUMNS.items()}
    caption = f"{task}, {named.get(measure, score_name(measure) + ' %')} by {by}:"
    if len(counts) < (2 if by == "field" else 1):
        return Table(caption, (), ())
    lines = []
    for row in report.rows:
        found = {name: each.get(measure) for name, each in _parts(row, task, by).items()}
        if any(estimate is not None and estimate.n for estimate in found.values()):
            lines.append((row.name, row.title, *(cell(found.get(name), (measure, 100, 1, True)) for name in counts)))
    return Table(caption, ("row", "what", *(f"{name} (n = {n})" for name, n in counts.items())), tuple(lines))


def _parts(row: Row, task: str, by: str) -> Mapping[str, Mapping[str, Estimate]]:
    """The estimates of a row by field, or by other groups."""
    result = row.results.get(task)
    return {} if result is None else result.fields if by == "field" else result.groups.get(by, {})


def field_counts(report: Report, task: str, score: str, by: str = "field") -> dict[str, int]:
    """The fields (or other groups) of a task, sorted, and in each the most questions that any row has the score for."""
    counts: dict[str, int] = {}
    for row in report.rows:
        for name, scores in _parts(row, task, by).items():
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
    for score, count in result.missing.items():
        yield f"{row.name}, {task}: {count} answers have no {score_name(score)} score; its means leave them out."
    if result.found:
        yield f"{row.name}, {result.found}."
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


def _seeds(seeds: dict[str, dict[str, float]], score: str) -> str:
    values = [100 * means[score] for means in seeds.values() if score in means]
    return f"{len(seeds)} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else str(len(seeds))


def _fact(values: Sequence[float], form: Callable[[float], str]) -> str:
    texts = list(dict.fromkeys(form(value) for value in sorted(values)))
    return "-" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def table_md(report: Report) -> str:
    """The tables as Markdown."""
    parts = [f"# {report.title}", report.note, CAPTION]
    for task in report.tasks:
        parts.append(f"## {heading(report, task)}")
        for table in tables(report, task):
            parts += [table.caption, table.markdown()]
    lines = [f"- {escaped(note)}" for note in notes(report)]
    parts += ["## Notes", "\n".join(lines)] if lines else []
    return "\n\n".join(part for part in parts if part) + "\n"


# ---- the long form

CSV_COLUMNS = ("row", "title", "look", "task", "field", "against", "folder", "measure", "value", "low", "high", "n")


def table_csv(report: Report) -> str:
    """Every number, one a line: `CSV_COLUMNS`. Shares are 0 to 1; `n` is what was averaged (questions, or records).

    A line with `field` is of that field or group, with `folder` of one seed alone, with `against` the paired difference
    row - against; a task that a row did not run has the line `not run`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        for line in _row_lines(report, row):
            writer.writerow({"row": row.name, "title": row.title, "look": row.look, **line})
    for each in report.differences:
        row = report.row(each.a)
        line = {"task": each.task, "field": each.group, "against": each.b, "measure": each.score, **_numbers(each.gain)}
        writer.writerow({"row": row.name, "title": row.title, "look": row.look, **line})
    return text.getvalue()


def _row_lines(report: Report, row: Row) -> Iterator[dict[str, Any]]:
    for name in FACTS:
        known = len(row.facts[name]) == len(row.folders)  # one a folder, unless the row's own was taken
        folders = [folder.name for folder in row.folders] if known else []
        for place, fact in enumerate(row.facts[name]):
            yield {"measure": name, "value": fact, "folder": folders[place] if folders else ""}
    for task in report.tasks:
        result = row.results.get(task)
        if result is None:
            if report.planned:
                yield {"task": task, "measure": NOT_RUN}
            continue
        for measure, value in result.measures.items():
            yield {"task": task, "measure": measure, **_numbers(value)}
        groups = chain(*(found.items() for by, found in result.groups.items() if by != "field"))
        for name, scores in chain(result.fields.items(), groups):
            for score, value in scores.items():
                yield {"task": task, "field": name, "measure": score, **_numbers(value)}
        for folder, means in result.seeds.items():
            for score, mean in means.items():
                yield {"task": task, "folder": folder, "measure": score, "value": mean}
        counts = {name: getattr(result, name) for name in ("answered", "failed", "skipped", "images")}
        for name, count in counts.items():
            yield {"task": task, "measure": name, "value": count}


def _numbers(value: Estimate) -> dict[str, Any]:
    empty = value.mean is None
    return {"n": value.n} if empty else {"value": value.mean, "low": value.low, "high": value.high, "n": value.n}
