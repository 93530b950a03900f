"""Executors: where the batches of a run are asked. The same plan gives the same records under each.

`local` asks in this process. `processes` is what `torchrun` and `accelerate launch` start: each process has the model,
takes its share of the batches and writes its own part of the records; the first one writes the results of all. `ray`
sends batches of questions to replicas of the model (actors of Ray); the model and the images must lie under the same
paths on all nodes (a shared disk).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from relook.errors import RelookError, UserError
from relook.evaluate.environment import machine, model_facts, processor_hash, weights_hash
from relook.evaluate.record_writer import RecordWriter
from relook.evaluate.records import Record
from relook.evaluate.runner import Batch, Plan, Runner, batches, fastest_batch, same_questions

Progress = Callable[[str, int, int], None]  # a task's name, how many of its questions are done, and how many there are
PATIENCE = timedelta(days=30)  # of a process that waits for the others' shares


class Executor:
    """Asks in this process; a context manager.

    Args:
        model: a name, folder or hub id for `relook.load`, or a loaded `VLM`.
        dtype: of the weights, for a model that is given by name.
        replicas: of the model, for `ray` only.
        device: None for the usual one.
    """

    main = True  # whether this is the process that writes results and prints

    def __init__(self, model: Any, dtype: str | None = None, replicas: int | None = None, device: Any = None) -> None:
        if replicas is not None:
            raise UserError(f"replicas={replicas} is for engine='ray'; leave it out")
        self.vlm = loaded(model, dtype, device)
        self.model = str(getattr(self.vlm, "name", "") or model)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def about(self, plan: Plan, hashed: bool) -> dict[str, Any]:
        """`model`, `facts`, `machine`, and if `hashed` the hashes `weights` and `processor`.

        Raises:
            UserError: a look of the plan that is unknown or that the model lacks.
        """
        Runner(self.vlm, plan)
        about: dict[str, Any] = {"model": self.model, "facts": model_facts(self.vlm), "machine": machine()}
        if hashed:
            about["weights"] = weights_hash(getattr(self.vlm, "model", None))
            about["processor"] = processor_hash(self.vlm.processor)
        return about

    def measure(self, plan: Plan) -> dict[int, float]:
        """Seconds per question by batch size, the same in all processes."""
        return fastest_batch(Runner(self.vlm, plan))

    def writer(self, out: str | Path | None, about: Mapping[str, Any], overwrite: bool = False) -> RecordWriter:
        """This process's writer of records."""
        return RecordWriter(out, about, overwrite=overwrite)

    def records(self, plan: Plan, writer: RecordWriter, progress: Progress | None) -> list[Record]:
        """All records of the run, in any order."""
        return list(self.share(plan, writer, progress))

    def share(
        self, plan: Plan, writer: RecordWriter, progress: Progress | None, rank: int = 0, count: int = 1
    ) -> Iterator[Record]:
        """Records of every `count`-th batch from `rank` on. What was written before is not asked again."""
        runner = Runner(self.vlm, plan)
        totals = {task.name: plan.total(task) for task in plan.rows()} if progress is not None else {}
        for batch in batches(plan):
            if batch.number % count == rank:
                for setting in runner.settings:
                    records = writer.known(batch.task.name, setting.name, batch.numbers)
                    if records is None:
                        yield from writer.add(runner.ask(batch, setting))
                    else:
                        same_questions(batch, records)
                        yield from records
            if progress is not None:
                progress(batch.task.name, batch.numbers.stop, totals[batch.task.name])


class Processes(Executor):
    """Asks in this process and those that were started with it: each loads the model and takes its share of batches.

    Raises:
        UserError: this process was started alone.
    """

    def __init__(self, model: Any, dtype: str | None = None, replicas: int | None = None) -> None:
        if started_together() == 1:
            raise UserError(
                "engine='processes' in a process that was started alone; start it as "
                "torchrun --nproc-per-node 2 -m relook evaluate ..."
            )
        import torch
        from accelerate import PartialState

        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.main = self.state.is_main_process
        super().__init__(model, dtype, replicas, self.state.device)

    def __exit__(self, *_: object) -> None:
        self.state.destroy_process_group()

    def measure(self, plan: Plan) -> dict[int, float]:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([super().measure(plan) if self.main else None])[0]

    def writer(self, out: str | Path | None, about: Mapping[str, Any], overwrite: bool = False) -> RecordWriter:
        with self.state.main_process_first():  # the first one writes what the run is about before anybody its records
            return RecordWriter(out, about, self.state.process_index, overwrite)

    def records(self, plan: Plan, writer: RecordWriter, progress: Progress | None) -> list[Record]:
        from accelerate.utils import gather_object

        rank, count = self.state.process_index, self.state.num_processes
        return gather_object(list(self.share(plan, writer, progress if self.main else None, rank, count)))


class Ray(Executor):
    """Asks in replicas of the model; starts Ray on this machine, or joins the cluster of RAY_ADDRESS.

    A replica that dies is started again, and its batch is asked once more.

    Args:
        model: a name, folder or hub id: each replica loads it.
        dtype: of the weights.
        replicas: None for one for each GPU, or else each CPU, of the cluster.

    Raises:
        UserError: a model that is loaded already; Ray is not installed.
    """

    def __init__(self, model: Any, dtype: str | None = None, replicas: int | None = None) -> None:
        if not isinstance(model, str | Path):
            raise UserError("engine='ray' loads the model in each replica; give its name or folder, not a loaded one")
        try:
            import ray
        except ImportError as error:
            raise UserError('engine "ray" needs Ray, which is not installed; pip install "relook[ray]"') from error
        self.ray, self.started = ray, not ray.is_initialized()
        if self.started:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        resources = ray.cluster_resources()
        needs: dict[str, Any] = {"num_gpus": 1} if resources.get("GPU") else {"num_cpus": 1}
        self.replicas = replicas or max(1, int(resources.get("GPU") or resources.get("CPU", 1)))
        start: Any = ray.remote(Replica)
        start = start.options(max_restarts=-1, max_task_retries=3, **needs)
        self.start = lambda: start.remote(os.getcwd(), str(model), dtype)
        self.first = self.start()

    def __exit__(self, *_: object) -> None:
        if self.started:
            self.ray.shutdown()

    def about(self, plan: Plan, hashed: bool) -> dict[str, Any]:
        with self._errors():
            return self.ray.get(self.first.about.remote(plan, hashed)) | {"replicas": self.replicas}

    def measure(self, plan: Plan) -> dict[int, float]:
        with self._errors():
            return self.ray.get(self.first.measure.remote(plan))

    def records(self, plan: Plan, writer: RecordWriter, progress: Progress | None) -> list[Record]:
        from ray.util import ActorPool

        found: list[Record] = []
        done: Counter[str] = Counter()
        totals = {task.name: plan.total(task) for task in plan.rows()} if progress is not None else {}
        looks = list(dict.fromkeys(plan.looks))

        def collect(groups: Sequence[Sequence[Record]]) -> None:
            found.extend(record for records in groups for record in records)
            name = groups[0][0]["task"]
            done[name] += len(groups[0])
            if progress is not None:
                progress(name, done[name], totals[name])

        pool, started = ActorPool([self.first]), 1
        with self._errors():
            for batch in batches(plan):
                groups = [writer.known(batch.task.name, look, batch.numbers) for look in looks]
                whole = [records for records in groups if records is not None]
                for records in whole:
                    same_questions(batch, records)
                if len(whole) == len(looks):
                    collect(whole)
                    continue
                if not pool.has_free() and started < self.replicas:
                    pool.push(self.start())
                    started += 1
                elif not pool.has_free():
                    collect([writer.add(records) for records in pool.get_next_unordered()])
                pool.submit(lambda replica, batch: replica.ask.remote(plan, batch), batch)
            while pool.has_next():
                collect([writer.add(records) for records in pool.get_next_unordered()])
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What failed in a replica is raised here, in its own words where these are for people."""
        try:
            yield
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            raise cause if isinstance(cause, RelookError) else RelookError(f"a replica failed: {error}") from None


class Replica:
    """A model in an actor."""

    def __init__(self, folder: str, model: str, dtype: str | None) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # where the run was started: relative paths mean the same here
        self.model = model, dtype
        self.runner: Runner | None = None

    @cached_property
    def local(self) -> Executor:
        return Executor(*self.model)

    def about(self, plan: Plan, hashed: bool) -> dict[str, Any]:
        return self.local.about(plan, hashed)

    def measure(self, plan: Plan) -> dict[int, float]:
        return self.local.measure(plan)

    def ask(self, plan: Plan, batch: Batch) -> list[list[Record]]:
        """The records of a batch, by setting."""
        if self.runner is None or self.runner.plan != plan:
            self.runner = Runner(self.local.vlm, plan)
        runner = self.runner
        return [runner.ask(batch, setting) for setting in runner.settings]


EXECUTORS: dict[str, Callable[[Any, str | None, int | None], Executor]] = {
    "local": Executor,
    "processes": Processes,
    "ray": Ray,
}


def find_executor(name: str | None) -> str:
    """The name itself; for None `processes` where several were started together, else `local`.

    Raises:
        UserError: no such executor.
    """
    if name is None:
        return "processes" if started_together() > 1 else "local"
    if name not in EXECUTORS:
        raise UserError(f"engine {name!r} is unknown; expected one of {', '.join(EXECUTORS)}")
    return name


def started_together() -> int:
    """How many processes `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process prints results, and not another that was started with it."""
    return started_together() == 1 or os.environ.get("RANK", "0") == "0"


def loaded(model: Any, dtype: str | None, device: Any = None) -> Any:
    """The model itself, or that of a name."""
    if not isinstance(model, str | Path):
        if dtype is not None:
            raise UserError(f"dtype={dtype!r} was given with a model that is loaded; load it with that dtype")
        return model
    import relook

    return relook.load(model, dtype=dtype, device=device)
