"""Records to results: what a run found, as numbers, as a table for people and as JSON.

Reads the records that `run` makes (one a question and arm) and nothing else, so that records on disk can be
summed up again. A failed item is counted and shown, never scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from relook.evaluate.perception import Comparison
from relook.evaluate.perception import table as comparison_table
from relook.evaluate.published import CAVEATS, beside
from relook.evaluate.split_metrics import split_scores
from relook.evaluate.statistics import Estimate, bootstrap

Record = Mapping[str, Any]

# Besides the scores: the measures of an answered record, None where it has none.
MEASURES: dict[str, Callable[[Record], float | None]] = {
    "recall": lambda record: record["recall"],
    "iou": lambda record: record["iou"],
    "looked": lambda record: float(any(look["problem"] is None for look in record["looks"])),
    "malformed": lambda record: float(any(look["problem"] is not None for look in record["looks"])),
    "lm_positions": lambda record: record["usage"]["lm_positions"],
    "vision_patches": lambda record: record["usage"]["vision_patches"],
    "generated_tokens": lambda record: record["usage"].get("generated_tokens"),
    "seconds": lambda record: record["seconds"],
}


@dataclass
class Result:
    """One task under one arm.

    asked     questions put to the model: answered + failed
    skipped   questions the arm does not apply to (nothing annotated, for `oracle`)
    unscored  answers that a score is missing for (a judge that failed); the score's mean and n leave them out
    measures  mean and interval by name: scores, also those that only a split has (F1); recall (share of the annotated
              area that was seen) and iou (of the cells named, before any widening), both over answers with a region
              look; looked, malformed (shares of answers); costs
    fields    the scores again, by the question's field
    kinds     how often each kind of look was taken
    errors    the first few failures in words
    """

    task: str
    look: str
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    unscored: int = 0
    measures: dict[str, Estimate] = field(default_factory=dict)
    fields: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return self.answered + self.failed


@dataclass
class Evaluation:
    """All results of a run, what was run (model, seed, versions), and looks held against each other item by item."""

    run: dict[str, Any]
    results: list[Result]
    compared: list[Comparison] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        results = [asdict(result) | {"asked": result.asked} for result in self.results]
        return {"run": self.run, "results": results, "compared": [asdict(each) for each in self.compared]}

    def result(self, task: str, look: str) -> Result:
        """The result of one task and arm; KeyError where it was not run."""
        for result in self.results:
            if (result.task, result.look) == (task, look):
                return result
        raise KeyError((task, look))

    def __str__(self) -> str:
        return table(self)


def sum_up(task: str, look: str, records: Sequence[Record], scores: Sequence[str], seed: int = 0) -> Result:
    """The result of one task's records under one arm."""
    answered = [record for record in records if record["failed"] is None and record["skipped"] is None]
    failed = [record for record in records if record["failed"] is not None]
    result = Result(task, look, len(answered), len(failed), len(records) - len(answered) - len(failed))
    result.errors = [f"{record['where']}: {record['failed']}" for record in failed[:5]]
    result.unscored = sum(any(name not in record["scores"] for name in scores) for record in answered)
    result.measures = {name: _score(answered, name, seed) for name in scores}
    for name, measure in MEASURES.items():
        values = [value for value in map(measure, answered) if value is not None]
        result.measures[name] = bootstrap(values, seed=seed)
    result.measures |= split_scores(answered, seed)
    names = list(dict.fromkeys(record["field"] for record in answered if record["field"]))
    for name in sorted(names):
        rows = [record for record in answered if record["field"] == name]
        result.fields[name] = {score: _score(rows, score, seed) for score in scores}
    kinds = Counter(look["kind"] for record in answered for look in record["looks"] if look["problem"] is None)
    result.kinds = dict(kinds.most_common())
    return result


def _score(records: Sequence[Record], name: str, seed: int) -> Estimate:
    return bootstrap([record["scores"][name] for record in records if name in record["scores"]], seed=seed)


# column heading -> measure, factor, decimals, interval shown
COLUMNS: dict[str, tuple[str, float, int, bool]] = {
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
    "IoU %": ("iou", 100, 1, False),
    "looked %": ("looked", 100, 1, False),
    "malformed %": ("malformed", 100, 1, False),
    "LM pos.": ("lm_positions", 1, 0, False),
    "s": ("seconds", 1, 3, False),
}


def table(evaluation: Evaluation) -> str:
    """Results as plain text: one row a task and arm, 95 % intervals in brackets, then exact match by field."""
    there = {name for r in evaluation.results for name in r.measures}
    judged = "judge" in there
    columns = {heading: column for heading, column in COLUMNS.items() if column[0] in there}
    heading = ["task", "look", "n", *columns, *(["unscored"] if judged else []), "failed", "skipped"]
    rows = [
        [r.task, r.look, str(r.answered)]
        + [_cell(r.measures.get(name), factor, digits, interval) for name, factor, digits, interval in columns.values()]
        + [*([str(r.unscored)] if judged else []), str(r.failed), str(r.skipped)]
        for r in evaluation.results
    ]
    parts = [_grid([heading, *rows])]
    for task in dict.fromkeys(r.task for r in evaluation.results):
        results = [r for r in evaluation.results if r.task == task and r.fields]
        fields = sorted({name for r in results for name in r.fields})
        if len(fields) > 1:
            score = next(iter(results[0].fields[fields[0]]), "exact")
            cells = [[f"{task}, {score} % by field (n)", *fields]]
            cells += [[r.look, *(_field_cell(r.fields.get(name, {}).get(score)) for name in fields)] for r in results]
            parts.append(_grid(cells))
    if compared := comparison_table(evaluation.compared):
        parts.append(_grid(compared))
    judgements = {(r.task, r.look): r.measures.get("judge") for r in evaluation.results}
    own = {key: None if j is None or j.mean is None else 100 * j.mean for key, j in judgements.items()}
    if published := beside(own):
        parts += [_grid(published), "published: " + "; ".join(CAVEATS)]
    parts += [f"failed: {error}" for r in evaluation.results for error in r.errors[:1]]
    return "\n\n".join(parts)


def _cell(value: Estimate | None, factor: float, digits: int, interval: bool) -> str:
    if value is None or value.mean is None or value.low is None or value.high is None:
        return "-"
    text = f"{value.mean * factor:.{digits}f}"
    return f"{text} ({value.low * factor:.{digits}f}-{value.high * factor:.{digits}f})" if interval else text


def _field_cell(value: Estimate | None) -> str:
    return "-" if value is None or value.mean is None else f"{value.mean * 100:.1f} ({value.n})"


def _grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns, the first left and the others right, a rule under the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *(line(row) for row in rows[1:])])
