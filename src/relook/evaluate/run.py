"""The run: every question of every task, asked under every arm, recorded one by one.

Questions come lazily and each batch goes through all arms before the next is read, so a page is rendered or opened
once and memory holds one batch. What an item's failure was is in its record; it is never a score.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from relook.data.questions import Question, image_size
from relook.data.records import replacing
from relook.data.worlds import rng
from relook.errors import RelookError, UserError
from relook.evaluate.arms import Arm, Case, find_arms, request
from relook.evaluate.benchmarks import Places
from relook.evaluate.facts import machine, model_facts, versions
from relook.evaluate.folders import RESULTS
from relook.evaluate.journal import Journal, processor_hash, questions_hash, weights_hash
from relook.evaluate.metrics import SCORERS, region_overlap
from relook.evaluate.protocols import find_protocol
from relook.evaluate.report import Evaluation, sum_up
from relook.evaluate.tasks import Task, find_task
from relook.looks import ANSWER_PREFIX
from relook.regions import cells_to_box
from relook.trace import Answer

Record = dict[str, Any]
Progress = Callable[[str, int], None]  # task, questions done


def evaluate(
    model: Any,
    tasks: Sequence[str] = ("cards",),
    looks: Sequence[str] = ("auto", "none"),
    n: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    batch: int = 8,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
    protocol: str = "default",
    places: Places | None = None,
    dtype: str | None = None,
) -> Evaluation:
    """Ask the questions of `tasks` under each way to look, and score the answers.

    Args:
        model: a name, folder or hub id for `relook.load`, or a loaded `VLM`.
        tasks: names of `TASKS`, or paths of question files.
        looks: names of `ARMS`.
        n: questions of each task (None: as many as the protocol says, or as is usual for the task).
        out: folder for results.json and records.jsonl (one record a question and look); both appear when the run ends,
            until then records grow in records.jsonl.part. A run that was cut goes on there when it is given again.
        seed: of the pages drawn, the random regions and the intervals.
        batch: questions asked side by side.
        max_new_tokens: of each turn.
        progress: called with a task's name and the number of its questions done.
        protocol: a row of `PROTOCOLS`.
        places: where the files of the paper's benchmarks lie.
        dtype: of the weights, as `relook.load` takes it; for a model that is given by name.

    Raises:
        UserError: unknown task or look, a look the model lacks, a file that cannot be read, a folder with an unfinished
            run of other settings.
        RelookError: not one question was answered.
    """
    rows = [find_task(name) for name in dict.fromkeys(tasks)]
    if not rows:
        raise UserError("no task was named; see relook.evaluate.TASKS, or give the path of a file of questions")
    if batch < 1 or (n is not None and n < 1):
        raise UserError(f"n={n} questions with batch={batch}; expected 1 or more of both")
    if len({task.name for task in rows}) < len(rows):
        raise UserError("two of the question files have the same name; rename one")
    way = find_protocol(protocol)
    n = way.n if n is None else n
    vlm = _loaded(model, dtype)
    arms = find_arms(looks, vlm)
    about = {"protocol": protocol, "n": n, "seed": seed, "batch": batch, "max_new_tokens": max_new_tokens}
    run: dict[str, Any] = {
        "model": str(getattr(vlm, "name", "") or model),
        **about,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    run |= {"versions": versions(), "machine": machine(), "facts": model_facts(vlm)}
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    with Journal(out, _decisive(vlm, run, rows, arms) if out is not None else {}) as journal:
        for task in rows:
            questions = task.items(n, seed, places)
            with way.seen(vlm.processor):
                options = {**way.options, "max_new_tokens": max_new_tokens}
                if options.get("do_sample"):
                    options["seed"] = seed
                for record in run_task(vlm, task, questions, arms, seed, batch, options, progress, journal):
                    found[task.name, record["look"]].append(record)
        run["taken_up"] = journal.taken_up
        run["seconds"] = sum(record["seconds"] or 0.0 for records in found.values() for record in records)
        run["questions"] = {task.name: questions_hash(found[task.name, arms[0].name]) for task in rows}
        results = [sum_up(t.name, arm.name, found[t.name, arm.name], t.scores, seed) for t in rows for arm in arms]
        evaluation = Evaluation(run, results)
        _refuse_silence(evaluation, journal)
        if out is not None:
            with replacing(Path(out) / RESULTS) as results_file:
                json.dump(evaluation.to_dict(), results_file, indent=2, ensure_ascii=False)
        journal.finish()
    return evaluation


def run_task(
    vlm: Any,
    task: Task,
    asked: Iterator[Question],
    arms: Sequence[Arm],
    seed: int,
    batch: int,
    options: Mapping[str, Any],
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> Iterator[Record]:
    """Records of one task, batch by batch, arm by arm. The same question keeps its number and its random region.

    What the journal has is not asked again.
    """
    done, journal = 0, journal or Journal(None, {})
    for questions in _batches(asked, batch):
        for arm in arms:
            numbers = range(done, done + len(questions))
            records = journal.known(task.name, arm.name, numbers)
            if records is not None:
                _same(task, records, questions)
            else:
                numbered = zip(numbers, questions, strict=True)
                records = list(_run_batch(vlm, task, arm, numbered, seed, options))
                journal.add(records)
            yield from records
        done += len(questions)
        if progress is not None:
            progress(task.name, done)
    if not done:
        raise UserError(f"task {task.name}: {task.about} holds no questions")


def _same(task: Task, records: Sequence[Record], questions: Sequence[Question]) -> None:
    """Refuse to go on with a run whose questions have changed since.

    Raises:
        UserError: names the first that differs.
    """
    for record, question in zip(records, questions, strict=True):
        asked = question.text, list(question.answers), [list(box) for box in question.boxes]
        if (record["question"], record["accepted"], record["boxes"]) != asked:
            raise UserError(
                f"question {record['index']} of {task.name} was another one when this run was cut; "
                "give its questions again to go on with it, or choose another folder"
            )


def _batches(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    while batch := list(islice(questions, size)):
        yield batch


def _run_batch(
    vlm: Any, task: Task, arm: Arm, questions: Iterable[tuple[int, Question]], seed: int, options: Mapping[str, Any]
) -> Iterator[Record]:
    """Ask one batch under one arm; records come in the order of the questions."""
    records: list[Record] = []
    waiting: list[tuple[Record, Case, dict[str, Any]]] = []
    for number, question in questions:
        record = _blank(task, arm, number, question)
        records.append(record)
        try:
            size = image_size(question)
        except UserError as error:
            record["failed"] = str(error)
            continue
        case = Case(question, size, vlm.processor.grid_size, rng(seed, "arm", task.name, number))
        look = arm.options(case)
        if look is None:
            record["skipped"] = f"{arm.name} does not apply: nothing is annotated"
        else:
            waiting.append((record, case, request(question, look)))
    outcomes = _ask(vlm, [asked for _, _, asked in waiting], options)
    for (record, case, _), (answer, problem, seconds) in zip(waiting, outcomes, strict=True):
        record["seconds"] = seconds
        if answer is None:
            record["failed"] = problem
        else:
            _fill(record, case, answer, task.scores)
    yield from records


def _ask(
    vlm: Any, requests: list[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[tuple[Answer | None, str | None, float]]:
    """(answer, None, seconds) of each request, or (None, what went wrong, seconds).

    Where a batch fails, its requests are asked one by one, so that one bad item costs only itself. Every exception
    counts as the item's failure, whatever its type: it is recorded and shown, and a run of a thousand items goes on.
    """
    if not requests:
        return []
    begun = time.perf_counter()
    try:
        answers = vlm.ask_many(requests, batch_size=len(requests), **options)
    except Exception as error:
        if len(requests) > 1:
            return [outcome for each in requests for outcome in _ask(vlm, [each], options)]
        words = str(error) if isinstance(error, RelookError) else f"{type(error).__name__}: {error}"
        return [(None, words, time.perf_counter() - begun)]
    seconds = (time.perf_counter() - begun) / len(requests)
    return [(answer, None, seconds) for answer in answers]


def _blank(task: Task, arm: Arm, number: int, question: Question) -> Record:
    return {
        "task": task.name,
        "look": arm.name,
        "index": number,
        "where": question.where,
        "image": question.image if isinstance(question.image, str) else None,
        "field": question.field,
        "question": question.text,
        "accepted": list(question.answers),
        "boxes": [list(box) for box in question.boxes],
        "answer": None,
        "scores": {},
        "looks": [],
        "recall": None,
        "iou": None,
        "usage": None,
        "transcript": [],
        "seconds": None,
        "failed": None,
        "skipped": None,
    }


def _fill(record: Record, case: Case, answer: Answer, scores: Sequence[str]) -> None:
    """What the answer says, and how its regions lie against the annotated boxes.

    Recall is of what was *seen* (crops as widened); IoU of the cells as *named*, since naming is the model's part.
    """
    record["answer"] = answer.text.removeprefix(ANSWER_PREFIX).strip()
    record["scores"] = {name: SCORERS[name](record["answer"], case.question.answers) for name in scores}
    record["looks"] = [
        {"kind": look.kind, "cells": look.cells, "box": look.box, "problem": look.problem} for look in answer.looks
    ]
    record["usage"] = answer.usage.to_dict()
    record["transcript"] = [turn.to_dict() for turn in answer.transcript]
    taken = [look for look in answer.looks if look.problem is None and look.box is not None and look.cells is not None]
    seen = region_overlap([look.box for look in taken if look.box], case.question.boxes)
    named = [cells_to_box(look.cells, case.size, case.grid) for look in taken if look.cells]
    record["recall"] = None if seen is None else seen[0]
    overlap = region_overlap(named, case.question.boxes)
    record["iou"] = None if overlap is None else overlap[1]


def _loaded(model: Any, dtype: str | None) -> Any:
    if not isinstance(model, str | Path):
        if dtype is not None:
            raise UserError(f"dtype={dtype!r} was given with a model that is loaded; load it with that dtype")
        return model
    import relook

    return relook.load(model, dtype=dtype)


def _refuse_silence(evaluation: Evaluation, journal: Journal) -> None:
    """A run in which nothing was answered has no result to print, and nothing to go on from."""
    if not any(result.answered for result in evaluation.results):
        journal.discard()
        errors = [error for result in evaluation.results for error in result.errors]
        why = errors[0] if errors else "no arm applied to any question"
        raise RelookError(f"not one question was answered; the first failure: {why}")


def _decisive(vlm: Any, run: Mapping[str, Any], tasks: Sequence[Task], arms: Sequence[Arm]) -> dict[str, Any]:
    """Everything that the records depend on: a run that was cut goes on only if none of it has changed."""
    chosen = {"tasks": [task.name for task in tasks], "looks": [arm.name for arm in arms]}
    return {
        "model": run["model"],
        "weights": weights_hash(getattr(vlm, "model", None)),
        "processor": processor_hash(vlm.processor),
        **chosen,
        **{key: run[key] for key in ("protocol", "n", "seed", "batch", "max_new_tokens", "versions")},
    }
