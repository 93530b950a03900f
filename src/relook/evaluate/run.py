"""A run: every question of every task, asked under every setting, recorded one by one and summarized.

Questions come lazily and each batch goes through all settings before the next is read, so a page is rendered or opened
once and memory holds one batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.errors import RelookError
from relook.evaluate.environment import questions_hashes, versions
from relook.evaluate.executors import EXECUTORS, Executor, Progress, find_executor
from relook.evaluate.groups import grouping
from relook.evaluate.record_writer import begun, finished_alike
from relook.evaluate.records import RESULTS, read_folder, read_run
from relook.evaluate.results import Evaluation
from relook.evaluate.runner import Plan, in_order
from relook.evaluate.tasks import Places
from relook.io import locked_folder, replacing

AUTO = "auto"  # a batch size that is measured
# Everything that the records depend on: a run that was cut goes on only if none of it has changed.
DECISIVE = (
    *("model", "weights", "processor", "tasks", "scores", "looks", "protocol", "n", "seed", "batch"),
    *("max_new_tokens", "versions"),
)


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
    overwrite: bool = False,
    by: Sequence[str] = (),
    resume: bool = False,
) -> Evaluation:
    """Ask the questions of `tasks` under each setting of `looks`, and score the answers.

    Args:
        model: a name, folder or hub id for `relook.load`, or a loaded `VLM`.
        tasks: names of `TASKS`, or paths of question files.
        looks: names of `SETTINGS`.
        n: questions of each task, drawn over the images of one that is read from files (None: as many as the protocol
            says, or as is usual for the task).
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
        by: results by groups of questions, too: by keys of their records and bounds, such as "field,width<880".
        overwrite: whether `out` may hold a finished run, which is replaced when this one ends.
        resume: whether a finished run in `out` that is this one is read, in place of being refused.

    Raises:
        UserError: unknown task or look, a look the model lacks, a file that cannot be read, a folder with a finished
            run, with an unfinished one of other settings, or that another run writes into.
        RelookError: not one question was answered.
    """
    first: Any = 1 if batch == AUTO else batch
    list(map(grouping, by))  # before anything is loaded: whether they are understood
    plan = Plan(tuple(tasks), tuple(looks), n, seed, first, max_new_tokens, protocol, places, n is not None).checked()
    with EXECUTORS[find_executor(engine)](model, dtype, replicas) as executor:
        run: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions()}
        run |= executor.about(plan, hashed=out is not None)
        if batch == AUTO:
            plan, run["measured"] = _with_fastest_batch(plan, executor, out)
        run |= plan.to_dict() | {"engine": find_executor(engine), "drawn": plan.drawn()}
        with locked_folder(out) if out is not None and executor.main else nullcontext():
            if resume and out is not None and finished_alike(out, _decisive(run)):
                return Evaluation.of(dict(read_run(Path(out))), read_folder(out).records, run["scores"], plan.seed, by)
            evaluation = _asked(plan, run, executor, out, progress, overwrite, by)
    if not _any_answer(evaluation):
        errors = [*(e for result in evaluation.results for e in result.errors), "no setting applied to any question"]
        raise RelookError(f"not one question was answered; the first failure: {errors[0]}")
    return evaluation


def _asked(
    plan: Plan,
    run: dict[str, Any],
    executor: Executor,
    out: str | Path | None,
    progress: Progress | None,
    overwrite: bool,
    by: Sequence[str],
) -> Evaluation:
    """The results of the plan, written into `out`; a run without an answer leaves nothing there."""
    writer = executor.writer(out, _decisive(run), overwrite)
    records = in_order(executor.records(plan, writer, progress), plan)
    run["taken_up"] = writer.taken_up
    run["seconds"] = sum(record["seconds"] or 0.0 for record in records)
    run["questions"] = questions_hashes(records)
    evaluation = Evaluation.of(run, records, run["scores"], plan.seed, by)
    if executor.main and not _any_answer(evaluation):
        writer.discard()
    elif executor.main:  # results, then records: until these have their name the run goes on
        if out is not None:
            with replacing(Path(out) / RESULTS) as results_file:
                json.dump(evaluation.to_dict(), results_file, indent=2, ensure_ascii=False)
        writer.finish(records)
    return evaluation


def _decisive(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run.get(name) for name in DECISIVE}


def _any_answer(evaluation: Evaluation) -> bool:
    return any(result.answered for result in evaluation.results)


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
