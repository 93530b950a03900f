"""A report as one HTML page with everything in it: tables, figures, heat maps, and a browser of the records.

The page fetches nothing, and its content security policy forbids it to. Text of records reaches it escaped by the
template (report.html.jinja), or as JSON that report.js puts into text nodes; the only script that may run is report.js,
by its hash. Without JavaScript, tables and figures stand and the browser of records says what it lacks.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.errors import UserError
from relook.evaluate.report import figures
from relook.evaluate.report.browser import browser_data
from relook.evaluate.report.heat_maps import heat_maps
from relook.evaluate.report.pictures import SIDE, Pictures
from relook.evaluate.report.rows import Report
from relook.evaluate.report.tables import CAPTION, NOT_RUN, heading, notes, tables
from relook.evaluate.results import WORDS, Table

HERE = Path(__file__).parent
IMAGES = 100  # pictures on a page by default: some five megabytes


def page_html(report: Report, images: int = IMAGES, first: Mapping[str, Sequence[Table]] | None = None) -> bytes:
    """The page, with at most `images` pictures in it; `first`: tables that stand before the others of a task.

    Raises:
        UserError: matplotlib or Jinja is not installed.
    """
    data, pictures = browser_data(report, images)
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    tasks = [_task(report, task, pictures, (first or {}).get(task, ())) for task in report.tasks]
    every = iter(figures.unique([chart for task in tasks for chart in (*task["charts"], *task["heat"])]))
    for task in tasks:
        task["charts"], task["heat"] = ([next(every) for _ in task[name]] for name in ("charts", "heat"))
    text = _template().render(
        report=report,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=script,
        tasks=tasks,
        caption=CAPTION,
        notes=list(notes(report)),
        runs=[(folder.name, list(_facts(folder.run))) for folder in report.folders],
        answers=len(data["answers"]),
        questions=len(data["questions"]),
        images_note=_images_note(pictures),
        data=_json(data),
    )
    return text.encode("utf-8", "replace")


def _task(report: Report, task: str, pictures: Pictures, first: Sequence[Table]) -> dict[str, Any]:
    maps, left = heat_maps(report, task, pictures)
    return {
        "name": task,
        "heading": heading(report, task),
        "tables": [_table(report, table) for table in (*first, *tables(report, task))],
        "charts": figures.charts(report, task),
        "heat": [figures.heat(each) for each in maps],
        "left": left,
    }


def _table(report: Report, table: Table) -> dict[str, Any]:
    """A table with its cells as (number, interval, whether it is words); `place` is the row's color."""
    names = [row.name for row in report.rows]
    words = [name in WORDS for name in table.heading]
    lines = []
    for line in table.lines:
        cells = []
        for text, word in zip(line, words, strict=True):
            number, bracket, rest = (text, "", "") if word else text.partition(" (")
            cells.append((number, bracket.strip() + rest, word))
        lines.append((names.index(line[0]) if line[0] in names else None, cells, NOT_RUN in line))
    return {"caption": table.caption, "heading": list(zip(table.heading, words, strict=True)), "lines": lines}


def _facts(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was run, in words."""
    for name, value in run.items():
        if isinstance(value, Mapping):
            inner = ((key, json.dumps(each) if isinstance(each, dict) else each) for key, each in value.items())
            yield name, ", ".join(f"{key} {each}" for key, each in inner)
        elif value is not None:
            yield name, str(value)


def _images_note(pictures: Pictures) -> str:
    """Which images are on the page and which are not, in a sentence."""
    missing = len(pictures.why)
    every = len(pictures.shown) + missing + pictures.left
    text = f"{len(pictures.shown)} of {every} images are on this page, at most {SIDE} pixels a side."
    if pictures.left:
        text += f" {pictures.left} were left out to keep it small: relook report --images {every} puts all of them in."
    if missing:
        why, count = Counter(pictures.why.values()).most_common(1)[0]
        text += f" {missing} could not be shown: {why}" + (f" ({count} of them)." if count < missing else ".")
    return text


def _json(data: Any) -> str:
    """JSON that can stand in a script element: pure ASCII, and nothing in it opens or closes a tag or a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _template() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("the page needs Jinja, which is not installed; pip install 'relook[eval]'") from None
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
