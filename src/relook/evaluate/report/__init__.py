"""Reports on evaluations: what is compared (`rows`), and the files that are written of it.

table.md   for people: a table per task, differences, tables by field, notes
table.csv  every number in long form, one a line
cost.png   accuracy against cost          fields.png   accuracy by field
report.html   all of it as a page, with a browser of the records
"""

from collections.abc import Callable
from pathlib import Path

from relook.evaluate.records import write_files
from relook.evaluate.report.figures import cost_png, fields_png
from relook.evaluate.report.page import IMAGES, page_html
from relook.evaluate.report.rows import Report, collect
from relook.evaluate.report.tables import table_csv, table_md

WRITERS: dict[str, Callable[[Report], bytes]] = {
    "table.md": lambda report: table_md(report).encode("utf-8", "backslashreplace"),
    "table.csv": lambda report: table_csv(report).encode("utf-8", "backslashreplace"),
    "cost.png": cost_png,
    "fields.png": fields_png,
}
PAGE = "report.html"

__all__ = ["IMAGES", "PAGE", "WRITERS", "Report", "collect", "page_html", "table_csv", "table_md", "write"]


def write(report: Report, out: str | Path, images: int | None = IMAGES) -> list[Path]:
    """Write every file of `WRITERS` into `out`, and the page with at most `images` pictures (None: no page at all).

    All are made before the first is written.

    Raises:
        UserError: matplotlib or Jinja is not installed, or `out` cannot be written.
    """
    contents = {Path(out) / name: writer(report) for name, writer in WRITERS.items()}
    if images is not None:
        contents[Path(out) / PAGE] = page_html(report, images)
    write_files(contents)
    return list(contents)
