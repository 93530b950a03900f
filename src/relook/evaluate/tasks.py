"""Tasks: what is asked, and how each answer is scored. A task is a row of `TASKS`, or any file of questions.

Knows where questions come from; refuses to know models and looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from relook import plugins
from relook.data.items import Question, read_questions
from relook.errors import UserError
from relook.evaluate.benchmarks import BENCHMARKS, Places, benchmark

if TYPE_CHECKING:
    from PIL import Image

    from relook.evaluate.records import Record


@dataclass(frozen=True)
class Task:
    """One row: its name, what it is, its questions for a seed and places (possibly without end), and its scores.

    `usual` is how many questions are asked where nobody says; None for all of them. `tokens` is how long a turn may be
    where neither the user nor the protocol says. `image` draws the image of a record
    again, for reports, where a task's images are not files; it raises UserError where it cannot.
    """

    name: str
    about: str
    questions: Callable[[int, Places], Iterator[Question]]
    scores: tuple[str, ...] = ("exact", "anls")
    usual: int | None = None
    tokens: int = 64
    image: Callable[[Record], Image.Image] | None = None

    def items(self, n: int | None, seed: int, places: Places | None = None) -> Iterator[Question]:
        """The first `n` questions (None: as many as usual); drawn images are others for another seed."""
        return islice(self.questions(seed, places or Places()), self.usual if n is None else n)


def _benchmark(name: str, seed: int, places: Places) -> Iterator[Question]:
    return benchmark(name, places)  # the same questions for every seed


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(
            Task(row.name, row.about, partial(_benchmark, row.name), row.scores, tokens=row.tokens or 64)
            for row in BENCHMARKS.values()
        ),
    )
}


def named_task(name: str) -> Task | None:
    """The task of that name, relook's own or of an installed package; None where there is none (a file's name)."""
    try:
        return plugins.find("task", name, TASKS)
    except UserError:
        return None


def find_task(name: str) -> Task:
    """The task of that name, or the questions of the file at that path (a YAML file: its one task).

    Raises:
        UserError: neither a task nor a file; a file of several tasks.
    """
    found = find_tasks([name])
    if len(found) != 1:
        raise UserError(f"{name} holds {len(found)} tasks ({', '.join(task.name for task in found)}); expected one")
    return found[0]


def find_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks of these names, paths of question files, and paths of YAML files of tasks (`own`); each name once.

    Raises:
        UserError: neither a task nor a file, or two tasks of one name.
    """
    from relook.evaluate.own import SUFFIXES, own_tasks  # which makes tasks

    found: list[Task] = []
    for name in dict.fromkeys(names):
        path = Path(name)
        if not path.is_file():
            known = plugins.names("task", TASKS)
            if name not in known and name not in plugins.ZOO and ":" not in name:
                raise UserError(f"{name!r} is neither a task ({', '.join(known)}) nor a file of questions or tasks")
            found.append(plugins.find("task", name, TASKS))
        elif path.suffix in SUFFIXES:
            found += own_tasks(path)
        else:
            found.append(Task(path.stem, str(path), lambda *_, path=path: read_questions(path)))
    if len({task.name for task in found}) < len(found):
        raise UserError("two of the tasks have the same name; rename a file, or a task in its YAML")
    return found
