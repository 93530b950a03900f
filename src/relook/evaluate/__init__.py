"""Evaluation: tasks x ways to look -> scores with intervals, a table, and a record of every answer.

    tasks    what is asked, and how each answer is scored        metrics  scores and intervals: numbers in, numbers out
    arms     ways to look: auto, none, forced, annotated, ...    report   results as a table and as JSON
    run      asks the model batch by batch and writes records

Importing this loads neither torch nor a model.
"""

from relook.evaluate.arms import ARMS
from relook.evaluate.metrics import anls, bootstrap, exact_match, region_overlap
from relook.evaluate.report import Evaluation, Result
from relook.evaluate.run import evaluate
from relook.evaluate.tasks import TASKS, Task, find_task

__all__ = [
    "ARMS",
    "TASKS",
    "Evaluation",
    "Result",
    "Task",
    "anls",
    "bootstrap",
    "evaluate",
    "exact_match",
    "find_task",
    "region_overlap",
]
