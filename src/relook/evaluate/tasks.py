"""Tasks: what is asked, and how each answer is scored. A task is a row of `TASKS`, or any file of questions.

Knows where questions come from; refuses to know models and looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

from relook.data.questions import Question, from_page, read_questions
from relook.data.worlds import make_world
from relook.errors import UserError
from relook.evaluate.benchmarks import BENCHMARKS, Places, benchmark
from relook.io import rng

# Worlds of training recipes take small seeds; pages for evaluation come from seeds beyond this one, so none was seen.
UNSEEN = 1_000_000_007
REAL_RECEIPTS = Path("../shared/data/receipts/val_qa.jsonl")


@dataclass(frozen=True)
class Task:
    """One row: its name, what it is, its questions for a seed and places (possibly without end), and its scores.

    `usual` is how many questions are asked where nobody says; None for all of them. `tokens` is how long a turn may be
    where neither the user nor the protocol says.
    """

    name: str
    about: str
    questions: Callable[[int, Places], Iterator[Question]]
    scores: tuple[str, ...] = ("exact", "anls")
    usual: int | None = None
    tokens: int = 64

    def items(self, n: int | None, seed: int, places: Places | None = None) -> Iterator[Question]:
        """The first `n` questions (None: as many as usual); world tasks draw other pages for another seed."""
        return islice(self.questions(seed, places or Places()), self.usual if n is None else n)


def world_questions(world: str, seed: int) -> Iterator[Question]:
    """One question about each page of a world that no training saw, which one drawn by page; without end."""
    pages = make_world(world, UNSEEN + seed)
    for index in count():
        page = pages.sample(index)
        chosen = int(rng(seed, "evaluate", world, index).integers(len(page.qas)))
        yield from_page(page, chosen, f"{world} page {index} of seed {UNSEEN + seed}")


def real_receipts() -> Iterator[Question]:
    """The validation questions about real scanned receipts, where the project's shared folder is at hand."""
    beside = Path(__file__).parents[3] / REAL_RECEIPTS  # of the checkout this file may lie in
    path = next((path for path in (REAL_RECEIPTS, beside) if path.is_file()), None)
    if path is None:
        raise UserError(
            f"task receipts-real needs the real receipts, and there is no {REAL_RECEIPTS} here or beside the checkout; "
            "give the path of your own questions (JSON lines of image, question, answer, bboxs) as a task instead"
        )
    return read_questions(path)


def _benchmark(name: str, seed: int, places: Places) -> Iterator[Question]:
    return benchmark(name, places)  # the same questions for every seed


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cards", "cards with codes, pages never seen", lambda seed, _: world_questions("cards", seed), usual=1000),
        Task("receipts", "rendered receipts never seen", lambda seed, _: world_questions("receipts", seed), usual=500),
        Task("receipts-real", "60 real scanned receipts (SROIE), 234 questions", lambda *_: real_receipts()),
        *(
            Task(row.name, row.about, partial(_benchmark, row.name), row.scores, tokens=row.tokens or 64)
            for row in BENCHMARKS.values()
        ),
    )
}


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
        if name in TASKS:
            found.append(TASKS[name])
        elif not path.is_file():
            raise UserError(f"{name!r} is neither a task ({', '.join(TASKS)}) nor a file of questions or tasks")
        elif path.suffix in SUFFIXES:
            found += own_tasks(path)
        else:
            found.append(Task(path.stem, str(path), lambda *_, path=path: read_questions(path)))
    if len({task.name for task in found}) < len(found):
        raise UserError("two of the tasks have the same name; rename a file, or a task in its YAML")
    return found
