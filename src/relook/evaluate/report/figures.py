"""The figures of a report, by matplotlib: cost.png and fields.png for documents, and small SVGs for the page.

matplotlib is imported when a figure is drawn, never before, and its global state (pyplot) is not used. In an SVG, what
has to be light or dark as the page is drawn in stand-in colors, which become the style sheet's variables.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from relook.errors import UserError
from relook.evaluate.report.heat_maps import HeatMap
from relook.evaluate.report.rows import Report, Row
from relook.evaluate.report.tables import field_counts
from relook.evaluate.results import score_name
from relook.evaluate.statistics import Estimate

# Six of Okabe and Ito's colors, told apart with any color vision, and four more for long reports; markers differ too.
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#7A5195", "#999999", "#444444", "#B8A000")
MARKERS = "osD^vh>p<*"
INK, SOFT, CARD = "#010203", "#666666", "#ffffff"  # text and lines, quiet lines, paper: variables of the page's theme
THEME = {INK: "var(--ink)", SOFT: "var(--soft)", CARD: "var(--card)"}
SETTINGS: Any = {
    "text.parse_math": False,  # a name is written as it is, dollar signs and all
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "relook",  # the same report gives the same bytes
    "font.family": ["sans-serif"],
    "font.size": 10,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
}
DPI, WIDTH = 150, 5.2  # of PNGs; inches of a panel
NAMED = 6  # the most points that have their names beside them; more are told apart by the key or legend
Interval = tuple[float, float, float]  # mean, low, high
Draw = Callable[[Any, Report, str], None]  # (matplotlib axes, report, task)


# ---- panels: one task each


def bars_panel(panel: Any, report: Report, task: str) -> None:
    """A bar a row: the score that decides (%), with its interval."""
    score, rows = report.scores(task)[0], _rows(report, task)
    for at, (place, row) in enumerate(rows):
        value = _numbers(row.results[task].measures.get(score), 100)
        if value is not None:
            panel.barh(at, value[0], 0.7, color=color(place))
            panel.errorbar(value[0], at, xerr=whiskers(value), lw=1, capsize=2.5, color=INK)
            panel.annotate(f"{value[0]:.1f}", (max(value[2], value[0]), at), (5, 0), textcoords="offset points",
                           va="center", fontsize=9)  # fmt: skip
    panel.set_yticks(range(len(rows)), [short(row.name, 22) for _, row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, max(panel.get_xlim()[1] * 1.12, 5))
    panel.set_xlabel(f"{score_name(score)}, %")
    panel.grid(axis="x", alpha=0.25)
    panel.set_axisbelow(True)


def cost_panel(panel: Any, report: Report, task: str) -> None:
    """Score (y, %) against LM positions an answer (x): a point a row, with 95 % intervals."""
    score, rows, furthest = report.scores(task)[0], _rows(report, task), 0.0
    for place, row in rows:
        measures = row.results[task].measures
        x, y = _numbers(measures.get("lm_positions")), _numbers(measures.get(score), 100)
        if x is None or y is None:
            continue
        furthest = max(furthest, x[2])
        panel.errorbar(x[0], y[0], xerr=whiskers(x), yerr=whiskers(y), fmt=marker(place), ms=7, lw=1.1, capsize=2.5,
                       color=color(place), mec=CARD, mew=0.6)  # fmt: skip
        if len(rows) <= NAMED:
            panel.annotate(short(row.name), (x[0], y[0]), (7, 5), textcoords="offset points", fontsize=9.5,
                           color=color(place), weight="bold")  # fmt: skip
    panel.set_xlabel("LM positions per answer")
    panel.set_ylabel(f"{score_name(score)}, %")
    panel.set_xlim(0, 1.12 * furthest or 1.0)
    top = min(max(panel.get_ylim()[1] * 1.05, 5.0), 104.0)  # of an axis of percentages: a little air
    panel.set_ylim(-0.05 * top, top)  # room under zero, so that a point there is whole
    panel.axhline(0, lw=0.8, color=SOFT, zorder=0)
    panel.grid(alpha=0.25)


def fields_panel(panel: Any, report: Report, task: str) -> None:
    """A line a field, a point a row: the score that decides (%), with its interval."""
    score, rows = report.scores(task)[0], _rows(report, task)
    counts = field_counts(report, task, score)
    step = 0.8 / max(len(rows), 1)
    for slot, (place, row) in enumerate(rows):
        for at, name in enumerate(counts):
            value = _numbers(row.results[task].fields.get(name, {}).get(score), 100)
            if value is not None:
                panel.errorbar(value[0], at - 0.4 + (slot + 0.5) * step, xerr=whiskers(value), lw=1, capsize=0,
                               fmt=marker(place), ms=5.5, color=color(place), mec=CARD, mew=0.4,
                               clip_on=False)  # fmt: skip
    for at in range(1, len(counts)):
        panel.axhline(at - 0.5, lw=0.5, color=SOFT, alpha=0.35)
    panel.set_yticks(range(len(counts)), [f"{short(name, 18)} ({count})" for name, count in counts.items()])
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(max(len(counts), 1) - 0.5, -0.5)
    panel.set_xlim(0, max(panel.get_xlim()[1], 5))
    panel.set_xlabel(f"{score_name(score)}, %")
    panel.grid(axis="x", alpha=0.25)


def _fields_height(report: Report, task: str) -> float:
    """Inches of a `fields_panel`."""
    fields = len(field_counts(report, task, report.scores(task)[0]))
    return 0.7 + fields * max(0.28, 0.1 * len(_rows(report, task)) + 0.08)


def _rows(report: Report, task: str) -> list[tuple[int, Row]]:
    """The rows that have results for a task, with their number in the report."""
    return [(place, row) for place, row in enumerate(report.rows) if task in row.results]


# ---- files for documents


def cost_png(report: Report) -> bytes:
    """A `cost_panel` for each task, side by side."""
    with _matplotlib():
        return _png(_document(report, cost_panel, 4.6))


def fields_png(report: Report) -> bytes:
    """A `fields_panel` for each task, side by side."""
    with _matplotlib():
        return _png(fields_figure(report))


def fields_figure(report: Report) -> Any:
    return _document(report, fields_panel, max(2.5, *(_fields_height(report, task) for task in report.tasks)))


def _document(report: Report, draw: Draw, height: float) -> Any:
    """A figure of a panel for each task, `height` inches high, with a legend of all rows under them."""
    from matplotlib.lines import Line2D

    width = WIDTH * len(report.tasks)
    columns = max(1, int(width // 4.5))
    figure = _figure(width, height + 0.22 * math.ceil(len(report.rows) / columns) + 0.5, DPI)
    panels = figure.subplots(1, len(report.tasks), squeeze=False).flat
    for panel, task in zip(panels, report.tasks, strict=True):
        draw(panel, report, task)
        panel.set_title(short(task, 60), loc="left", fontsize=11, weight="bold")
        panel.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], ls="", marker=marker(place), ms=7, color=color(place), mec=CARD, mew=0.6)
        for place in range(len(report.rows))
    ]
    names = [_entry(row) for row in report.rows]
    figure.legend(handles, names, loc="outside lower center", fontsize=8.5, ncols=columns, frameon=False)
    return figure


def panels_png(panels: Sequence[tuple[str, Callable[[Any], None]]], height: float) -> bytes:
    """Panels side by side, each its title and what draws it, `height` inches high."""
    with _matplotlib():
        figure = _figure(WIDTH * len(panels), height, DPI)
        for panel, (title, draw) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            draw(panel)
            panel.set_title(short(title, 60), loc="left", fontsize=11, weight="bold")
            panel.spines[["top", "right"]].set_visible(False)
        return _png(figure)


def _entry(row: Row) -> str:
    text = row.title if row.title == row.name else f"{row.name}: {row.title}"
    return short(text, 70) + ("" if row.results else " (not run)")


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


# ---- figures of the page


@dataclass(frozen=True)
class Chart:
    """A figure: what it shows in words (its caption, and for those who do not see it), its SVG, and by number the rows
    that it does not name itself."""

    about: str
    svg: str
    kind: str = ""
    key: tuple[tuple[int, str], ...] = ()


def charts(report: Report, task: str) -> list[Chart]:
    """The figures of a task: all rows, accuracy against cost, and by field where there are several fields."""
    rows = _rows(report, task)
    if not rows:
        return []
    score = report.scores(task)[0]
    names = tuple((place, row.name) for place, row in rows)

    def chart(draw: Draw, height: float, about: str, keyed: bool = True) -> Chart:
        svg = _svg(WIDTH, height, lambda panel: draw(panel, report, task))
        return Chart(f"{task}: {score_name(score)} {about}", svg, key=names if keyed else ())

    found = [
        chart(bars_panel, 0.75 + 0.34 * len(rows), "of every row, with 95 % intervals", False),
        chart(cost_panel, 3.9, "against what an answer costs, 95 % intervals", len(rows) > NAMED),
    ]
    if len(field_counts(report, task, score)) > 1:
        found.append(chart(fields_panel, _fields_height(report, task), "by field (questions), with 95 % intervals"))
    return found


def heat(found: HeatMap) -> Chart:
    """Where on the page the boxes lay; over looks, a line around where half of the annotated boxes' peak is reached."""
    high = min(max(found.aspect, 0.5), 2.2)

    def draw(panel: Any) -> None:
        panel.imshow(found.density, cmap="magma", vmin=0, extent=(0, 1, 1, 0), interpolation="none", aspect="auto")
        if found.annotated is not None and found.annotated.max() > 0:
            centers = (np.arange(len(found.annotated)) + 0.5) / len(found.annotated)
            panel.contour(centers, centers, found.annotated, [found.annotated.max() / 2], colors="#35d0ba",
                          linewidths=1.6)  # fmt: skip
        panel.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))

    return Chart(found.about, _svg(2.5, 2.3 * high + 0.1, draw), "heat")


def unique(charts: Sequence[Chart]) -> list[Chart]:
    """The same charts with ids that no two of them share."""
    ids = re.compile(r'(\bid="|href="#|url\(#)')
    return [replace(chart, svg=ids.sub(rf"\g<1>c{number}-", chart.svg)) for number, chart in enumerate(charts)]


def _svg(width: float, height: float, draw: Callable[[Any], None]) -> str:
    """What `draw` draws on a panel of its own, as SVG."""
    with _matplotlib():
        figure = _figure(width, height, 72)
        panel = figure.subplots()
        panel.spines[["top", "right"]].set_visible(False)
        draw(panel)
        out = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    return _inline(out.getvalue())


def _inline(text: str) -> str:
    """An SVG file as a part of a page: no head, no style for the whole page, no fixed size, colors of the theme."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<(metadata|defs)>\s*(<style.*?</style>)?\s*</\1>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    for stand_in, variable in THEME.items():
        svg = svg.replace(stand_in, variable)
    for place, each in enumerate(COLORS):
        svg = svg.replace(each.lower(), f"var(--row-{place})")
    return svg


# ---- parts


@contextmanager
def _matplotlib() -> Iterator[None]:
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("the figures need matplotlib, which is not installed; pip install 'relook[eval]'") from None
    with rc_context(SETTINGS):
        yield


def _figure(width: float, height: float, dpi: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _numbers(value: Estimate | None, factor: float = 1) -> Interval | None:
    return None if value is None else value.scaled(factor)


def whiskers(value: Interval) -> list[list[float]]:
    """Lengths below and above the mean; a ratio's mean may lie a rounding error outside its interval."""
    mean, low, high = value
    return [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]


def short(name: str, most: int = 24) -> str:
    """A name in one line that can be drawn (no half characters), its middle left out where it is long."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]
