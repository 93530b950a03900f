"""The two pictures of a report, drawn by matplotlib's Agg into PNG bytes. Without matplotlib: a UserError that says so.

matplotlib is imported when a picture is drawn, never before, and its global state (pyplot) is not used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import islice, product
from typing import Any

from relook.errors import UserError
from relook.evaluate.report.rows import Report, Row
from relook.evaluate.report.tables import field_counts, score_name
from relook.evaluate.statistics import Estimate

# Six of Okabe and Ito's colours, told apart with any colour vision, and four more for long reports; markers differ too.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#7A5195", "#999999", "#444444", "#B8A000")
MARKERS = "osD^vh>p<*"
GREY, INK, EDGE = "#666666", "#222222", "#ffffff"
DPI = 150
FIELDS_WIDTH, FIELD_SIZE = 9.5, 8.5  # inches; points
BAR, LETTER = 8.0, 5.2  # points: the least room a bar with its name has, and what a letter of a field's name takes
Rectangle = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, y upwards
Interval = tuple[float, float, float]  # mean, low, high
Point = tuple[Interval, Interval, str, str]  # x, y, name, colour
MARKER, LABEL_ROOM = 10.0, 3.0  # pixels: half the side of a point's square, and what is kept free around a label


def cost_png(report: Report) -> bytes:
    """Score (y, %) against LM positions an answer (x): a panel a task, a labelled point a row, 95 % intervals."""
    with plain_text():
        figure, panels = _figure(report, 1, max(len(report.tasks), 1), (5.2, 4.6))
        points = [cost_panel(panel, report, task) for panel, task in zip(panels, report.tasks, strict=False)]
        _legend(figure, report, _dot)
        figure.draw_without_rendering()  # the layout is settled now: what is placed in pixels stays
        for panel, each in zip(panels, points, strict=False):
            label(panel, each)
        return _png(figure)


def cost_panel(panel: Any, report: Report, task: str) -> list[Point]:
    """One task's rows as points; what comes back is for `label`, once the layout is settled."""
    score, points = report.scores(task)[0], []
    for place, row in enumerate(report.rows):
        measures = row.results[task].measures if task in row.results else {}
        x, y = scaled(measures.get("lm_positions")), scaled(measures.get(score), 100)
        if x is None or y is None:
            continue
        panel.errorbar(
            x[0], y[0], xerr=whiskers(x), yerr=whiskers(y), fmt=MARKERS[place % len(MARKERS)],
            ms=7, lw=1.1, capsize=2.5, color=colour(place), mec=EDGE, mew=0.6,
        )  # fmt: skip
        points.append((x, y, short(row.name), colour(place)))
    panel.set_title(short(task, 60), loc="left", fontsize=11, weight="bold")
    panel.set_xlabel("LM positions per answer")
    panel.set_ylabel(f"{score_name(score)}, %")
    panel.set_xlim(0, 1.12 * max((x[2] for x, *_ in points), default=1.0))
    top = _top(panel.get_ylim()[1])
    panel.set_ylim(-0.05 * top, top)  # room under zero, so that a point there is whole and has a name beside it
    panel.axhline(0, lw=0.8, color=GREY, zorder=0)
    panel.grid(alpha=0.25)
    return points


def fields_png(report: Report) -> bytes:
    """Score by field (%): a group of bars a field, a bar a row, 95 % intervals; a panel a task, or several where its
    bars would be too narrow for their names."""
    with plain_text():
        return _png(fields_figure(report))


def fields_figure(report: Report) -> Any:
    """`fields_png` before it is a picture."""
    plan = [part for task in report.tasks for part in _field_parts(report, task)]
    figure, panels = _figure(report, max(len(plan), 1), 1, (FIELDS_WIDTH, 3.1))
    for panel, (task, title, fields) in zip(panels, plan, strict=False):
        _field_panel(panel, report, task, title, fields)
    _legend(figure, report, _patch)
    return figure


def _field_parts(report: Report, task: str) -> list[tuple[str, str, dict[str, int]]]:
    """(task, title, fields with their numbers of questions) of each panel: even parts in which every name has room."""
    counts = field_counts(report, task, report.scores(task)[0])
    if not counts:
        return [(task, f"{task}: no questions with a field", {})]
    points = 72 * (FIELDS_WIDTH - 0.8)
    bars = max(sum(task in row.results for row in report.rows), 1)
    longest = max(len(name) for name in counts)
    most = max(int(points / max(BAR * bars / 0.84, LETTER * (longest + 1))), 1)
    parts = math.ceil(len(counts) / most)
    each = math.ceil(len(counts) / parts)
    names = [list(islice(counts, start, start + each)) for start in range(0, len(counts), each)]
    return [
        (task, task if not i else f"{task}, continued", {n: counts[n] for n in some}) for i, some in enumerate(names)
    ]


def _field_panel(panel: Any, report: Report, task: str, title: str, fields: dict[str, int]) -> None:
    score = report.scores(task)[0]
    rows = [(place, row, row.results[task]) for place, row in enumerate(report.rows) if task in row.results]
    width = 0.84 / max(len(rows), 1)
    for slot, (place, row, result) in enumerate(rows):
        for group, name in enumerate(fields):
            value = scaled(result.fields.get(name, {}).get(score), 100)
            if value is not None:
                at = group - 0.42 + (slot + 0.5) * width
                panel.bar(at, value[0], width * 0.92, color=colour(place))
                if not value[0]:  # a bar without height is seen too
                    ends = at - 0.46 * width, at + 0.46 * width
                    panel.plot(ends, (0, 0), lw=2.5, color=colour(place), solid_capstyle="butt")
                panel.errorbar(at, value[0], yerr=whiskers(value), lw=0.9, capsize=1.5, color=INK)
                panel.text(at, -0.02, short(row.name), transform=panel.get_xaxis_transform(), ha="center", va="top",
                           fontsize=6.5, rotation=90, color=GREY)  # fmt: skip
    room = 6 + 4.0 * max((len(short(row.name)) for _, row, _ in rows), default=0)  # points: the rows' names stand here
    panel.set_xticks(range(len(fields)), [f"{short(name)}\nn = {count}" for name, count in fields.items()])
    panel.tick_params(axis="x", length=0, pad=room, labelsize=FIELD_SIZE)
    panel.set_ylabel(f"{score_name(score)}, %")
    panel.set_ylim(0, _top(panel.get_ylim()[1]))
    panel.set_xlim(-0.55, max(len(fields), 1) - 0.45)
    panel.set_title(short(title, 80), loc="left", fontsize=11, weight="bold")
    panel.grid(axis="y", alpha=0.25)
    panel.set_axisbelow(True)


# ---- parts of a figure


def plain_text(**settings: Any) -> Any:
    """A context in which matplotlib takes a name as it is written, dollar signs and all, with these settings besides.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("the figures need matplotlib, which is not installed; pip install 'relook[eval]'") from None
    changed: Any = {"text.parse_math": False, **settings}
    return rc_context(changed)


def _figure(report: Report, down: int, across: int, size: tuple[float, float]) -> tuple[Any, Sequence[Any]]:
    """A figure of down x across panels of `size` inches each, with room for the legend under them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = size[0] * max(across, 1)
    legend = 0.22 * math.ceil(len(report.rows) / _legend_columns(width)) + 0.25
    figure = Figure(figsize=(width, size[1] * down + legend), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Any, report: Report, handle: Any) -> None:
    """Every row by name and title, those that were not run as such, under the panels."""
    entries = [(handle(place), _entry(row)) for place, row in enumerate(report.rows)]
    figure.legend(
        [each for each, _ in entries], [text for _, text in entries], loc="outside lower center", fontsize=8.5,
        ncols=_legend_columns(figure.get_figwidth()), frameon=False,
    )  # fmt: skip


def _legend_columns(width: float) -> int:
    return max(1, int(width // 4.5))


def _entry(row: Row) -> str:
    text = row.title if row.title == row.name else f"{row.name}: {row.title}"
    return short(text, 70) + ("" if row.results else " (not run)")


def _dot(place: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], ls="", marker=MARKERS[place % len(MARKERS)], ms=7, color=colour(place), mec=EDGE, mew=0.6)


def _patch(place: int) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour(place))


def label(panel: Any, points: Sequence[Point]) -> None:
    """Names beside their points, each at the nearest place where it covers no other name, no point and no interval.

    Two rows may lie on top of each other (the same model under two looks), so names try places farther and farther out,
    with a thin line back to their point where they had to move away.
    """
    lines = [  # each interval as a thin rectangle
        panel.transData.transform(ends)
        for x, y, _, _ in points
        for ends in (((x[1], y[0]), (x[2], y[0])), ((x[0], y[1]), (x[0], y[2])))
    ]
    spots = [tuple(panel.transData.transform((x[0], y[0]))) for x, y, _, _ in points]
    taken: list[Rectangle] = [(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in spots]
    taken += [(x0 - 2, y0 - 2, x1 + 2, y1 + 2) for (x0, y0), (x1, y1) in lines]
    frame = panel.get_window_extent()
    for (x, y), (_, _, name, colour) in zip(spots, points, strict=True):
        style = {"fontsize": 9.5, "color": colour, "weight": "bold"}
        measured = panel.annotate(name, (0, 0), xycoords="figure pixels", **style)
        size = measured.get_window_extent()
        measured.remove()
        box, distance = _place(x, y, size.width, size.height, taken, (frame.x0, frame.y0, frame.x1, frame.y1))
        taken.append(box)
        panel.annotate(
            name, panel.transData.inverted().transform((x, y)), xycoords="data", textcoords="offset pixels",
            xytext=(box[0] + LABEL_ROOM - x, box[1] + LABEL_ROOM - y), va="bottom", **style,
            arrowprops={"arrowstyle": "-", "lw": 0.7, "color": colour} if distance else None,
        )  # fmt: skip


def _place(
    x: float, y: float, width: float, height: float, taken: Sequence[Rectangle], frame: Rectangle
) -> tuple[Rectangle, int]:
    """The label's box, with its room, beside (x, y), and how many steps out it lies (0: right beside the point).

    Where nothing is free within the frame, the first place: a label that covers something is better than none.
    """
    wide, high = width + 2 * LABEL_ROOM, height + 2 * LABEL_ROOM
    boxes = []
    for distance, (right, up) in product(range(8), ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))):
        step = MARKER + 13 * distance
        left = x + (step if right > 0 else -step - wide)
        low = y + (-high / 2, step, -step - high)[up]
        box = (left, low, left + wide, low + high)
        inside = frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
        if inside and not any(_meet(box, other) for other in taken):
            return box, distance
        boxes.append(box)
    return boxes[0], 0


def _meet(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def scaled(value: Estimate | None, factor: float = 1) -> Interval | None:
    if value is None or value.mean is None or value.low is None or value.high is None:
        return None
    return factor * value.mean, factor * value.low, factor * value.high


def whiskers(value: Interval) -> list[list[float]]:
    """Lengths below and above the mean; a ratio's mean may lie a rounding error outside its interval."""
    mean, low, high = value
    return [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]


def short(name: str, most: int = 24) -> str:
    """A name in one line that can be drawn (no half characters), its middle left out where it is long."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def _top(seen: float) -> float:
    """The upper end of an axis of percentages: a little air, never past 104, never less than 5."""
    return min(max(seen * 1.05, 5.0), 104.0)


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()
