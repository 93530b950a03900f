"""The engine with a model in this process: a thread that runs the scheduler, and requests from any number of others."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread
from typing import Any

from relook.errors import RelookError, UserError
from relook.trace import Finished, LookTaken

from .engine import REGIONS, DeadlineExceeded, EngineBusy, EngineClosed, Request, Running
from .loop import Limits, Scheduler, tokens_of
from .memory import Memory
from .row import Row
from .vlm import VLM

TOKENS = 65536  # that rows at work may hold, unless the model's context is longer
SPACING = 2  # of images (`Limits`)


@dataclass(eq=False)
class _Job:
    row: Row
    running: Running
    deadline: float | None
    begun: float


class LocalEngine:
    """Answers requests with a loaded model, side by side (`engine.Engine`).

    Args:
        vlm: the model.
        max_rows: requests that are decoded at once.
        max_waiting: requests that may wait for a place; more are refused with `EngineBusy`.
        max_tokens: that requests which have begun may hold; default `TOKENS`.
        prefill_tokens: of prompts in one step, so that the others' streams do not stall.
        turn: tokens that a request decodes before it makes room for one that waits.
        cache_bytes: of keys, values and features that are kept for requests that begin like earlier ones.
    """

    def __init__(
        self,
        vlm: VLM,
        *,
        max_rows: int = 8,
        max_waiting: int = 64,
        max_tokens: int | None = None,
        prefill_tokens: int = 256,
        turn: int = 32,
        cache_bytes: int = 2**28,
    ):
        for name, value in (("max_rows", max_rows), ("prefill_tokens", prefill_tokens), ("turn", turn)):
            if value < 1:
                raise UserError(f"{name}={value}; expected at least 1")
        if max_waiting < 0:
            raise UserError(f"max_waiting={max_waiting}; expected 0 or more")
        self.vlm, self.name, self.max_rows, self.max_waiting = vlm, vlm.name, max_rows, max_waiting
        self.max_tokens = max(TOKENS, vlm.context) if max_tokens is None else max_tokens
        self.memory = Memory(cache_bytes)
        self._limits = Limits(max_rows, self.max_tokens, prefill_tokens, turn, SPACING)
        self._scheduler = Scheduler(vlm, self._limits, self.memory)
        self._changed = Condition()
        self._arrived: list[_Job] = []
        self._numbers = itertools.count(1)
        self._jobs: dict[int, _Job] = {}  # by number of the row; all that have not ended
        self._leaving: list[_Job] = []
        self._preparing = 0
        self._closing = self._stopped = False
        self._counts = {"requests": 0.0, "generated_tokens": 0.0, "cached_tokens": 0.0, "looks": 0.0}
        self._mean_seconds = 1.0  # of a request
        self._thread = Thread(target=self._work, name="relook engine", daemon=True)
        self._thread.start()

    looks = property(lambda self: self.vlm.looks)
    domain = property(lambda self: self.vlm.domain)
    warnings = property(lambda self: self.vlm.warnings)
    grid = property(lambda self: self.vlm.processor.grid_size)
    regions = property(lambda self: {name: getattr(self.vlm.processor, name) for name in REGIONS})
    context = property(lambda self: self.vlm.context)

    def submit(self, request: Request, timeout: float | None = None) -> Running:
        """See `engine.Engine`. Images are prepared in the caller's thread."""
        begun = time.monotonic()
        with self._changed:
            if self._closing:
                raise EngineClosed("the server is stopping; ask again later")
            ahead = self._preparing + len(self._jobs)
            if ahead >= self.max_waiting + self.max_rows:
                seconds = max(1.0, self._mean_seconds * ahead / self.max_rows)
                raise EngineBusy(
                    f"{ahead} questions are at work or waiting already; ask again in {seconds:.0f} s", seconds
                )
            self._preparing += 1
        try:
            row = self.vlm._row_of(request, self.vlm._begin(self.memory))
            if (need := tokens_of(row)) > self.max_tokens:
                raise UserError(f"the request may take {need} tokens, and the server holds {self.max_tokens}; ask less")
            row.number = next(self._numbers)
            running = Running(partial(self._leave, row.number))  # which holds neither row nor job
            job = _Job(row, running, None if timeout is None else begun + timeout, begun)
        except BaseException:
            with self._changed:
                self._preparing -= 1
                self._changed.notify_all()
            raise
        with self._changed:
            self._preparing -= 1
            if self._stopped:
                raise EngineClosed("the server is stopping; ask again later")
            self._jobs[row.number] = job
            self._arrived.append(job)
            self._changed.notify_all()
        return running

    def stats(self) -> dict[str, float]:
        """See `engine.Engine`."""
        with self._changed:
            begun = [job.row for job in self._jobs.values() if job.row.admitted]
            now = {
                "rows": float(len(begun)),
                "waiting": float(self._preparing + len(self._jobs) - len(begun)),
                "tokens_held": float(sum(map(tokens_of, begun))),
                "cache_bytes": float(self.memory.bytes),
            }
            return {**now, **{f"{name}_total": value for name, value in self._counts.items()}}

    def close(self, drain: float = 0) -> None:
        """See `engine.Engine`."""
        end = time.monotonic() + drain
        with self._changed:
            self._closing = True
            while (self._jobs or self._preparing) and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._take():
            try:
                self._step()
            except Exception as error:  # of no single row: all that were taken have failed, and the next start anew
                self._scheduler = Scheduler(self.vlm, self._limits, self.memory)
                with self._changed:
                    taken = [job for job in self._jobs.values() if job not in self._arrived]
                for job in taken:
                    self._end(job, _failed(error))
        self._scheduler = Scheduler(self.vlm, self._limits, self.memory)
        for job in self._at_work():
            self._end(job, EngineClosed("the server has stopped; ask again later"))

    def _step(self) -> None:  # of its own, so that no row is held while the engine waits
        self._expire()
        for row, event in self._scheduler.step():
            self._tell(row, event)

    def _take(self) -> bool:
        """Wait for work, and take what has come and gone; False at the end."""
        with self._changed:
            while not (self._arrived or self._leaving or self._scheduler.rows or self._stopped):
                self._changed.wait()
            for job in self._arrived:
                if job.row.number in self._jobs:  # not cancelled or too late already
                    self._scheduler.add(job.row)
            for job in self._leaving:
                self._scheduler.remove(job.row)
            self._arrived, self._leaving = [], []
            return not self._stopped

    def _tell(self, row: Row, event: Any) -> None:
        job = self._jobs.get(row.number)
        if job is None:  # cancelled in the meantime
            return
        if isinstance(event, Exception):
            self._end(job, event if isinstance(event, RelookError) else _failed(event))
        elif isinstance(event, Finished):
            self._count(event, job)
            self._end(job, event)
        else:
            self._counts["looks"] += isinstance(event, LookTaken)
            job.running.put(event)

    def _count(self, finished: Finished, job: _Job) -> None:
        usage = finished.answer.usage
        self._counts["requests"] += 1
        self._counts["generated_tokens"] += usage.generated_tokens
        self._counts["cached_tokens"] += usage.cached_tokens
        self._mean_seconds += 0.1 * (time.monotonic() - job.begun - self._mean_seconds)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in self._at_work():
            if job.deadline is not None and now > job.deadline:
                self._scheduler.remove(job.row)
                self._end(job, DeadlineExceeded(f"not finished in {job.deadline - job.begun:g} s; ask for less"))

    def _end(self, job: _Job, last: Any) -> None:
        with self._changed:
            self._jobs.pop(job.row.number, None)
            self._changed.notify_all()
        job.running.put(last)

    def _leave(self, number: int) -> None:
        """Called by whoever cancels: the thread frees the row before its next step."""
        with self._changed:
            if job := self._jobs.pop(number, None):
                self._leaving.append(job)
                self._changed.notify_all()

    def _at_work(self) -> list[_Job]:
        with self._changed:
            return list(self._jobs.values())


def _failed(error: Exception) -> RelookError:
    """What broke inside, as an error for people; its traceback is its cause."""
    failed = RelookError(f"the answer failed ({type(error).__name__}); ask again")
    failed.__cause__ = error
    return failed
