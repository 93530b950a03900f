"""Whether looks mattered, as files.

matter.md    for people: for each task and model a verdict, a table of all rows, outcomes and sizes
matter.json  every number, for papers
matter.png   a panel a task and model: accuracy under each row, and how the questions divide
sizes.png    with and without a look, by the size of the annotated region in the first look
report.html  the page of `relook.evaluate.report` with these tables, whose browser filters by outcome
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.evaluate.effect import BASE, EDGES, NONE, ORACLE, OUTCOMES, Bin, Effect, Row
from relook.evaluate.records import write_files
from relook.evaluate.report import figures
from relook.evaluate.report.page import page_html
from relook.evaluate.report.rows import Report
from relook.evaluate.results import Table, escaped, p_value, points, score_name
from relook.evaluate.settings import SETTINGS
from relook.evaluate.statistics import Estimate

COSTS = {
    "tokens": ("tokens / right", 0),
    "patches": ("patches / right", 0),
    "seconds": ("s / right", 2),
    "money": ("money / right", 5),
}
CAPTION = """\
Means with 95 % intervals (bootstrap over images). "auto - it": the model's own way minus the row, question by question,
with its interval and the p of a paired test. "Changed": of the questions in which the model looked, how many have
another answer under the row. Costs are of all answers, for each right one. docs/matter.md explains every number."""


# ---- tables


def tables(effect: Effect) -> list[Table]:
    """All rows of a task and model; how its questions divide; sizes, where they are known."""
    found = [_rows(effect), _outcomes(effect)]
    return found + ([_sizes(effect)] if effect.bins else [])


def _rows(effect: Effect) -> Table:
    costs = [name for name in COSTS if any(name in row.per_right for row in effect.rows)]
    heading = ("row", "what", "n", f"{score_name(effect.score)} %", "auto - it, points", "p", "changed %", "looked %",
               "malformed %", *(COSTS[name][0] for name in costs))  # fmt: skip
    lines = []
    for row in effect.rows:
        about = SETTINGS[row.look].about if row.look in SETTINGS else ""
        shares = [_percent(each, False) for each in (row.changed, row.looked, row.malformed)]
        spent = [_number(row.per_right.get(name), COSTS[name][1]) for name in costs]
        lines.append((row.look, about, str(row.answered), _percent(row.accuracy), *_difference(row), *shares, *spent))
    return Table("", heading, tuple(lines))


def _difference(row: Row) -> tuple[str, str]:
    found = row.against
    if found is None or found.p is None:
        return "-", "-"
    named = "" if found.a == BASE else f"{found.a}: "
    return named + points(found.gain), p_value(found.p)


def _outcomes(effect: Effect) -> Table:
    n = next(iter(effect.outcomes.values())).n
    lines = [(name, _MEANS[name], _percent(effect.outcomes[name])) for name in OUTCOMES]
    return Table(
        f"Of {n} questions asked with and without, the look was:", ("row", "what", "questions %"), tuple(lines)
    )


_MEANS = {
    "needed": "right with, wrong without",
    "idle": "right both ways",
    "harmful": "wrong with, right without",
    "useless": "wrong both ways",
    "no look": "none was taken",
}


def _sizes(effect: Effect) -> Table:
    heading = ("row", "n", f"{BASE} %", f"{NONE} %", "gain, points", "p")
    lines = []
    for each in effect.bins:
        shares = _percent(each.with_look), _percent(each.without), points(each.gain)
        lines.append((span(each), str(each.n), *shares, "-" if each.p is None else p_value(each.p)))
    about = "By the side of a square as large as the annotated region, in pixels of the first look:"
    return Table(about, heading, tuple(lines))


def span(found: Bin) -> str:
    """A bin in words."""
    if found.high is None:
        return f"{found.low:g} and more"
    return f"under {found.high:g}" if not found.low else f"{found.low:g} to {found.high:g}"


def sentences(effect: Effect) -> Iterator[str]:
    """What the tables come to."""
    yield effect.said
    if effect.gap is not None and effect.gap.p is not None:
        yield (
            f"Zooming gap ({ORACLE} - {NONE}): {points(effect.gap.gain)} points, p {_p(effect.gap.p)}, "
            f"{effect.gap.n} questions."
        )
    if effect.pays_to is not None:
        to = "of every size seen here" if effect.pays_to == float("inf") else f"under {effect.pays_to:g} pixels"
        yield f"A look pays for annotated regions {to}."
    elif effect.bins:
        yield "A look pays for annotated regions of no size: no bin's gain is above 0 for sure."
    for row in effect.rows:
        if row.failed or row.skipped:
            yield f"{row.look}: {row.failed} failed and {row.skipped} skipped, which are in no number of it."


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _percent(value: Estimate | None, interval: bool = True) -> str:
    numbers = value and value.scaled(100)
    if not numbers:
        return "-"
    return f"{numbers[0]:.1f} ({numbers[1]:.1f}-{numbers[2]:.1f})" if interval else f"{numbers[0]:.1f}"


def _number(value: Estimate | None, digits: int) -> str:
    return "-" if value is None or value.mean is None else f"{value.mean:.{digits}f}"


# ---- files


def matter_md(effects: Sequence[Effect], left_out: Sequence[str] = ()) -> str:
    """Everything as Markdown."""
    parts = ["# Did the look matter?", CAPTION]
    for effect in effects:
        parts += [f"## {escaped(effect.task)}, {escaped(effect.model)}", "\n".join(f"- {s}" for s in sentences(effect))]
        for table in tables(effect):
            parts += [table.caption, table.markdown()]
    parts += ["Not run:", "\n".join(f"- {escaped(each)}" for each in left_out)] if left_out else []
    return "\n\n".join(part for part in parts if part) + "\n"


def matter_text(effects: Sequence[Effect], left_out: Sequence[str] = ()) -> str:
    """The same for a terminal."""
    parts = []
    for effect in effects:
        parts.append("\n".join([f"{effect.task}, {effect.model}", *sentences(effect)]))
        for table in tables(effect):
            keep = [place for place, name in enumerate(table.heading) if name != "what"]
            cut = Table(
                "", tuple(table.heading[i] for i in keep), tuple(tuple(line[i] for i in keep) for line in table.lines)
            )
            parts.append(cut.text())
    parts += ["\n".join(f"not run: {each}" for each in left_out)] if left_out else []
    return "\n\n".join(parts)


def matter_json(effects: Sequence[Effect], runs: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()) -> str:
    """Every number, with what was run."""
    edges = {"size_edges": list(EDGES), "outcomes": _MEANS}
    found = {**edges, "effects": [each.to_dict() for each in effects], "not_run": list(left_out), "runs": list(runs)}
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def write_matter(
    effects: Sequence[Effect], report: Report, out: str | Path, images: int | None, left_out: Sequence[str] = ()
) -> list[Path]:
    """Write all files into `out`; `report` is that of the same folders, `images` as for `report.write`."""
    runs = [dict(folder.run) for folder in report.folders]
    contents = {
        "matter.md": matter_md(effects, left_out).encode("utf-8", "backslashreplace"),
        "matter.json": matter_json(effects, runs, left_out).encode("utf-8", "backslashreplace"),
        "matter.png": figures.panels_png([(f"{e.task}, {e.model}", _rows_panel(e)) for e in effects], 4.8),
        "sizes.png": figures.panels_png([(f"{e.task}, {e.model}", _sizes_panel(e)) for e in effects], 3.4),
    }
    if images is not None:
        first = {task: [t for e in effects if e.task == task for t in _titled(e)] for task in report.tasks}
        contents["report.html"] = page_html(report, images, first)
    files = {Path(out) / name: data for name, data in contents.items()}
    write_files(files)
    return list(files)


def _titled(effect: Effect) -> list[Table]:
    first, *others = tables(effect)
    return [Table(" ".join([f"{effect.model}:", *sentences(effect)]), first.heading, first.lines), *others]


# ---- figures

SHADES = dict(zip(OUTCOMES, ("#009E73", "#56B4E9", "#D55E00", "#999999", "#dddddd"), strict=True))


def _rows_panel(effect: Effect) -> Any:
    """Bars: accuracy under each row with its interval; on top how the questions divide."""

    def draw(panel: Any) -> None:
        start = 0.0
        for name in OUTCOMES:
            share = 100 * (effect.outcomes[name].mean or 0.0)
            panel.barh(-1.5, share, 1.1, left=start, color=SHADES[name])
            if share >= 7:
                panel.text(start + share / 2, -1.5, f"{name}\n{share:.0f} %", ha="center", va="center", fontsize=8)
            start += share
        for at, row in enumerate(effect.rows):
            numbers = row.accuracy.scaled(100)
            if numbers:
                panel.barh(at, numbers[0], 0.7, color=figures.COLORS[0] if row.look == BASE else figures.COLORS[1])
                panel.errorbar(numbers[0], at, xerr=figures.whiskers(numbers), lw=1, capsize=2.5, color=figures.INK)
        names = [figures.short(row.look, 22) for row in effect.rows]
        panel.set_yticks([-1.5, *range(len(names))], ["the look was", *names])
        panel.invert_yaxis()
        panel.set_xlim(0, 100)
        panel.set_xlabel(f"{score_name(effect.score)}, %")
        panel.grid(axis="x", alpha=0.25)
        panel.set_axisbelow(True)

    return draw


def _sizes_panel(effect: Effect) -> Any:
    """Accuracy with and without a look by the size of the annotated region, with intervals."""

    def draw(panel: Any) -> None:
        for shift, name, color, marker in ((-0.08, BASE, figures.COLORS[0], "o"), (0.08, NONE, figures.COLORS[3], "s")):
            found = [(at, (b.with_look if name == BASE else b.without).scaled(100)) for at, b in enumerate(effect.bins)]
            points = [(at + shift, numbers) for at, numbers in found if numbers]
            for at, numbers in points:
                panel.errorbar(at, numbers[0], yerr=figures.whiskers(numbers), color=color, lw=1, capsize=2.5)
            panel.plot([at for at, _ in points], [n[0] for _, n in points], marker + "-", color=color, label=name)
        panel.set_xticks(range(len(effect.bins)), [f"{span(each)}\n(n = {each.n})" for each in effect.bins], fontsize=8)
        panel.set_ylim(-3, 103)
        panel.set_xlim(-0.5, max(len(effect.bins), 1) - 0.5)
        panel.set_xlabel("side of the annotated region, pixels of the first look")
        panel.set_ylabel(f"{score_name(effect.score)}, %")
        panel.grid(axis="y", alpha=0.25)
        if effect.bins:
            panel.legend(frameon=False, fontsize=9)

    return draw
