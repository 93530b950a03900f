"""A report as files. A file is a row of `WRITERS`: its name, and the function that makes its bytes from a `Report`.

    table.md   for people: a table per task, differences, tables by field, notes
    table.csv  every number in long form, one a line
    cost.png   accuracy against cost          fields.png   accuracy by field

Formats what `rows` collected; computes nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from relook.evaluate.figures import cost_png, fields_png
from relook.evaluate.folders import write_bytes
from relook.evaluate.metrics import SCORERS, Estimate
from relook.evaluate.rows import FACTS, Report, Row
from relook.evaluate.tasks import TASKS

SCORE_NAMES = {"exact": "exact match", "anls": "ANLS"}

# column heading -> measure, factor, decimals, interval shown
MAIN: dict[str, tuple[str, float, int, bool]] = {
    "exact match %": ("exact", 100, 1, True),
    "ANLS %": ("anls", 100, 1, True),
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

CAPTION = """\
Means, with 95 % intervals in brackets. An interval comes from 2,000 bootstrap resamples of the images, all questions of
an image drawn together, as percentiles. Where a row has several seeds (trainings), their answers to a question are
averaged first, so a question counts once; the intervals say what other pages would change, and the column of seeds
gives the lowest and highest exact match of the single seeds. Failed answers are counted under Notes and not scored.
Region recall is the share of the annotated area that was seen, IoU that of the cells named, both over the answers with
a region look. LM positions are token positions pushed through the language model for an answer; seconds are wall
time."""


def table_md(report: Report) -> str:
    """The tables as Markdown."""
    parts = [f"# {report.title}", report.note, CAPTION]
    for task in report.tasks:
        about = f": {TASKS[task].about}" if task in TASKS else ""
        parts += [f"## {task}{about}", _main_table(report, task)]
        parts += [_differences(report, task)]
        parts += [_field_table(report, task, score) for score in SCORERS]
    notes = list(_notes(report))
    parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in notes)] if notes else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _main_table(report: Report, task: str) -> str:
    heading = ["row", "what", "questions", "seeds", *MAIN, *(name for name, _ in FACT_HEADINGS.values())]
    lines = []
    for row in report.rows:
        result = row.results.get(task)
        facts = [_fact(row.facts[name], form) for name, (_, form) in FACT_HEADINGS.items()]
        if result is None:
            cells = ["-", NOT_RUN, *("-" for _ in MAIN)]
        else:
            shown = [
                cell(result.measures[name], factor, digits, interval)
                for name, factor, digits, interval in MAIN.values()
            ]
            cells = [str(result.measures["exact"].n), _seeds(result.seeds), *shown]
        lines.append([row.name, row.title, *cells, *facts])
    return _grid(heading, lines)


def _differences(report: Report, task: str) -> str:
    """The paired comparisons of one task, a line a pair; those that lack records stay, as not run."""
    found = [each for each in report.differences if each.task == task]
    lines = []
    for a, b in report.compare:
        pair = {each.measure: each.estimate for each in found if (each.a, each.b) == (a, b)}
        shown = [cell(pair[score], 100, 1, True, signed=True) if pair else NOT_RUN for score in SCORERS]
        lines.append([f"{a} - {b}", *shown, str(pair["exact"].n) if pair else "-"])
    heading = ["difference", *(f"{SCORE_NAMES[score]}, points" for score in SCORERS), "questions"]
    text = "Paired differences, question by question, over the questions that both rows answered (the same resampling):"
    return f"{text}\n\n{_grid(heading, lines)}" if lines else ""


def _field_table(report: Report, task: str, score: str) -> str:
    results = [(row, row.results[task]) for row in report.rows if task in row.results]
    counts: dict[str, int] = {}
    for _, result in results:
        for name, scores in result.fields.items():
            counts[name] = max(counts.get(name, 0), scores[score].n)
    if len(counts) < 2:
        return ""
    names = sorted(counts)
    lines = [
        [row.name, row.title, *(cell(result.fields.get(name, {}).get(score), 100, 1, True) for name in names)]
        for row, result in results
    ]
    heading = ["row", "what", *(f"{name} (n = {counts[name]})" for name in names)]
    return f"{task}, {SCORE_NAMES[score]} % by field:\n\n{_grid(heading, lines)}"


def _notes(report: Report) -> Iterator[str]:
    """What a reader of the tables must know besides."""
    for row in report.rows:
        if row.missing:
            yield f"{row.name} was not run: {row.missing}."
        for task, result in row.results.items():
            if result.failed or result.skipped:
                first = f"; first failure: {result.errors[0]}" if result.errors else ""
                yield (
                    f"{row.name}, {task}: {result.answered} answered, {result.failed} failed, "
                    f"{result.skipped} skipped (the look does not apply){first}"
                )
            if result.uneven:
                yield f"{row.name}, {task}: the seeds were asked different questions, so their means do not compare."
            exact = result.measures["exact"]
            if exact.n and exact.low == exact.high:
                away = min(3 / result.images, 1)
                yield (
                    f"{row.name}, {task}: every resample gives the same share, so the interval has no width; the true "
                    f"share may be {100 * away:.1f} points away (rule of three, {result.images} images)."
                )
    for machine, names in machines(report).items():
        yield f"{machine}: {', '.join(names)}."


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


def _seeds(seeds: dict[str, dict[str, float]]) -> str:
    values = [100 * means["exact"] for means in seeds.values() if "exact" in means]
    return f"{len(seeds)} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else str(len(seeds))


def _fact(values: Sequence[float], form: Callable[[float], str]) -> str:
    texts = list(dict.fromkeys(form(value) for value in sorted(values)))
    return "-" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def _grid(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if name in ("row", "what", "difference") else "---:" for name in heading]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in [heading, rule, *lines])


def _plain(text: str) -> str:
    """One line, with nothing in it that Markdown would take for the end of a cell or for a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---- the long form

CSV_COLUMNS = ("row", "title", "look", "task", "field", "against", "folder", "measure", "value", "low", "high", "n")


def table_csv(report: Report) -> str:
    """Every number, one a line: `CSV_COLUMNS`. Shares are 0 to 1; `n` is what was averaged (questions, or records).

    A line with `field` is of that field, with `folder` of one seed alone, with `against` the paired difference
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
        line = {"task": each.task, "against": each.b, "measure": each.measure, **_numbers(each.estimate)}
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
            yield {"task": task, "measure": NOT_RUN}
            continue
        for measure, value in result.measures.items():
            yield {"task": task, "measure": measure, **_numbers(value)}
        for name, scores in result.fields.items():
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


WRITERS: dict[str, Callable[[Report], bytes]] = {
    "table.md": lambda report: table_md(report).encode(),
    "table.csv": lambda report: table_csv(report).encode(),
    "cost.png": cost_png,
    "fields.png": fields_png,
}


def write(report: Report, out: str | Path) -> list[Path]:
    """Write every file of `WRITERS` into `out`; all are made before the first is written.

    Raises:
        UserError: matplotlib is not installed, or `out` cannot be written.
    """
    contents = {Path(out) / name: writer(report) for name, writer in WRITERS.items()}
    write_bytes(contents)
    return list(contents)
