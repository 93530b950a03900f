"""A run: every question of every task, asked under every setting, recorded one by one and summarized.

Questions come lazily and each batch goes through all settings before the next is read, so a page is rendered or opened
once and memory holds one batch.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook import plugins
from relook.errors import RelookError, UserError
from relook.evaluate.environment import questions_hash, versions
from relook.evaluate.executors import EXECUTORS, Executor, Progress, find_executor
from relook.evaluate.record_writer import RecordWriter, begun
from relook.evaluate.records import RESULTS, Record
from relook.evaluate.results import Evaluation
from relook.evaluate.runner import Plan, in_order
from relook.evaluate.settings import SETTINGS, find_protocol
from relook.evaluate.summary import compare_looks, summarize_run
from relook.evaluate.tasks import TASKS, Places
from relook.io import replacing

AUTO = "auto"  # a batch size that is measured


def evaluate(
    model: Any,
    tasks: Sequence[str],
    looks: Sequence[str] = ("auto", "none"),
    n: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    batch: int | str = 8,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    protocol: str = "default",
    places: Places | None = None,
    dtype: str | None = None,
    engine: str | None = None,
    replicas: int | None = None,
) -> Evaluation:
    """Ask the questions of `tasks` under each way to look, and score the answers.

    Args:
        model: a name, folder or hub id for `relook.load`, or a loaded `VLM`.
        tasks: names of `TASKS`, or paths of question files.
        looks: names of `SETTINGS`.
        n: questions of each task (None: as many as the protocol says, or as is usual for the task).
        out: folder for results.json and records.jsonl (one record a question and look); both appear when the run ends,
            until then records grow in records.jsonl.part. A run that was cut goes on there when it is given again.
        seed: of the pages drawn, the random regions and the intervals.
        batch: questions asked side by side; "auto": as many as answer the first questions fastest.
        max_new_tokens: of each turn (None: as the protocol says, or as is usual for the task).
        progress: called with a task's name, the number of its questions done and how many there are.
        protocol: a row of `PROTOCOLS`.
        places: where the files of the paper's benchmarks lie.
        dtype: of the weights, as `relook.load` takes it; for a model that is given by name.
        engine: a row of `EXECUTORS`; None: this process, with those that torchrun started beside it.
        replicas: of the model, for engine="ray"; None: one for each GPU, or else each CPU, of the cluster.

    Raises:
        UserError: unknown task or look, a look the model lacks, a file that cannot be read, a folder with an unfinished
            run of other settings.
        RelookError: not one question was answered.
    """
    plan = _plan(tasks, looks, n, seed, batch, max_new_tokens, protocol, places)
    with EXECUTORS[find_executor(engine)](model, dtype, replicas) as executor:
        run: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions()}
        run |= executor.about(plan, hashed=out is not None)
        if batch == AUTO:
            plan, run["measured"] = _with_fastest_batch(plan, executor, out)
        run |= _settings(plan) | {"engine": find_executor(engine)}
        with executor.writer(out, _decisive(run)) as writer:
            records = in_order(executor.records(plan, writer, progress), plan)
            run["taken_up"] = writer.taken_up
            evaluation = _summarized(run, plan, records)
            if executor.main:
                _write(evaluation, records, out, writer)
        if not _answered(evaluation):
            errors = [error for result in evaluation.results for error in result.errors]
            why = errors[0] if errors else "no setting applied to any question"
            raise RelookError(f"not one question was answered; the first failure: {why}")
    return evaluation


def _plan(
    tasks: Sequence[str],
    looks: Sequence[str],
    n: int | None,
    seed: int,
    batch: int | str,
    max_new_tokens: int | None,
    protocol: str,
    places: Places | None,
) -> Plan:
    """The checked plan. A batch that is yet to be measured is 1 in it.

    Raises:
        UserError: what is wrong with it, as far as that can be known without the model.
    """
    if not tasks:
        known = ", ".join(plugins.names("task", TASKS))
        raise UserError(f"no task was named; give --tasks with some of {known}, or files of questions")
    if not looks:
        raise UserError(f"no look was named; expected some of {', '.join(SETTINGS)}")
    if batch == AUTO:
        batch = 1
    elif not isinstance(batch, int) or batch < 1 or (n is not None and n < 1):
        raise UserError(f"n={n} questions with batch={batch}; expected 1 or more of both (or batch='auto')")
    n = find_protocol(protocol).n if n is None else n
    plan = Plan(tuple(tasks), tuple(looks), n, seed, batch, max_new_tokens, protocol, places)
    plan.rows()
    return plan


def _with_fastest_batch(plan: Plan, executor: Executor, out: str | Path | None) -> tuple[Plan, dict[str, float]]:
    """The plan with a batch size that was measured, or that an unfinished run in the folder has; and the measures."""
    before = (begun(out) or {}).get("batch")
    if isinstance(before, int):
        return replace(plan, batch=before), {}
    seconds = executor.measure(plan)
    if not seconds:
        return plan, {}
    best = min(seconds, key=lambda size: seconds[size])
    return replace(plan, batch=best), {str(size): round(value, 6) for size, value in seconds.items()}


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "tasks": [task.name for task in plan.rows()],
        "scores": {task.name: list(task.scores) for task in plan.rows()},
        "looks": list(dict.fromkeys(plan.looks)),
        **{key: getattr(plan, key) for key in ("protocol", "n", "seed", "batch", "max_new_tokens")},
    }


def _decisive(run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the records depend on: a run that was cut goes on only if none of it has changed."""
    decisive = ("model", "weights", "processor", "tasks", "scores", "looks", "protocol", "n", "seed", "batch")
    return {key: run.get(key) for key in (*decisive, "max_new_tokens", "versions")}


def _summarized(run: dict[str, Any], plan: Plan, records: Sequence[Record]) -> Evaluation:
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record["task"], record["look"]].append(record)
    looks = run["looks"]
    run["seconds"] = sum(record["seconds"] or 0.0 for record in records)
    run["questions"] = {task.name: questions_hash(found[task.name, looks[0]]) for task in plan.rows()}
    results = [
        summarize_run(task.name, look, found[task.name, look], task.scores, plan.seed)
        for task in plan.rows()
        for look in looks
    ]
    return Evaluation(run, results, compare_looks(records, plan.seed))


def _write(evaluation: Evaluation, records: Sequence[Record], out: str | Path | None, writer: RecordWriter) -> None:
    """Results, then records: until these have their name the run goes on. A run without an answer leaves nothing."""
    if not _answered(evaluation):
        writer.discard()
        return
    if out is not None:
        with replacing(Path(out) / RESULTS) as results_file:
            json.dump(evaluation.to_dict(), results_file, indent=2, ensure_ascii=False)
    writer.finish(records)


def _answered(evaluation: Evaluation) -> bool:
    return any(result.answered for result in evaluation.results)
