"""The figures of a report's page: small SVGs by matplotlib, each readable on a narrow window, in the page's theme.

What has to be light or dark as the page is drawn in stand-in colours, which become the style sheet's variables. The
figures of `figures` are for documents; what they share is there.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from relook.evaluate.report import figures
from relook.evaluate.report.figures import (
    COLOURS,
    MARKERS,
    colour,
    cost_panel,
    label,
    plain_text,
    scaled,
    short,
    whiskers,
)
from relook.evaluate.report.heat_maps import Places
from relook.evaluate.report.rows import Report
from relook.evaluate.report.tables import field_counts, score_name

INK, SOFT, CARD = "#010203", "#666666", "#ffffff"  # stand-ins: SOFT and CARD are what `figures` draws with
THEME = {INK: "var(--ink)", SOFT: "var(--soft)", CARD: "var(--card)", figures.INK: "var(--ink)"}
SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "relook",  # the same report gives the same bytes
    "font.family": ["sans-serif"],
    "font.size": 10,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
}
WIDTH = 5.2  # inches
NAMED = 6  # the most points that have their names beside them; more are told apart by a key


@dataclass(frozen=True)
class Chart:
    """A figure: what it shows in words (its caption, and for those who do not see it), its SVG, and by colour the rows
    that it does not name itself."""

    about: str
    svg: str
    kind: str = ""
    key: tuple[tuple[int, str], ...] = ()


def bars(report: Report, task: str) -> Chart:
    """A bar a row: the score that decides, with its interval."""
    score = report.scores(task)[0]
    rows = [(place, row) for place, row in enumerate(report.rows) if task in row.results]
    with _drawing(WIDTH, 0.75 + 0.34 * max(len(rows), 1)) as (panel, done):
        for at, (place, row) in enumerate(rows):
            value = scaled(row.results[task].measures.get(score), 100)
            if value is None:
                continue
            panel.barh(at, value[0], 0.7, color=colour(place))
            panel.errorbar(value[0], at, xerr=whiskers(value), lw=1, capsize=2.5, color=INK)
            panel.annotate(f"{value[0]:.1f}", (max(value[2], value[0]), at), (5, 0), textcoords="offset points",
                           va="center", fontsize=9)  # fmt: skip
        panel.set_yticks(range(len(rows)), [short(row.name, 22) for _, row in rows])
        panel.invert_yaxis()
        panel.set_xlim(0, max(panel.get_xlim()[1] * 1.12, 5))
        panel.set_xlabel(f"{score_name(score)}, %")
        panel.grid(axis="x", alpha=0.25)
        panel.set_axisbelow(True)
    return Chart(f"{task}: {score_name(score)} of every row, with 95 % intervals", done())


def cost(report: Report, task: str) -> Chart:
    """Accuracy against token positions pushed through the language model."""
    with _drawing(WIDTH, 3.9) as (panel, done):
        points = cost_panel(panel, report, task)
        panel.set_title("", loc="left")
        if len(points) <= NAMED:
            panel.figure.draw_without_rendering()  # the layout is settled now
            label(panel, points)
    about = f"{task}: {score_name(report.scores(task)[0])} against what an answer costs, 95 % intervals"
    rows = tuple((place, row.name) for place, row in enumerate(report.rows) if task in row.results)
    return Chart(about, done(), key=rows if len(points) > NAMED else ())


def fields(report: Report, task: str) -> Chart | None:
    """A point a field and row; None where there are no several fields."""
    score = report.scores(task)[0]
    counts = field_counts(report, task, score)
    rows = [(place, row) for place, row in enumerate(report.rows) if task in row.results]
    if len(counts) < 2 or not rows:
        return None
    step = 0.8 / len(rows)
    with _drawing(WIDTH, 0.7 + len(counts) * max(0.28, 0.1 * len(rows) + 0.08)) as (panel, done):
        for slot, (place, row) in enumerate(rows):
            for at, name in enumerate(counts):
                value = scaled(row.results[task].fields.get(name, {}).get(score), 100)
                if value is not None:
                    panel.errorbar(value[0], at - 0.4 + (slot + 0.5) * step, xerr=whiskers(value), lw=1, capsize=0,
                                   fmt=MARKERS[place % len(MARKERS)], ms=5.5, color=colour(place), mec=CARD, mew=0.4,
                                   clip_on=False)  # fmt: skip
        for at in range(1, len(counts)):
            panel.axhline(at - 0.5, lw=0.5, color=SOFT, alpha=0.35)
        panel.set_yticks(range(len(counts)), [f"{short(name, 18)} ({count})" for name, count in counts.items()])
        panel.tick_params(axis="y", length=0)
        panel.set_ylim(len(counts) - 0.5, -0.5)
        panel.set_xlim(0, max(panel.get_xlim()[1], 5))
        panel.set_xlabel(f"{score_name(score)}, %")
        panel.grid(axis="x", alpha=0.25)
    about = f"{task}: {score_name(score)} by field (questions), with 95 % intervals"
    return Chart(about, done(), key=tuple((place, row.name) for place, row in rows))


def heat(places: Places) -> Chart:
    """Where on the page the boxes lay; over looks, a line around where half of the annotated boxes' peak is reached."""
    high = min(max(places.aspect, 0.5), 2.2)
    with _drawing(2.5, 2.3 * high + 0.1) as (panel, done):
        panel.imshow(places.density, cmap="magma", vmin=0, extent=(0, 1, 1, 0), interpolation="none", aspect="auto")
        if places.annotated is not None and places.annotated.max() > 0:
            centres = (np.arange(len(places.annotated)) + 0.5) / len(places.annotated)
            panel.contour(centres, centres, places.annotated, [places.annotated.max() / 2], colors="#35d0ba",
                          linewidths=1.6)  # fmt: skip
        panel.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    return Chart(places.about, done(), "heat")


@contextmanager
def _drawing(width: float, height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A panel of its own to draw on, and what makes an SVG of it once it is drawn on."""
    with plain_text(**SETTINGS):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        panel.spines[["top", "right"]].set_visible(False)
        made: list[str] = []
        yield panel, lambda: made[0]
        out = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
        made.append(_inline(out.getvalue()))


def _inline(text: str) -> str:
    """An SVG file as a part of a page: no head, no style for the whole page, no fixed size, colours of the theme."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<(metadata|defs)>\s*(<style.*?</style>)?\s*</\1>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    for stand_in, variable in THEME.items():
        svg = svg.replace(stand_in, variable)
    for place, each in enumerate(COLOURS):
        svg = svg.replace(each.lower(), f"var(--row-{place})")
    return svg


def unique(charts: list[Chart]) -> list[Chart]:
    """The same charts with ids that no two of them share."""
    found = []
    for number, chart in enumerate(charts):
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>c{number}-", chart.svg)
        found.append(replace(chart, svg=svg))
    return found
