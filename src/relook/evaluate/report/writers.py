"""A report as files. A file is a row of `WRITERS`: its name, and the function that makes its bytes from a `Report`.

    table.md   for people: a table per task, differences, tables by field, notes
    table.csv  every number in long form, one a line
    cost.png   accuracy against cost          fields.png   accuracy by field
    report.html   all of it as a page, with a browser of the records (`relook.evaluate.report`)

Formats what `rows` collected; computes nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from relook.evaluate.records import write_bytes
from relook.evaluate.report import IMAGES, page_html
from relook.evaluate.report.figures import cost_png, fields_png
from relook.evaluate.report.rows import FACTS, Report, Row
from relook.evaluate.report.tables import CAPTION, NOT_RUN, WORDS, Table, heading, notes, tables
from relook.evaluate.statistics import Estimate


def table_md(report: Report) -> str:
    """The tables as Markdown."""
    parts = [f"# {report.title}", report.note, CAPTION]
    for task in report.tasks:
        parts.append(f"## {heading(report, task)}")
        for table in tables(report, task):
            parts += [table.caption, _grid(table)]
    told = list(notes(report))
    parts += ["## Notes", "\n".join(f"- {_plain(note)}" for note in told)] if told else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid(table: Table) -> str:
    rule = ["---" if name in WORDS else "---:" for name in table.heading]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in [table.heading, rule, *table.lines])


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
            if report.planned:
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
PAGE = "report.html"


def write(report: Report, out: str | Path, images: int | None = IMAGES) -> list[Path]:
    """Write every file of `WRITERS` into `out`, and the page with at most `images` pictures (None: no page at all).

    All are made before the first is written.

    Raises:
        UserError: matplotlib is not installed, or `out` cannot be written.
    """
    contents = {Path(out) / name: writer(report) for name, writer in WRITERS.items()}
    if images is not None:
        contents[Path(out) / PAGE] = page_html(report, images)
    write_bytes(contents)
    return list(contents)
