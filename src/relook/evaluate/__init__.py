"""Evaluation: tasks x ways to look -> scores with intervals, a table, and a record of every answer.

    tasks    what is asked, and how each answer is scored        metrics  means and intervals: numbers in, numbers out
    scores, vqa  what one answer is worth -> splits  what only a split has: F1, CIDEr
    arms     ways to look: auto, none, forced, annotated, ...    report   results as a table and as JSON
    run      asks the model batch by batch and writes records      facts    versions, machine, training
    benchmarks  the paper's tasks and where their files lie        protocols  how the paper asked, and how we do
    journal  records as they come, taken up after a kill           published  the paper's table, to print beside
    judge    a model that scores answers -> judging  a folder put before it
    folders  records read again, and kept in a small form
    rows     which records are compared -> compare  pooled over seeds, intervals, differences -> tables,
    figures  -> writers  them as files -> page  all of it and every record as one HTML file

Importing this loads neither torch nor a model, nor matplotlib.
"""

from relook.evaluate.arms import ARMS
from relook.evaluate.benchmarks import BENCHMARKS, Places
from relook.evaluate.folders import keep, read_folder
from relook.evaluate.metrics import bootstrap, region_overlap
from relook.evaluate.protocols import PROTOCOLS
from relook.evaluate.report import Evaluation, Result
from relook.evaluate.rows import Report, collect
from relook.evaluate.run import evaluate
from relook.evaluate.scores import SCORERS, anls, exact_match
from relook.evaluate.splits import SPLIT_SCORES
from relook.evaluate.tasks import TASKS, Task, find_task
from relook.evaluate.writers import WRITERS, write

__all__ = [
    "ARMS",
    "BENCHMARKS",
    "PROTOCOLS",
    "SCORERS",
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
