"""The results of a run: as JSON, and as the tables that `relook evaluate` prints, the paper's beside one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from relook.evaluate.records import Record
from relook.evaluate.statistics import Estimate
from relook.evaluate.summary import MEASURES, Comparison, Summary, compare_looks, summarize
from relook.evaluate.tasks import PUBLISHED

Column = tuple[str, float, int, bool]  # measure, factor, decimals, interval shown

# column heading -> what stands in it
COLUMNS: dict[str, Column] = {
    "exact %": ("exact", 100, 1, True),
    "ANLS %": ("anls", 100, 1, True),
    "VQA exact %": ("vqa_exact", 100, 1, True),
    "VQA acc. %": ("vqa", 100, 1, True),
    "relaxed %": ("relaxed", 100, 1, True),
    "amount %": ("amount", 100, 1, True),
    "choice %": ("choice", 100, 1, True),
    "CV-Bench %": ("cv_bench", 100, 1, True),
    "yes/no %": ("yes_no", 100, 1, True),
    "yes F1 %": ("yes_f1", 100, 1, True),
    "prec. %": ("yes_precision", 100, 1, False),
    "rec. %": ("yes_recall", 100, 1, False),
    "yes ratio %": ("yes_ratio", 100, 1, False),
    "ROUGE-L %": ("rouge_l", 100, 1, True),
    "CIDEr-D": ("cider", 1, 2, True),
    "judge %": ("judge", 100, 1, True),
    "recall %": ("recall", 100, 1, False),
    "first recall %": ("first_recall", 100, 1, False),
    "IoU %": ("iou", 100, 1, False),
    "looked %": ("looked", 100, 1, False),
    "malformed %": ("malformed", 100, 1, False),
    "LM pos.": ("lm_positions", 1, 0, False),
    "s": ("seconds", 1, 3, False),
}
SCORE_NAMES = {score: name.removesuffix(" %") for name, (score, *_) in COLUMNS.items()} | {"exact": "exact match"}
WORDS = ("row", "what", "difference")  # headings of columns that hold words; all others hold numbers


@dataclass
class Evaluation:
    """All results of a run, what was run (model, seed, versions), and looks compared question by question."""

    run: dict[str, Any]
    results: list[Summary]
    compared: list[Comparison] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        run: dict[str, Any],
        records: Sequence[Record],
        scores: Mapping[str, Sequence[str]],
        seed: int,
        by: Sequence[str] = (),
    ) -> Self:
        """The results of records in their order, a summary for each task and look, with these scores by task; `by`:
        `groups.grouping`."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in records:
            groups.setdefault((record["task"], record["look"]), []).append(record)
        results = [
            summarize(task, look, {"": each}, scores[task], (), seed, by) for (task, look), each in groups.items()
        ]
        return cls(run, results, compare_looks(records, seed, by))

    def to_dict(self) -> dict[str, Any]:
        results = [result.to_dict() for result in self.results]
        compared = [{k: v for k, v in asdict(each).items() if k != "group" or v} for each in self.compared]
        return {"run": self.run, "results": results, "compared": compared}

    def result(self, task: str, look: str) -> Summary:
        """The result of one task and look; KeyError where it was not run."""
        for result in self.results:
            if (result.task, result.look) == (task, look):
                return result
        raise KeyError((task, look))

    def __str__(self) -> str:
        """A row a task and look with 95 % intervals, scores by field, comparisons, the paper's table, failures."""
        tables = [_main(self.results), *_fields(self.results), _comparisons(self.compared)]
        parts = [table.text() for table in tables if table.lines]
        judgements = {(r.task, r.look): r.measures.get("judge") for r in self.results}
        own = {key: None if j is None or j.mean is None else 100 * j.mean for key, j in judgements.items()}
        if published := beside(own):
            parts += [published.text(), "published: " + "; ".join(PAPER["caveats"])]
        drawn = self.run.get("drawn") or []
        parts += ["drawn: " + "; ".join(drawn)] if drawn else []
        parts += dict.fromkeys(result.found for result in self.results if result.found)
        return "\n\n".join(parts + [f"failed: {error}" for r in self.results for error in r.errors[:1]])


# ---- tables


@dataclass(frozen=True)
class Table:
    """A table: what stands above it, the columns' headings, and lines with a cell for each."""

    caption: str
    heading: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """Aligned columns, the first left and the others right, a rule under the heading."""
        widths = [max(map(len, column)) for column in zip(self.heading, *self.lines, strict=True)]
        rows = [self.heading, tuple("-" * width for width in widths), *self.lines]
        aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
        return "\n".join("  ".join(row).rstrip() for row in aligned)

    def markdown(self) -> str:
        rule = tuple("---" if name in WORDS else "---:" for name in self.heading)
        return "\n".join("| " + " | ".join(map(escaped, row)) + " |" for row in (self.heading, rule, *self.lines))


def escaped(text: str) -> str:
    """One line, with nothing in it that Markdown would take for the end of a cell or for a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def cell(value: Estimate | None, column: Column, signed: bool = False) -> str:
    """An estimate as text, "-" where there was nothing to average.

    >>> cell(Estimate(0.125, 0.05, 0.25, 8), ("exact", 100, 1, True))
    '12.5 (5.0-25.0)'
    """
    _, factor, digits, interval = column
    numbers = value and value.scaled(factor)
    if not numbers:
        return "-"
    sign, to = ("+", " to ") if signed else ("", "-")
    mean, low, high = (f"{each:{sign}.{digits}f}" for each in numbers)
    return f"{mean} ({low}{to}{high})" if interval else mean


def points(value: Estimate | None) -> str:
    """A difference of shares in points, with its interval."""
    return cell(value, ("", 100, 1, True), signed=True)


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def score_name(score: str) -> str:
    """A score as people call it; its own name where none is known."""
    return SCORE_NAMES.get(score, score)


def _main(results: Sequence[Summary]) -> Table:
    there = {name for r in results for name in r.measures}
    judged = "judge" in there
    columns = {heading: column for heading, column in COLUMNS.items() if column[0] in there}
    heading = ("task", "look", "n", *columns, *(["unscored"] if judged else []), "failed", "skipped")
    lines = []
    for r in results:
        cells = [cell(r.measures.get(column[0]), column) for column in columns.values()]
        counts = [*([str(r.unscored)] if judged else []), str(r.failed), str(r.skipped)]
        lines.append((r.task, r.look, str(r.answered), *cells, *counts))
    return Table("", heading, tuple(lines))


def _fields(results: Sequence[Summary]) -> list[Table]:
    """For each task its first score by field, where there are several; and by other groups, with the recall."""
    tables = []
    for task in dict.fromkeys(r.task for r in results):
        those = [r for r in results if r.task == task]
        asked = {by: {r.look: r.groups[by] for r in those} for by in those[0].groups}
        for by, looks in ({"field": {r.look: r.fields for r in those}} | asked).items():
            names = sorted({name for parts in looks.values() for name in parts})
            if len(names) < 2 and by not in asked:
                continue
            there = {measure: None for parts in looks.values() for each in parts.values() for measure in each}
            first = next((measure for measure in there if measure not in MEASURES), "exact")
            for score in (first, "recall") if by in asked else (first,):
                lines = [(look, *(_share(looks[look].get(n, {}).get(score)) for n in names)) for look in looks]
                tables.append(Table("", (f"{task}, {score} % by {by} (n)", *names), tuple(lines)))
    return tables


def _share(value: Estimate | None) -> str:
    return "-" if value is None or value.mean is None else f"{value.mean * 100:.1f} ({value.n})"


def _comparisons(found: Sequence[Comparison]) -> Table:
    lines = []
    for each in found:
        counts = [str(n) for n in (each.n, each.only_a, each.only_b, each.both, each.neither)]
        p = "-" if each.p is None else p_value(each.p)
        name = f"{each.task}, {each.group}" if each.group else each.task
        lines.append((f"{name}: {each.a} - {each.b}", *counts, points(each.gain), points(each.looked), p))
    heading = ("did the look matter", "n", "only with", "only without", "both", "neither")
    return Table("", (*heading, "gain, points", "where it looked", "p"), tuple(lines))


# ---- the paper's table: mean judgement in percent by model, image size and task

PAPER = PUBLISHED["paper"]


def beside(judged: Mapping[tuple[str, str], float | None]) -> Table | None:
    """The paper's table for one's own results; None where it has none of the tasks.

    Args:
        judged: mean judgement in percent by (task, look), None where there is none. Behind each published figure,
            in brackets, stands one's own under the first look minus it.
    """
    there = {_column(task) for task, _ in judged}
    columns = [column for column in PAPER["columns"] if column in there]
    if not columns:
        return None
    looks = list(dict.fromkeys(look for _, look in judged))
    own = {look: [_mean(judged, column, look) for column in columns] for look in looks}
    lines = []
    for look, values in own.items():
        if any(value is not None for value in values):
            lines.append((f"yours, {look}", "", *("-" if value is None else f"{value:.1f}" for value in values)))
    for row in PAPER["rows"]:
        scores = dict(zip(PAPER["columns"], row["scores"], strict=True))
        pairs = [(scores[column], value) for column, value in zip(columns, own[looks[0]], strict=True)]
        cells = [f"{x:.1f}" if v is None else f"{x:.1f} ({v - x:+.1f})" for x, v in pairs]
        lines.append((row["model"], str(row["side"]), *cells))
    return Table("", ("published, judge % (yours - it)", "px", *columns), tuple(lines))


def _column(task: str) -> str:
    return PAPER["means_of"].get(task, task)


def _mean(judged: Mapping[tuple[str, str], float | None], column: str, look: str) -> float | None:
    """The mean over the tasks of a column; None where one of them was not judged."""
    values = [v for (task, asked), v in judged.items() if asked == look and _column(task) == column]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
