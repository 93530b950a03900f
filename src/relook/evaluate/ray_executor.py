"""The `ray` engine: replicas of the model as actors, fed by Ray Data.

What travels is small: which batch of which task, and the records of its answers. A replica finds a batch's questions
itself, so the model, the files of questions and the images must lie under the same paths on all nodes (a shared disk).
The journal is kept here, where the run was started.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from relook.errors import RelookError, UserError
from relook.evaluate.executors import Local, Progress
from relook.evaluate.record_writer import RecordWriter
from relook.evaluate.runner import Batch, Plan, Record, Runner, batches, same_questions


class Replica:
    """A model in an actor. Batches mostly come in ascending order, so that it reads on where it is."""

    def __init__(self, folder: str, model: str, dtype: str | None, plan: Plan) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # where the run was started: relative paths mean the same here
        self.local, self.plan = Local(model, dtype), plan
        self.at, self.coming = 0, batches(plan)

    def about(self, hashed: bool) -> dict[str, Any]:
        return self.local.about(self.plan, hashed)

    def measure(self) -> dict[int, float]:
        return self.local.measure(self.plan)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the dataset: the number of a batch -> its records under all arms, as JSON."""
        batch, runner = self._batch(int(row["batch"])), Runner(self.local.vlm, self.plan)
        return {"records": json.dumps([runner.ask(batch, arm) for arm in runner.arms])}

    def _batch(self, number: int) -> Batch:
        if number < self.at:
            self.at, self.coming = 0, batches(self.plan)
        for batch in self.coming:
            self.at = batch.number + 1
            if batch.number == number:
                return batch
        raise RelookError(f"there is no batch {number} here; the files of questions must be the same on all nodes")


class Ray:
    """Asks in replicas; starts Ray on this machine, or joins the cluster of RAY_ADDRESS.

    Raises:
        UserError: a model that is loaded already; Ray is not installed.
    """

    first = True

    def __init__(self, model: Any, dtype: str | None = None, replicas: int | None = None) -> None:
        if not isinstance(model, str | Path):
            raise UserError("engine='ray' loads the model in each replica; give its name or folder, not a loaded one")
        try:
            import ray
        except ImportError as error:
            raise UserError('engine "ray" needs Ray, which is not installed; pip install "relook[ray]"') from error
        self.ray, self.model, self.dtype = ray, str(model), dtype
        self.ours = not ray.is_initialized()
        if self.ours:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        resources = ray.cluster_resources()
        self.needs: dict[str, Any] = {"num_gpus": 1} if resources.get("GPU") else {"num_cpus": 1}
        self.replicas = replicas or max(1, int(resources.get("GPU") or resources.get("CPU", 1)))

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.ray.shutdown()

    def about(self, plan: Plan, hashed: bool) -> dict[str, Any]:
        return self._told(plan, "about", hashed) | {"replicas": self.replicas}

    def measure(self, plan: Plan) -> dict[int, float]:
        return self._told(plan, "measure")

    def journal(self, out: str | Path | None, about: Mapping[str, Any]) -> RecordWriter:
        return RecordWriter(out, about)

    def records(self, plan: Plan, journal: RecordWriter, progress: Progress | None) -> list[Record]:
        found: list[Record] = []
        done: Counter[str] = Counter()
        totals = {task.name: plan.total(task) for task in plan.rows()}

        def note(records: Sequence[Record]) -> None:
            name = records[0]["task"]
            done[name] += len(records)
            if progress is not None:
                progress(name, done[name], totals[name])

        todo = []
        for number, groups in _left(plan, journal, totals):
            if groups is None:
                todo.append(number)
            else:
                found += [record for records in groups for record in records]
                note(groups[0])
        for groups in self._answers(plan, todo):
            for records in groups:
                found += journal.add(records)
            note(groups[0])
        return found

    def _answers(self, plan: Plan, todo: list[int]) -> Iterator[list[list[Record]]]:
        """The records of each batch, group by group as arms go, in the order in which they come."""
        if not todo:
            return
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = ray.data.from_items([{"batch": number} for number in todo], override_num_blocks=len(todo))
        ask: Any = Replica  # a class: Ray makes an actor of it
        answers = rows.map(
            ask,
            fn_constructor_args=(os.getcwd(), self.model, self.dtype, plan),
            compute=ray.data.ActorPoolStrategy(size=min(self.replicas, len(todo))),
            **self.needs,
        )
        try:
            for row in answers.iter_rows():
                yield json.loads(row["records"])
        except self.ray.exceptions.RayError as error:
            raise self._failure(error) from None

    def _told(self, plan: Plan, what: str, *args: Any) -> Any:
        """What a replica says of itself; its error, if that is for people."""
        actor: Any = self.ray.remote(Replica).options(**self.needs).remote(os.getcwd(), self.model, self.dtype, plan)
        try:
            return self.ray.get(getattr(actor, what).remote(*args))
        except self.ray.exceptions.RayError as error:
            raise self._failure(error) from None
        finally:
            self.ray.kill(actor)

    def _failure(self, error: Exception) -> RelookError:
        """What failed in a replica, in its own words where these are for people."""
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, RelookError) else RelookError(f"a replica failed: {error}")


def _left(
    plan: Plan, journal: RecordWriter, totals: Mapping[str, int]
) -> Iterator[tuple[int, list[list[Record]] | None]]:
    """The number of each batch, with its records by arm if the journal has them all.

    Where it has none, no page is drawn to find out.

    Raises:
        UserError: a task without questions; questions that have changed since the run was cut.
    """
    if not journal.taken_up and all(totals.values()):
        yield from ((number, None) for number in range(sum(ceil(total / plan.batch) for total in totals.values())))
        return
    looks = list(dict.fromkeys(plan.looks))
    for batch in batches(plan):
        groups = [journal.known(batch.task.name, look, batch.numbers) for look in looks]
        whole = [records for records in groups if records is not None]
        for records in whole:
            same_questions(batch, records)
        yield batch.number, whole if len(whole) == len(looks) else None
