"""Tasks: what is asked, and how each answer is scored.

A task is a row of `TASKS` (benchmarks of others, in published.yaml; neither their questions nor their images are part
of relook), an entry point of an installed package (`relook.tasks`), a dotted path, a file of questions, or a line of a
YAML file:

    my-task: {questions: q.jsonl, scores: [exact, anls]}

`questions` is a file of questions (JSON lines of image, question, answer, bboxs), relative to the YAML file; `scores`
are rows of `SCORERS` (or of `SPLIT_SCORES`, which bring the item score they sum up). Also: `about`, `images` (a folder
that image paths are below; else the questions' own), `n` (how many are asked by default); `format`, `columns` and `ask`
say how the file is read (`relook data build`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from relook import plugins
from relook.data.forms import read_questions
from relook.data.items import Question
from relook.data.rules import draw
from relook.errors import UserError
from relook.evaluate import benchmark_readers as readers
from relook.evaluate.metrics import SCORERS
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.io import nearest, read_yaml, validate

if TYPE_CHECKING:
    from PIL import Image

    from relook.evaluate.records import Record

Reader = Callable[[Path], Iterator[Question]]


@dataclass(frozen=True)
class Places:
    """Where files of tasks lie. data: folder with the benchmarks' files; images: folder of each image set."""

    data: Path | None = None
    images: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Its name, what it is, its questions for a seed and places (possibly without end), and its scores.

    usual    how many questions are asked by default; None for all of them
    finite   whether its questions come to an end, where `usual` is given
    tokens   the longest turn, unless the user or the protocol sets it
    image    draws the image of a record again, for reports, where a task's images are not files; it raises UserError
             where it cannot
    """

    name: str
    about: str
    questions: Callable[[int, Places], Iterator[Question]]
    scores: tuple[str, ...] = ("exact", "anls")
    usual: int | None = None
    tokens: int = 64
    finite: bool = False
    image: Callable[[Record], Image.Image] | None = None

    def items(self, n: int | None, seed: int, places: Places | None = None) -> Iterator[Question]:
        """`n` questions (None: as many as usual); drawn images are others for another seed."""
        return islice(self.questions(seed, places or Places()), self.usual if n is None else n)

    def sample(self, n: int, seed: int, places: Places | None = None) -> tuple[list[Question], str]:
        """`n` of the questions, and a sentence on how they were drawn: spread over the images, by the seed alone.

        Every image is asked once before one is asked twice; the order is the file's.
        """
        every = list(self.questions(seed, places or Places()))
        asked: Counter[str] = Counter()
        ranks = []
        for key, number in sorted((draw(f"{seed}|{number}|{q.text}"), number) for number, q in enumerate(every)):
            image = every[number].image
            name = image if isinstance(image, str) else f"#{number}"
            ranks.append((asked[name], key, number, name))
            asked[name] += 1
        chosen = sorted(ranks)[:n]
        shown = len({name for *_, name in chosen})
        said = f"{self.name}: {len(chosen)} of {len(every)} questions, on {shown} of {len(asked)} images (seed {seed})"
        return [every[number] for number in sorted(number for _, _, number, _ in chosen)], said


@dataclass(frozen=True)
class PublishedFiles:
    """The questions of a benchmark, the same for every seed.

    files    (pattern, how a file of it is read), the first that is there counts; below the folder or one level deeper.
             Several files of one pattern are asked one after the other
    source   where they are published
    """

    task: str
    files: tuple[tuple[str, Reader], ...]
    source: str

    def __call__(self, seed: int, places: Places) -> Iterator[Question]:
        """Questions, lazily; images are found by set and file name (`data.images`), else beside the questions.

        An image that is not found keeps its published path below the folder of the questions: asking says which is
        missing.

        Raises:
            UserError: no folder was given, or it lacks the files.
        """
        from relook.data.images import ImageFinder

        finder = ImageFinder(places.images)
        paths, read = self._found(places.data)
        for path in paths:
            for question in read(path):
                if isinstance(question.image, str):
                    image = finder.find(question.image) or str(path.parent / question.image)
                    question = replace(question, image=image)
                yield question

    def _found(self, folder: Path | None) -> tuple[list[Path], Reader]:
        wanted = " or ".join(pattern for pattern, _ in self.files)
        if folder is None:
            raise UserError(
                f"task {self.task} needs {wanted} of {self.source}; give the folder that holds it (--data FOLDER)"
            )
        for pattern, read in self.files:
            if found := sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}")):
                return found, read
        raise UserError(f"task {self.task}: there is no {wanted} in {folder}; it is part of {self.source}")


def _benchmark(
    name: str, about: str, scores: Iterable[str], source: str, files: Mapping[str, str], tokens: int = 64
) -> Task:
    read = tuple((pattern, getattr(readers, reader)) for pattern, reader in files.items())
    return Task(name, about, PublishedFiles(name, read, source), tuple(scores), tokens=tokens)


PUBLISHED = read_yaml(Path(__file__).with_name("published.yaml"))
BENCHMARKS: dict[str, Task] = {name: _benchmark(name, **row) for name, row in PUBLISHED["benchmarks"].items()}
TASKS: dict[str, Task] = BENCHMARKS


# ---- by name


@cache
def named_task(name: str) -> Task | None:
    """The task of that name, relook's own or of an installed package; None where there is none (a file's name)."""
    return plugins.find("task", name, TASKS) if name in plugins.names("task", TASKS) else None


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
    """The tasks of these names, paths of question files, and paths of YAML files of tasks; each name once.

    Raises:
        UserError: neither a task nor a file, or two tasks of one name.
    """
    found: list[Task] = []
    for name in dict.fromkeys(names):
        path = Path(name)
        if not path.exists():
            known = plugins.names("task", TASKS)
            if name not in known and name not in plugins.ZOO and ":" not in name:
                raise UserError(f"{name!r} is neither a task ({', '.join(known)}) nor a file of questions or tasks")
            found.append(plugins.find("task", name, TASKS, fits=lambda row: isinstance(row, Task)))
        elif path.suffix in (".yaml", ".yml") and "names" not in (read_yaml(path) or ()):  # which YOLO's have
            found += tasks_of_yaml(path)
        else:
            found.append(Task(path.stem, str(path), lambda *_, path=path: read_questions(path)))
    if len({task.name for task in found}) < len(found):
        raise UserError("two of the tasks have the same name; rename a file, or a task in its YAML")
    return found


class _Line(BaseModel):
    """What stands behind a task's name in YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    questions: Path
    scores: list[str] = Field(["exact", "anls"], min_length=1)
    about: str = ""
    images: Path | None = None
    n: int | None = Field(None, ge=1)
    format: str | None = None
    columns: dict[str, str] = {}
    ask: str | None = None


def tasks_of_yaml(path: Path) -> list[Task]:
    """The tasks of a YAML file.

    Raises:
        UserError: not such a file; an unknown key or score (with the nearest known one), a file that is not there.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{path}: holds no tasks; expected lines of name: {{questions: FILE, scores: [exact, anls]}}")
    return [_task(path, str(name), line) for name, line in raw.items()]


def _task(path: Path, name: str, raw: Any) -> Task:
    where = f"{path}: {name}"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: holds {raw!r}; expected {{questions: FILE, scores: [exact, anls]}}")
    line = validate(_Line, raw, where)
    questions = path.parent / line.questions
    if not questions.exists():
        raise UserError(f"{where}: there is no file {questions}; its path is relative to the YAML file")
    images = None if line.images is None else path.parent / line.images
    scores: list[str] = []
    for score in line.scores:
        if score in SPLIT_SCORES:
            SPLIT_SCORES[score].require()
        elif score not in SCORERS:
            raise UserError(f"{where}: score {score!r} is unknown; {nearest(score, [*SCORERS, *SPLIT_SCORES])}")
        scores.append(score if score in SCORERS else SPLIT_SCORES[score].of)
    about = line.about or str(questions)
    reading = line.model_dump(include={"format", "columns", "ask"})
    asked = lambda *_: read_questions(questions, images, **reading)  # noqa: E731
    return Task(name, about, asked, tuple(dict.fromkeys(scores)), line.n, finite=True)
