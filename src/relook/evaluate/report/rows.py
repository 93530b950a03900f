"""What a report shows: its rows, from a YAML file or from plain evaluation folders, with the records of each.

A row is one way of answering: some folders (one per seed) and the look under which their records were made. The YAML:

    title: ...                         # and note: a paragraph under it
    tasks: [receipts-real, receipts]   # in this order; every task that the records hold where this is left out
    rows:
      - {name: c, title: small + region look, records: records/region-s[0-9]*, look: region}
    compare: [[c, a]]                  # differences, first minus second

`records` is a glob or a list of them, relative to the YAML file. A row without records stays, as one that was not run.
Knows where things are; statistics are `compare`'s and texts `writers`'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from relook import plugins
from relook.errors import UserError
from relook.evaluate.records import Folder, holds_records, read_folder
from relook.evaluate.results import MEASURES
from relook.evaluate.settings import SETTINGS
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.summary import Difference, Summary, chance, difference, measure_of, summarise
from relook.evaluate.tasks import TASKS, named_task

# What a row's model is, from results.json (`facts`), or from the row where an old results.json lacks it.
FACTS: dict[str, tuple[str, ...]] = {
    "parameters": ("facts", "parameters"),
    "samples": ("facts", "training", "samples"),
    "train_seconds": ("facts", "training", "seconds"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowPlan(_Strict):
    """One row as the YAML says it."""

    name: str
    title: str
    records: list[str]
    look: str
    facts: dict[str, float] = {}

    @field_validator("records", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("records")
    @classmethod
    def _relative(cls, value: list[str]) -> list[str]:
        for pattern in value:
            if not pattern or Path(pattern).is_absolute():
                raise ValueError(f"{pattern!r} is no path relative to this file")
        return value

    @field_validator("facts")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        if extra := sorted(value.keys() - FACTS.keys()):
            raise ValueError(f"{extra[0]!r} is unknown; facts are {', '.join(FACTS)}")
        return value


class Plan(_Strict):
    """A whole report as the YAML says it."""

    title: str
    note: str = ""
    tasks: list[str] = []
    rows: list[RowPlan] = Field(min_length=1)
    compare: list[tuple[str, str]] = []

    @model_validator(mode="after")
    def _names(self) -> Plan:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name; rename one")
        for name in (name for pair in self.compare for name in pair):
            if name not in names:
                raise ValueError(f"compare names a row {name!r}, and rows are {', '.join(names)}")
        return self


@dataclass(frozen=True)
class Row:
    """A row with what was found for it.

    missing   why it was not run (nothing found at all); "" where it was
    facts     by `FACTS`, one value a folder; empty where nobody knows
    results   by task; a task that was not run is not in it
    """

    name: str
    title: str
    look: str
    folders: tuple[Folder, ...]
    missing: str
    facts: dict[str, tuple[float, ...]]
    results: dict[str, Summary]


@dataclass(frozen=True)
class Report:
    """Everything that the writers show. `planned`: the rows were asked for, and one without records is shown so."""

    title: str
    note: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    compare: tuple[tuple[str, str], ...]
    differences: tuple[Difference, ...]
    planned: bool = True

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def shown(self, task: str) -> list[Row]:
        """The rows that a table of a task has: all that were planned; of plain folders those that have the task."""
        return [row for row in self.rows if self.planned or task in row.results]

    def scores(self, task: str) -> tuple[str, ...]:
        """The scores that any row has for a task, the one that decides first: in the task's order, then others."""
        found = dict.fromkeys(
            name
            for row in self.rows
            if task in row.results
            for name in row.results[task].measures
            if name not in MEASURES
        )
        known = named_task(task)
        own = known.scores if known else ()
        return tuple(sorted(found, key=lambda name: own.index(name) if name in own else len(own))) or ("exact",)

    @property
    def folders(self) -> tuple[Folder, ...]:
        """Every folder of any row, once."""
        return tuple({folder.path: folder for row in self.rows for folder in row.folders}.values())

    @property
    def run(self) -> tuple[Row, ...]:
        """The rows that have results."""
        return tuple(row for row in self.rows if row.results)


def collect(sources: Sequence[str | Path]) -> Report:
    """The report of one YAML file, or of evaluation folders (a row for each folder and look).

    Raises:
        UserError: neither; a file that says something else; broken records; no records for any row.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise UserError("nothing to report; give a YAML file of rows, or folders that `relook evaluate --out` wrote")
    if len(paths) == 1 and not paths[0].is_dir():
        return _from_plan(read_plan(paths[0]), paths[0].parent)
    if files := [path for path in paths if path.is_file()]:
        raise UserError(f"{files[0]}: a file among several sources; give one YAML file alone, or folders only")
    return _from_folders([read_folder(path) for path in dict.fromkeys(path.resolve() for path in paths)])


def read_plan(path: Path) -> Plan:
    """The YAML file, checked.

    Raises:
        UserError: no such file, not YAML, an unknown key, names that do not fit together.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; give a YAML file of rows, or evaluation folders") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}; expected title, rows and so on")
    try:
        return Plan.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key + ': ' if key else ''}{message}; see relook.evaluate.report.rows") from error


def _from_plan(plan: Plan, base: Path) -> Report:
    folders: dict[Path, Folder] = {}  # several rows may read one folder
    rows = []
    for each in plan.rows:
        found = sorted({path for pattern in each.records for path in base.glob(pattern) if holds_records(path)})
        for path in found:
            folders.setdefault(path, read_folder(path))
        rows.append(_row(each, [folders[path] for path in found], plan.tasks))
    if not any(row.results for row in rows):
        raise UserError(f"no records for any row of {plan.title!r}; the first row's: {rows[0].missing}")
    return _report(plan.title, plan.note, plan.tasks, rows, plan.compare)


def _from_folders(folders: Sequence[Folder]) -> Report:
    labels = _labels(folders)
    rows = []
    for label, folder in zip(labels, folders, strict=True):
        looks = {record["look"] for record in folder.records}
        for look in _ordered(looks, SETTINGS):
            name = f"{label} {look}" if len(folders) > 1 else look
            title = SETTINGS[look].about if look in SETTINGS else look
            rows.append(_row(RowPlan(name=name, title=title, records=[], look=look), [folder], []))
    if not rows:
        raise UserError(f"{', '.join(labels)}: no records in it; evaluate again")
    return replace(_report("Evaluation", "", [], rows, []), planned=False)


def _row(plan: RowPlan, folders: Sequence[Folder], tasks: Sequence[str]) -> Row:
    """The row with its results, of all tasks in the records where `tasks` is empty."""
    held = [folder for folder in folders if any(record["look"] == plan.look for record in folder.records)]
    there = tasks or sorted({record["task"] for folder in held for record in folder.records})
    results = {}
    for task in there:
        records = {label: folder.under(task, plan.look) for label, folder in zip(_labels(held), held, strict=True)}
        records = {name: each for name, each in records.items() if each}
        if any(record["failed"] is None and record["skipped"] is None for each in records.values() for record in each):
            results[task] = summarise(records)
    facts = {name: _fact(name, plan, held) for name in FACTS}
    return Row(plan.name, plan.title, plan.look, tuple(held), _missing(plan, folders, results), facts, results)


def _labels(folders: Sequence[Folder]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.path) for folder in folders]


def _missing(plan: RowPlan, folders: Sequence[Folder], results: Mapping[str, Summary]) -> str:
    if results:
        return ""
    if not folders:
        return f"no finished evaluation at {', '.join(plan.records)}"
    looks = sorted({record["look"] for folder in folders for record in folder.records})
    if plan.look not in looks:
        return f"{', '.join(folder.name for folder in folders)} has no look {plan.look!r}, only {', '.join(looks)}"
    return f"{', '.join(folder.name for folder in folders)} has no answers under {plan.look!r} to these tasks"


def _fact(name: str, plan: RowPlan, folders: Sequence[Folder]) -> tuple[float, ...]:
    found = []
    for folder in folders:
        value: Any = folder.run
        for key in FACTS[name]:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found.append(value)
    return tuple(found) or ((plan.facts[name],) if name in plan.facts else ())


def _report(
    title: str, note: str, tasks: Sequence[str], rows: Sequence[Row], compare: Sequence[tuple[str, str]]
) -> Report:
    known = dict.fromkeys(plugins.names("task", TASKS))
    order = tuple(tasks or _ordered({task for row in rows for task in row.results}, known))
    by_name = {row.name: row for row in rows}
    differences = []
    for task in order:
        for first, second in compare:
            a, b = (by_name[name].results.get(task) for name in (first, second))
            if a and b:
                for score in a.measures:
                    if score not in MEASURES and score not in SPLIT_SCORES and score in b.measures:
                        sides = a.asked, b.asked, measure_of(score)
                        differences.append(Difference(first, second, task, score, difference(*sides), chance(*sides)))
    return Report(title, note.strip(), order, tuple(rows), tuple(compare), tuple(differences))


def _ordered(names: set[str], table: Mapping[str, Any]) -> list[str]:
    """Names as a table has them, those it lacks at the end by alphabet."""
    known = list(table)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))
