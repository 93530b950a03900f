"""The plan of a run, its batches, and a loaded model that answers one batch under one setting with records.

A plan is plain data. Wherever a `Runner` is (this process, one of several, an actor of Ray), the same batch under the
same setting gives the same records. The failure of an item is in its record; it is never a score.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
from typing import Any

from relook import plugins
from relook.data.faults import Context, refuse
from relook.data.items import Question, image_size
from relook.data.settings import first_size, nested
from relook.errors import RelookError, UserError
from relook.evaluate.metrics import SCORERS, region_overlap
from relook.evaluate.records import Record
from relook.evaluate.settings import SETTINGS, Case, Setting, find_protocol, find_settings
from relook.evaluate.tasks import TASKS, Places, Task, find_tasks
from relook.interventions import box_in_other
from relook.io import rng
from relook.looks import ANSWER_PREFIX
from relook.regions import cells_in
from relook.trace import Answer, Look, region_turns
from relook.views import load_item_image

SOMETIMES = ("judged", "pixels", "located", "first_recall", "seen", "other")  # keys of a record that not every one has
POOL = 64  # first questions of a task, of which one lends its image to another
Outcome = tuple[Answer | None, str | None, float]  # the answer, or what went wrong; seconds


@dataclass(frozen=True)
class Plan:
    """What is asked of a model; `evaluate` says what each field means. Names only, so that it can be sent elsewhere."""

    tasks: tuple[str, ...]
    looks: tuple[str, ...]
    n: int | None
    seed: int
    batch: int  # 1 where it is yet to be measured
    max_new_tokens: int | None
    protocol: str
    places: Places | None = None
    sampled: bool = False  # whether `n` is the user's: of a task that ends, questions are then drawn over its images

    def checked(self) -> Plan:
        """The plan, with the protocol's number of questions where none is given.

        Raises:
            UserError: what is wrong with it, as far as that can be known without the model.
        """
        if not self.tasks:
            known = ", ".join(plugins.names("task", TASKS))
            raise UserError(f"no task was named; give --tasks with some of {known}, or files of questions")
        if not self.looks:
            raise UserError(f"no look was named; expected some of {', '.join(SETTINGS)}")
        if not isinstance(self.batch, int) or self.batch < 1 or (self.n is not None and self.n < 1):
            raise UserError(
                f"n={self.n} questions with batch={self.batch}; expected 1 or more of both (or batch='auto')"
            )
        self.rows()
        return self if self.n is not None else replace(self, n=find_protocol(self.protocol).n, sampled=False)

    def rows(self) -> list[Task]:
        """The tasks, each once."""
        return find_tasks(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """The plan as results.json has it."""
        return {
            "tasks": [task.name for task in self.rows()],
            "scores": {task.name: list(task.scores) for task in self.rows()},
            "looks": list(dict.fromkeys(self.looks)),
            **{key: getattr(self, key) for key in ("protocol", "n", "seed", "batch", "max_new_tokens")},
        }

    def questions(self, task: Task) -> Iterator[Question]:
        return iter(self._sample(task)[0]) if self._samples(task) else task.items(self.n, self.seed, self.places)

    def drawn(self) -> list[str]:
        """How the questions of each task were drawn, where not all of them are asked."""
        return [self._sample(task)[1] for task in self.rows() if self._samples(task)]

    def _samples(self, task: Task) -> bool:
        return self.sampled and (task.usual is None or task.finite)

    def _sample(self, task: Task) -> tuple[list[Question], str]:
        return task.sample(self.n or 0, self.seed, self.places)

    def total(self, task: Task) -> int:
        """How many questions of a task there are. One without end is not counted through: its pages would be drawn."""
        if task.usual is not None and not self._samples(task):
            return self.n or task.usual
        return sum(1 for _ in self.questions(task))


@dataclass(frozen=True)
class Batch:
    """Questions asked side by side; `number` counts the batches of all tasks, `first` the questions of this one."""

    task: Task
    number: int
    first: int
    questions: Sequence[Question]

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.questions))


def batches(plan: Plan) -> Iterator[Batch]:
    """All batches of all tasks, in order and lazily: a page is rendered or opened when its turn comes.

    Raises:
        UserError: a task without questions.
    """
    number = 0
    for task in plan.rows():
        questions, first = plan.questions(task), 0
        while several := list(islice(questions, plan.batch)):
            yield Batch(task, number, first, several)
            number, first = number + 1, first + len(several)
        if not first:
            raise UserError(f"task {task.name}: {task.about} holds no questions")


def same_questions(batch: Batch, records: Sequence[Record]) -> None:
    """Refuse to go on with a run whose questions have changed since these records of a batch were written.

    Raises:
        UserError: names the first that differs.
    """
    for record, question in zip(records, batch.questions, strict=True):
        now = _unanswered(batch.task.name, record["look"], record["index"], question)
        asked = ("question", "accepted", "boxes", "field", "image", "pixels")
        if any(record.get(name) != now.get(name) for name in asked):
            raise UserError(
                f"question {record['index']} of {batch.task.name} was another one when this run was cut; "
                "give its questions again to go on with it, or choose another folder"
            )


class Runner:
    """A loaded model that answers the batches of a plan.

    Raises:
        UserError: a setting that is unknown, or needs a look that the model lacks.
    """

    def __init__(self, vlm: Any, plan: Plan) -> None:
        self.plan, self.protocol = plan, find_protocol(plan.protocol)
        self.vlm = vlm.with_settings(**self.protocol.processor) if self.protocol.processor else vlm
        self.settings = find_settings(plan.looks, vlm)
        self.options: dict[str, Any] = dict(self.protocol.options)
        if self.options.get("do_sample"):
            self.options["seed"] = plan.seed
        self._pools: dict[str, list[tuple[Question, dict[str, str | None]]]] = {}  # by task, with what names the image

    def ask(self, batch: Batch, setting: Setting) -> list[Record]:
        """Records of one batch under one setting, in the order of the questions.

        The same question keeps its number, and so its random region, in whatever batch it is.
        """
        records: list[Record] = []
        waiting: list[tuple[Record, Case, dict[str, Any]]] = []
        for number, question in zip(batch.numbers, batch.questions, strict=True):
            record = _unanswered(batch.task.name, setting.name, number, question)
            records.append(record)
            try:
                refuse(question, Context())
                size = image_size(question)
            except UserError as error:
                record["failed"] = str(error).removeprefix(f"{question.where}: ")
                continue
            processor, draws = self.vlm.processor, rng(self.plan.seed, "arm", batch.task.name, number)
            record["size"], record["grid"] = list(size), processor.grid_size
            if (seen := first_size(processor, size)) is not None:
                record["seen"] = list(seen)
            case = Case(question, size, processor.grid_size, draws, processor.region_margin, nested(processor))
            if setting.takes_other:
                try:
                    case = self._with_other(case, batch.task, number, record)
                except UserError as error:
                    record["failed"] = f"the image of another question: {error}"
                    continue
            look = setting.options(case)
            if look is None:
                record["skipped"] = f"{setting.name} does not apply: {setting.lacks}"
            else:
                waiting.append((record, case, {"image": question.image, "question": question.text, **look}))
        tokens = self.plan.max_new_tokens or self.protocol.tokens or batch.task.tokens
        outcomes = self._outcomes([asked for _, _, asked in waiting], tokens)
        for (record, case, _), (answer, problem, seconds) in zip(waiting, outcomes, strict=True):
            record["seconds"] = seconds
            if answer is None:
                record["failed"] = problem
            else:
                _fill(record, case, answer, batch.task.scores)
        return records

    def _with_other(self, case: Case, task: Task, number: int, record: Record) -> Case:
        """The case with the image of another question, drawn by the seed among the first `POOL` of the task whose image
        is another one; the record says which. As it is where there is none."""
        if task.name not in self._pools:
            questions = islice(self.plan.questions(task), POOL)
            self._pools[task.name] = [(question, _image_of(question)) for question in questions]
        pool, own = self._pools[task.name], _image_of(case.question)
        for place in rng(self.plan.seed, "other", task.name, number).permutation(len(pool)):
            question, image = pool[place]
            if image != own:
                other = load_item_image(question.image)
                record["other"] = {"index": int(place), "where": question.where, **image, "size": list(other.size)}
                return replace(case, other=other)
        return case

    def _outcomes(self, requests: list[Mapping[str, Any]], tokens: int) -> list[Outcome]:
        """What became of each request, turns being `tokens` long at most.

        Where a batch fails, its requests are asked one by one, so that one bad item costs only itself. Every exception
        counts as the item's failure, whatever its type: it is recorded and shown, and a run of a thousand goes on.
        """
        if not requests:
            return []
        begun = time.perf_counter()
        try:
            answers = self.vlm.ask_many(requests, batch_size=len(requests), max_new_tokens=tokens, **self.options)
        except Exception as error:
            if len(requests) > 1:
                return [outcome for each in requests for outcome in self._outcomes([each], tokens)]
            words = str(error) if isinstance(error, RelookError) else f"{type(error).__name__}: {error}"
            return [(None, words, time.perf_counter() - begun)]
        seconds = (time.perf_counter() - begun) / len(requests)
        return [(answer, None, seconds) for answer in answers]


def in_order(records: Iterable[Record], plan: Plan) -> list[Record]:
    """Records as one process asks for them: task by task, batch by batch, setting by setting."""
    tasks = [task.name for task in plan.rows()]
    looks = list(dict.fromkeys(plan.looks))

    def place(record: Record) -> tuple[int, int, int, int]:
        number = record["index"]
        return tasks.index(record["task"]), number // plan.batch, looks.index(record["look"]), number

    return sorted(records, key=place)


def fastest_batch(runner: Runner, sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)) -> dict[int, float]:
    """Seconds per question (under all settings) by batch size, measured on the first questions, until more is no
    faster.

    A batch that does not fit into memory is asked one by one after it has failed, and so is slower than a batch of one.
    What was answered is thrown away.
    """
    task = runner.plan.rows()[0]
    questions = runner.plan.questions(task)
    pool = list(islice(questions, 1))
    if pool:
        _time(runner, task, pool)  # the first answer of a process is slow
    found: dict[int, float] = {}
    for size in sizes:
        pool += islice(questions, size - len(pool))
        if len(pool) < size:
            break
        found[size] = _time(runner, task, pool) / size
        if found[size] > min(found.values()):
            break
    return found


def _time(runner: Runner, task: Task, questions: Sequence[Question]) -> float:
    begun = time.perf_counter()
    for setting in runner.settings:
        runner.ask(Batch(task, 0, 0, questions), setting)
    return time.perf_counter() - begun


def _unanswered(task: str, look: str, number: int, question: Question) -> Record:
    record: Any = dict.fromkeys(name for name in Record.__annotations__ if name not in SOMETIMES)
    return (
        record
        | {
            "task": task,
            "look": look,
            "index": number,
            "where": question.where,
            **_image_of(question),
            "field": question.field,
            "question": question.text,
            "accepted": list(question.answers),
            "boxes": [list(box) for box in question.boxes],
            "scores": {},
            "looks": [],
            "transcript": [],
        }
        | ({} if question.located is None else {"located": dict(question.located)})
    )


def _image_of(question: Question) -> dict[str, str | None]:
    """What a record says of its image: the path, or the hash of one in memory (None where it cannot be decoded)."""
    image = question.image
    if isinstance(image, str):
        return {"image": image}
    try:
        data = f"{image.mode} {image.size}".encode() + image.tobytes()
    except OSError:
        return {"image": None}
    return {"image": None, "pixels": hashlib.blake2b(data, digest_size=16).hexdigest()}


def _fill(record: Record, case: Case, answer: Answer, scores: Sequence[str]) -> None:
    """What the answer says, and how its regions lie against the annotated boxes.

    Recall is of what was *seen* (crops as widened); IoU of the cells as *named*, since naming is the model's part.
    Where regions nest, both are of the last turn, in which the answer was read; `first_recall` is of the first.
    """
    record["answer"] = text = answer.text.removeprefix(ANSWER_PREFIX).strip()
    record["scores"] = {name: SCORERS[name](text, case.question.answers) for name in scores}
    record["looks"] = [_look(look, answer.nests(look)) for look in answer.looks]
    for look, kept in zip(answer.looks, record["looks"], strict=True):
        if case.other is not None and look.cells is not None and look.box is not None and look.problem is None:
            kept["other"] = box_in_other(look.box, case.size, case.other.size)  # what was shown, in its pixels
    record["usage"] = answer.usage.to_dict()
    record["transcript"] = [turn.to_dict() for turn in answer.transcript]
    turns = region_turns(answer.looks, nested=case.looks > 1) or [[]]
    recalls = [region_overlap([look.box for look in turn if look.box], case.question.boxes) for turn in turns]
    first, record["recall"] = (None if seen is None else seen[0] for seen in (recalls[0], recalls[-1]))
    if case.looks > 1:
        record["first_recall"] = first
    whole = (0, 0, *case.size)
    named = [cells_in(look.cells, look.frame or whole, case.grid) for look in turns[-1] if look.cells]
    overlap = region_overlap(named, case.question.boxes)
    record["iou"] = None if overlap is None else overlap[1]


def _look(look: Look, nests: bool = False) -> dict[str, Any]:
    """What a record keeps of a look; the map of a re-encoding one to two digits, enough for a report to draw it.

    The view that its cells count in is kept where it is not the whole image.

    A map that is not numbers throughout (a model that has diverged) is left out: JSON has no word for it.
    """
    kept: dict[str, Any] = {"kind": look.kind, "cells": look.cells, "box": look.box, "problem": look.problem}
    kept |= {"frame": look.frame} if nests else {}
    if look.attention is not None and isfinite(look.attention.sum()):
        kept["attention"] = [[float(f"{value:.2g}") for value in row] for row in look.attention.tolist()]
    return kept
