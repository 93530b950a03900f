"""What a report shows: its rows, from a YAML file or from plain evaluation folders, with the records of each.

A row is one model under one setting: some folders (one per seed) and the look of their records. The YAML:

    title: ...                         # and note: a paragraph under it
    tasks: [receipts-real, receipts]   # in this order; every task that the records hold where this is left out
    rows:
      - {name: c, title: small + region look, records: records/region-s[0-9]*, look: region}
    compare: [[c, a]]                  # differences, first minus second
    by: [field, "field,width<880"]     # results by groups of questions, too (`summary.grouping`)

`records` is a glob or a list of them, relative to the YAML file. A row without records stays, as one that was not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from relook import plugins
from relook.errors import UserError
from relook.evaluate.records import Folder, answered, holds_records, read_folder
from relook.evaluate.settings import SETTINGS
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.summary import MEASURES, Comparison, Summary, compare, in_groups, summarize
from relook.evaluate.tasks import TASKS, named_task
from relook.io import read_yaml, validate

# What a row's model is, from results.json (`facts`), or from the row where an old results.json lacks it.
FACTS: dict[str, tuple[str, ...]] = {
    "parameters": ("facts", "parameters"),
    "samples": ("facts", "training", "samples"),
    "train_seconds": ("facts", "training", "seconds"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowConfig(_Strict):
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


class ReportConfig(_Strict):
    """A whole report as the YAML says it."""

    title: str
    note: str = ""
    tasks: list[str] = []
    rows: list[RowConfig] = Field(min_length=1)
    compare: list[tuple[str, str]] = []
    by: list[str] = []

    @model_validator(mode="after")
    def _names(self) -> ReportConfig:
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
    facts     by `FACTS`, one value a folder; empty where unknown
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
    """Rows, tasks and the paired differences asked for; `planned` where a YAML file says which rows there are."""

    title: str
    note: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    compare: tuple[tuple[str, str], ...]
    differences: tuple[Comparison, ...]
    planned: bool = True
    by: tuple[str, ...] = ()

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def shown(self, task: str) -> list[Row]:
        """The rows in the tables of a task: all of a plan, else those that have the task."""
        return [row for row in self.rows if self.planned or task in row.results]

    def scores(self, task: str) -> tuple[str, ...]:
        """The scores that any row has for a task, the one that decides first: in the task's order, then others."""
        there = [row.results[task].measures for row in self.rows if task in row.results]
        found = dict.fromkeys(name for measures in there for name in measures if name not in MEASURES)
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


def collect(sources: Sequence[str | Path], by: Sequence[str] = ()) -> Report:
    """The report of one YAML file, or of evaluation folders (a row for each folder and look).

    Args:
        by: groupings of questions (`summary.grouping`) beside those of the file.

    Raises:
        UserError: neither; a file that says something else; broken records; no records for any row.
    """
    paths = [Path(source) for source in sources]
    if not paths:
        raise UserError("nothing to report; give a YAML file of rows, or folders that `relook evaluate --out` wrote")
    if len(paths) == 1 and not paths[0].is_dir():
        config = read_config(paths[0])
        return _of_config(config, paths[0].parent, tuple(dict.fromkeys([*config.by, *by])))
    if files := [path for path in paths if path.is_file()]:
        raise UserError(f"{files[0]}: a file among several sources; give one YAML file alone, or folders only")
    return _of_folders([read_folder(path) for path in dict.fromkeys(path.resolve() for path in paths)], tuple(by))


def read_config(path: Path) -> ReportConfig:
    """The YAML file, checked.

    Raises:
        UserError: no such file, not YAML, an unknown key, names that do not fit together.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a YAML file of rows, or evaluation folders")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds {type(raw).__name__}; expected title, rows and so on")
    return validate(ReportConfig, raw, str(path))


def _of_config(config: ReportConfig, base: Path, by: tuple[str, ...]) -> Report:
    folders: dict[Path, Folder] = {}  # several rows may read one folder
    rows = []
    for each in config.rows:
        found = sorted({path for pattern in each.records for path in base.glob(pattern) if holds_records(path)})
        for path in found:
            folders.setdefault(path, read_folder(path))
        rows.append(_row(each, [folders[path] for path in found], config.tasks, by))
    if not any(row.results for row in rows):
        raise UserError(f"no records for any row of {config.title!r}; the first row's: {rows[0].missing}")
    tasks = config.tasks or _tasks(rows)
    compared = _compared(tasks, rows, config.compare, by)
    return Report(config.title, config.note.strip(), tuple(tasks), tuple(rows), tuple(config.compare), compared, by=by)


def _of_folders(folders: Sequence[Folder], by: tuple[str, ...]) -> Report:
    labels = _labels(folders)
    rows = []
    for label, folder in zip(labels, folders, strict=True):
        for look in _ordered({record["look"] for record in folder.records}, SETTINGS):
            name = f"{label} {look}" if len(folders) > 1 else look
            title = SETTINGS[look].about if look in SETTINGS else look
            rows.append(_row(RowConfig(name=name, title=title, records=[], look=look), [folder], [], by))
    if not rows:
        raise UserError(f"{', '.join(labels)}: no records in it; evaluate again")
    return Report("Evaluation", "", tuple(_tasks(rows)), tuple(rows), (), (), planned=False, by=by)


def _row(config: RowConfig, folders: Sequence[Folder], tasks: Sequence[str], by: Sequence[str]) -> Row:
    """The row with its results, of all tasks in the records where `tasks` is empty."""
    held = [folder for folder in folders if any(record["look"] == config.look for record in folder.records)]
    there = tasks or sorted({record["task"] for folder in held for record in folder.records})
    results = {}
    for task in there:
        found = {label: folder.under(task, config.look) for label, folder in zip(_labels(held), held, strict=True)}
        records = {name: each for name, each in found.items() if each}
        if any(answered(record) for each in records.values() for record in each):
            results[task] = summarize(task, config.look, records, by=by)
    facts = {name: _fact(name, config, held) for name in FACTS}
    missing = "" if results else _missing(config, folders)
    return Row(config.name, config.title, config.look, tuple(held), missing, facts, results)


def _labels(folders: Sequence[Folder]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder.path) for folder in folders]


def _missing(config: RowConfig, folders: Sequence[Folder]) -> str:
    if not folders:
        return f"no finished evaluation at {', '.join(config.records)}"
    names = ", ".join(folder.name for folder in folders)
    looks = sorted({record["look"] for folder in folders for record in folder.records})
    if config.look not in looks:
        return f"{names} has no look {config.look!r}, only {', '.join(looks)}"
    return f"{names} has no answers under {config.look!r} to these tasks"


def _fact(name: str, config: RowConfig, folders: Sequence[Folder]) -> tuple[float, ...]:
    found = []
    for folder in folders:
        value: Any = folder.run
        for key in FACTS[name]:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found.append(value)
    return tuple(found) or ((config.facts[name],) if name in config.facts else ())


def _tasks(rows: Sequence[Row]) -> list[str]:
    return _ordered({task for row in rows for task in row.results}, plugins.names("task", TASKS))


def _compared(
    tasks: Sequence[str], rows: Sequence[Row], pairs: Sequence[tuple[str, str]], by: Sequence[str]
) -> tuple[Comparison, ...]:
    """The differences over all questions of each task, and over those of each group."""
    by_name = {row.name: row.results for row in rows}
    found = []
    for task in tasks:
        for first, second in pairs:
            a, b = by_name[first].get(task), by_name[second].get(task)
            if a and b:
                scores = [score for score in a.measures if score not in MEASURES and score not in SPLIT_SCORES]
                groups = [("", a.questions), *(part for each in by for part in in_groups(a.questions, each).items())]
                found += [
                    replace(compare(task, score, (first, questions), (second, b.questions)), group=group)
                    for group, questions in groups
                    for score in scores
                    if score in b.measures
                ]
    return tuple(found)


def _ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names in the order of those known, others at the end by alphabet."""
    order = list(known)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
