"""Evaluation: tasks x settings -> scores with intervals, tables, and a record of every answer.

Importing this package loads neither torch nor matplotlib.
"""

import warnings
from typing import Any

from relook.evaluate.benchmarks import BENCHMARKS, Places
from relook.evaluate.metrics import SCORERS, anls, exact_match
from relook.evaluate.protocols import PROTOCOLS
from relook.evaluate.records import keep, read_folder
from relook.evaluate.report.rows import Report, collect
from relook.evaluate.report.writers import WRITERS, write
from relook.evaluate.results import Evaluation, Result
from relook.evaluate.run import evaluate
from relook.evaluate.settings import SETTINGS
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.statistics import bootstrap, region_overlap
from relook.evaluate.tasks import TASKS, Task, find_task

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "SCORERS",
    "SETTINGS",
    "SPLIT_SCORES",
    "TASKS",
    "WRITERS",
    "Evaluation",
    "Places",
    "Report",
    "Result",
    "Task",
    "anls",
    "bootstrap",
    "collect",
    "evaluate",
    "exact_match",
    "find_task",
    "keep",
    "read_folder",
    "region_overlap",
    "write",
]


def __getattr__(name: str) -> Any:
    if name == "ARMS":
        warnings.warn("relook.evaluate.ARMS is called SETTINGS now", DeprecationWarning, stacklevel=2)
        return SETTINGS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
