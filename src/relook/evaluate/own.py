"""Tasks of one's own, a line of YAML each:

    my-task: {questions: q.jsonl, scores: [exact, anls]}

`questions` is a file of questions (JSON lines of image, question, answer, bboxs), relative to the YAML file; `scores`
are rows of `SCORERS` (or of `SPLIT_SCORES`, which bring the item score they sum up). Also: `about`, `images` (a folder
that image paths are below; else the questions' own), `n` (how many are asked where nobody says).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relook.data.items import read_questions
from relook.errors import UserError
from relook.evaluate.metrics import SCORERS
from relook.evaluate.split_metrics import SPLIT_SCORES
from relook.evaluate.tasks import Task

SUFFIXES = (".yaml", ".yml")


class _Line(BaseModel):
    """What stands behind a task's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    questions: Path
    scores: list[str] = Field(["exact", "anls"], min_length=1)
    about: str = ""
    images: Path | None = None
    n: int | None = Field(None, ge=1)


def own_tasks(path: Path) -> list[Task]:
    """The tasks of a YAML file.

    Raises:
        UserError: not such a file; an unknown key or score (with the nearest known one), a file that is not there.
    """
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{path}: holds no tasks; expected lines of name: {{questions: FILE, scores: [exact, anls]}}")
    return [_task(path, str(name), line) for name, line in raw.items()]


def _task(path: Path, name: str, raw: Any) -> Task:
    where = f"{path}: {name}"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: holds {raw!r}; expected {{questions: FILE, scores: [exact, anls]}}")
    for key in raw:
        _known(str(key), _Line.model_fields, f"{where}: key")
    try:
        line = _Line.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    questions = path.parent / line.questions
    if not questions.is_file():
        raise UserError(f"{where}: there is no file {questions}; its path is relative to the YAML file")
    images = None if line.images is None else path.parent / line.images
    scores = _item_scores(line.scores, where)
    return Task(name, line.about or str(questions), lambda *_: read_questions(questions, images), scores, line.n)


def _item_scores(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The item scores of these names, those that a split's score sums up among them, each once."""
    found: list[str] = []
    for name in names:
        _known(name, {**SCORERS, **SPLIT_SCORES}, f"{where}: score")
        if name in SPLIT_SCORES:
            SPLIT_SCORES[name].require()
        found.append(name if name in SCORERS else SPLIT_SCORES[name].of)
    return tuple(dict.fromkeys(found))


def _known(name: str, table: Iterable[str], what: str) -> None:
    names = list(table)
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(names)}"
        raise UserError(f"{what} {name!r} is unknown; {hint}")
