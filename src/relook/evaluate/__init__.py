"""Evaluation: tasks x settings -> scores with intervals, tables, and a record of every answer.

Importing this package loads neither torch nor matplotlib.
"""

import warnings
from typing import Any

from relook.evaluate.effect import Effect, effects
from relook.evaluate.matter import Matter, matter
from relook.evaluate.metrics import SCORERS, anls, exact_match, region_overlap
from relook.evaluate.records import keep, read_folder
from relook.evaluate.report import WRITERS, Report, collect, write
from relook.evaluate.results import Evaluation
from relook.evaluate.run import evaluate
from relook.evaluate.settings import PROTOCOLS, SETTINGS
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.statistics import bootstrap
from relook.evaluate.summary import Summary
from relook.evaluate.tasks import BENCHMARKS, TASKS, Places, Task, find_task

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "SCORERS",
    "SETTINGS",
    "SPLIT_SCORES",
    "TASKS",
    "WRITERS",
    "Effect",
    "Evaluation",
    "Matter",
    "Places",
    "Report",
    "Summary",
    "Task",
    "anls",
    "bootstrap",
    "collect",
    "effects",
    "evaluate",
    "exact_match",
    "find_task",
    "keep",
    "matter",
    "read_folder",
    "region_overlap",
    "write",
]


_RENAMED = {"ARMS": "SETTINGS", "Result": "Summary"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"relook.evaluate.{name} is {_RENAMED[name]} now", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
