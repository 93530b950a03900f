"""Engines: where the batches of a run are asked. An engine is a row of `EXECUTORS`.

`local` asks in this process. `processes` is what `torchrun` and `accelerate launch` start: each process has the model,
takes its share of the batches and keeps a journal of its own; the first one writes the results of all. `ray` sends
batches to replicas of the model (`engines_ray`). The same plan gives the same records under each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from relook.errors import UserError
from relook.evaluate.environment import machine, model_facts
from relook.evaluate.record_writer import RecordWriter, processor_hash, weights_hash
from relook.evaluate.runner import Plan, Record, Runner, batches, fastest_batch, same_questions

Progress = Callable[[str, int, int], None]  # a task's name, its questions done, and all of its questions
PATIENCE = timedelta(days=30)  # of a process that waits for the others' shares


class Executor(Protocol):
    """A context manager; `first` says whether this process is the one that writes and speaks."""

    first: bool

    def __enter__(self) -> Executor: ...

    def __exit__(self, *_: object) -> None: ...

    def about(self, plan: Plan, hashed: bool) -> dict[str, Any]:
        """`model`, `facts`, `machine`, and if `hashed` the hashes `weights` and `processor`.

        Raises:
            UserError: a look of the plan that is unknown or that the model lacks.
        """

    def measure(self, plan: Plan) -> dict[int, float]:
        """Seconds per question by batch size, the same in all processes."""

    def journal(self, out: str | Path | None, about: Mapping[str, Any]) -> RecordWriter:
        """This process's journal."""

    def records(self, plan: Plan, journal: RecordWriter, progress: Progress | None) -> list[Record]:
        """All records of the run, in any order."""


class Local:
    """Asks in this process."""

    first = True

    def __init__(self, model: Any, dtype: str | None = None, replicas: int | None = None, device: Any = None) -> None:
        if replicas is not None:
            raise UserError(f"replicas={replicas} is for engine='ray'; leave it out")
        self.vlm = loaded(model, dtype, device)
        self.model = str(getattr(self.vlm, "name", "") or model)

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def about(self, plan: Plan, hashed: bool) -> dict[str, Any]:
        Runner(self.vlm, plan)
        told: dict[str, Any] = {"model": self.model, "facts": model_facts(self.vlm), "machine": machine()}
        if hashed:
            told["weights"] = weights_hash(getattr(self.vlm, "model", None))
            told["processor"] = processor_hash(self.vlm.processor)
        return told

    def measure(self, plan: Plan) -> dict[int, float]:
        return fastest_batch(Runner(self.vlm, plan))

    def journal(self, out: str | Path | None, about: Mapping[str, Any]) -> RecordWriter:
        return RecordWriter(out, about)

    def records(self, plan: Plan, journal: RecordWriter, progress: Progress | None) -> list[Record]:
        return list(self.share(plan, journal, progress))

    def share(
        self, plan: Plan, journal: RecordWriter, progress: Progress | None, rank: int = 0, count: int = 1
    ) -> Iterator[Record]:
        """Records of every `count`-th batch from `rank` on. What the journal has is not asked again."""
        runner = Runner(self.vlm, plan)
        totals = {task.name: plan.total(task) for task in plan.rows()} if progress is not None else {}
        for batch in batches(plan):
            if batch.number % count == rank:
                for arm in runner.arms:
                    records = journal.known(batch.task.name, arm.name, batch.numbers)
                    if records is None:
                        yield from journal.add(runner.ask(batch, arm))
                    else:
                        same_questions(batch, records)
                        yield from records
            if progress is not None:
                progress(batch.task.name, batch.numbers.stop, totals[batch.task.name])


class Processes(Local):
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
        self.first = self.state.is_main_process
        super().__init__(model, dtype, replicas, self.state.device)

    def __exit__(self, *_: object) -> None:
        self.state.destroy_process_group()

    def measure(self, plan: Plan) -> dict[int, float]:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([super().measure(plan) if self.first else None])[0]

    def journal(self, out: str | Path | None, about: Mapping[str, Any]) -> RecordWriter:
        with self.state.main_process_first():  # the first one says what the run is about before anybody writes records
            return RecordWriter(out, about, self.state.process_index)

    def records(self, plan: Plan, journal: RecordWriter, progress: Progress | None) -> list[Record]:
        from accelerate.utils import gather_object

        rank, count = self.state.process_index, self.state.num_processes
        return gather_object(list(self.share(plan, journal, progress if self.first else None, rank, count)))


def _ray(model: Any, dtype: str | None, replicas: int | None) -> Executor:
    from relook.evaluate.ray_executor import Ray

    return Ray(model, dtype, replicas)


@dataclass(frozen=True)
class Row:
    """What an engine is, and how it is made of a model, a dtype and the number of replicas."""

    about: str
    make: Callable[[Any, str | None, int | None], Executor]


EXECUTORS: dict[str, Row] = {
    "local": Row("in this process", Local),
    "processes": Row("in each process of torchrun or accelerate launch, a share", Processes),
    "ray": Row("in replicas of the model on a Ray cluster", _ray),
}


def find_executor(name: str | None) -> str:
    """The row of that name; None: `processes` where several were started together, else `local`.

    Raises:
        UserError: no such row.
    """
    if name is None:
        return "processes" if started_together() > 1 else "local"
    if name not in EXECUTORS:
        raise UserError(f"engine {name!r} is unknown; expected one of {', '.join(EXECUTORS)}")
    return name


def started_together() -> int:
    """How many processes `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process prints what is found, and not another that was started with it."""
    return started_together() == 1 or os.environ.get("RANK", "0") == "0"


def loaded(model: Any, dtype: str | None, device: Any = None) -> Any:
    """The model itself, or that of a name."""
    if not isinstance(model, str | Path):
        if dtype is not None:
            raise UserError(f"dtype={dtype!r} was given with a model that is loaded; load it with that dtype")
        return model
    import relook

    return relook.load(model, dtype=dtype, device=device)
