"""Metrics of a run and where they go: log.jsonl, TensorBoard and other reporters, a progress bar, curves; and samples
that are left out: counted, named in a file, and a reason to stop.

Every figure passes through the Trainer's `log` once and reaches all of them. What was logged past the checkpoint from
which a run goes on is taken back, so that the log reads as that of one straight run.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback

from relook.data import dataset
from relook.data.collate import SkippedSample
from relook.data.reader import Unreadable
from relook.errors import RelookError, UserError
from relook.io import append_lines, read_lines, replacing, replacing_file
from relook.train import distributed

LOG, CURVES, BOARD, SKIPPED = "log.jsonl", "curves.png", "tensorboard", "left_out.jsonl"
SHOWN = 5  # skipped samples that are named on stderr; the file names all


def means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of the figures of several batches, shares over all their cases; entries that are always nan are left out
    (no example of a kind)."""
    values: dict[str, list[tuple[float, int]]] = {}
    for each in figures:
        for name, value in each.items():
            if not np.isnan(value):
                values.setdefault(name, []).append((float(value), getattr(value, "count", 1)))
    return {
        name: float(np.average([value for value, _ in of], weights=[count for _, count in of]))
        for name, of in values.items()
    }


class Metrics:
    """Figures of batches since the last line; and samples, tokens, loss and time of a stage.

    Args:
        batch: samples of a batch, in all processes together.
        record: of the checkpoint from which the stage goes on.
    """

    def __init__(self, batch: int, record: Mapping[str, Any] | None = None) -> None:
        before = record or {}
        self.batch, self.figures = batch, list[Mapping[str, float]]()
        self.samples, self.loss_sum = int(before.get("samples", 0)), float(before.get("loss_sum", 0.0))
        self.looks = set(before.get("looks", ()))  # that were taught
        self._begun = time.perf_counter() - float(before.get("seconds", 0.0))
        self._mark = (time.perf_counter(), self.samples)  # when figures were last taken, and the count then
        self._tokens = 0  # since then

    def add(self, loss: float, batch: Mapping[str, Any]) -> None:
        """Count a batch; `loss` is its share of the step's loss.

        Tokens are real positions of the language model (padding apart) in this process; without text, image tokens.
        """
        self.samples, self.loss_sum = self.samples + self.batch, self.loss_sum + loss
        if "attention_mask" in batch:
            self._tokens += int(batch["attention_mask"].sum())
        elif "image_grid_thw" in batch:
            self._tokens += int(batch["image_grid_thw"].prod(-1).sum()) // 4

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def record(self) -> dict[str, Any]:
        """What a checkpoint's record keeps."""
        about = {"samples": self.samples, "seconds": round(self.seconds, 1), "loss_sum": self.loss_sum}
        return about | {"looks": sorted(self.looks)}

    def take(self) -> dict[str, float]:
        """Means over all processes since the last call, and rates: samples and tokens a second, the most memory."""
        figures = means([each for process in distributed.gather(self.figures) for each in process])
        self.looks = set[str]().union(*distributed.gather(self.looks))
        now, (then, samples), self.figures = time.perf_counter(), self._mark, []
        if not figures:
            return {}
        past = max(now - then, 1e-9)
        others = distributed.gather((self._tokens / past, memory() / 1e6))
        self._mark, self._tokens = (now, self.samples), 0
        rates = {"samples_per_s": (self.samples - samples) / past, "tokens_per_s": sum(tokens for tokens, _ in others)}
        return {**figures, **rates, "memory_mb": max(size for _, size in others)}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count against the rates."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._mark = (self._mark[0] + time.perf_counter() - begun, self._mark[1])


def memory() -> int:
    """Bytes: the most that torch has held on the GPU, else what this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


# -- samples that are left out ----------------------------------------------------------------------------------------


class SkippedReport:
    """Counts examples that were taught and left out, and names the latter in a file.

    Args:
        most_broken: share of broken examples at which a run stops; being too long is no fault of an example.
        unreadable: records that cannot be read and so are no example at all; they are named, too.
    """

    def __init__(self, most_broken: float, unreadable: Sequence[Unreadable] = ()) -> None:
        self.most_broken, self.unreadable = most_broken, unreadable
        self.taught = 0
        self.left_out: Counter[str] = Counter()
        self.path: Path | None = None
        self._first: dict[str, SkippedSample] = {}
        self._own: tuple[int, list[SkippedSample]] = 0, []  # of this process, until `settle`

    def open(self, path: Path, begun: int) -> None:
        """Name examples in this file (JSON lines) from here on; `begun` are behind, those named among them stay."""
        kept = [one for one in (SkippedSample(**line) for line in read_lines(path)) if 0 <= one.example < begun]
        self.path, self.taught = path, begun - len(kept)
        for one in kept:
            self._count(one)
        unread = [SkippedSample(-1, "unread", one.where, one.why) for one in self.unreadable]
        for one in unread[:SHOWN]:
            _say_skipped(one)
        if distributed.main() and (path.is_file() or unread):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in (*unread, *kept))

    def add(self, taught: int, left_out: str) -> None:
        """Note a batch of this process: how many examples it taught, and those left out as `pack_up` wrote them."""
        before, kept = self._own
        self._own = before + taught, kept + [SkippedSample(**one) for one in json.loads(left_out or "[]")]

    def settle(self, last: bool = False) -> None:
        """Count what all processes noted; all of them come to the same account.

        Args:
            last: whether nothing follows; before, that nothing was taught is not judged on few examples.

        Raises:
            RelookError: too many are broken, or all are too long.
        """
        noted, self._own = distributed.gather(self._own), (0, [])
        self.taught += sum(taught for taught, _ in noted)
        found = sorted((one for _, left_out in noted for one in left_out), key=lambda one: one.example)
        for one in found:
            self._count(one)
            if sum(self.left_out.values()) <= SHOWN:
                _say_skipped(one)
        with distributed.together():
            if found and self.path is not None and distributed.main():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                append_lines(self.path, map(asdict, found))
            self._check(last)

    def _count(self, one: SkippedSample) -> None:
        self.left_out[one.reason] += 1
        self._first.setdefault(one.reason, one)

    def _check(self, last: bool) -> None:
        broken, seen = self.left_out["broken"], self.taught + sum(self.left_out.values())
        first = {reason: f"{one.where}: {one.what}" for reason, one in self._first.items()}
        judged = last or seen >= dataset.EARLY
        if broken and (judged or broken < seen or broken > self.most_broken * dataset.EARLY):
            dataset.check_share(broken, seen, "examples", self.most_broken, first["broken"])
        if self.left_out["too long"] and not self.taught and judged:
            raise RelookError(
                f"all {seen} examples so far are longer than the cutoff; the first: {first['too long']}; raise "
                "max_length, or let images be smaller"
            )

    def say(self) -> str:
        """In one line: how many were left out, why, and where they are named; "" for none."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        total, unread = sum(self.left_out.values()), len(self.unreadable)
        said = [f"{total} of {self.taught + total} examples were left out ({counts})"] if total else []
        said += [f"{unread} record{'s' * (unread > 1)} could not be read"] if unread else []
        return "; ".join([*said, f"named in {self.path}"]) if said else ""


def _say_skipped(one: SkippedSample) -> None:
    distributed.say(f"left out ({one.reason}): {one.where}: {one.what}")


# -- the log ----------------------------------------------------------------------------------------------------------


class LogWriter(TrainerCallback):
    """Writes what is logged to log.jsonl, one line a time, and to stderr; `steps` are those of the whole stage."""

    def __init__(self, path: Path, stage: str, steps: int, metrics: Metrics) -> None:
        self.path, self.stage, self.steps, self.metrics = path, stage, steps, metrics
        self._last = -1  # step of the last line about training

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        step, evaluation = state.global_step, "eval_loss" in (logs or {})
        if not logs or (not evaluation and step == self._last):  # nothing new since the last line
            return
        figures = {k: v for k, v in logs.items() if k not in LEFT_OUT}
        if not evaluation:
            self._last = step
            figures = {"loss": logs.get("loss", logs.get("train_loss")), **figures}
        samples, seconds = self.metrics.samples, round(self.metrics.seconds, 1)
        line = {"stage": self.stage, "step": step, "samples": samples, "seconds": seconds}
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
        append_lines(self.path, [line | rounded])
        shown = "  ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
        tqdm.write(f"{self.stage}: step {step} of {self.steps}  {seconds:.0f} s  {shown}", file=sys.stderr)
        sys.stderr.flush()


# what the Trainer logs beside our figures and nobody needs twice
LEFT_OUT = ("epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class Bar(ProgressCallback):
    """The library's bar of steps, without its printed lines: `LogWriter` prints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}")


@contextmanager
def logging_to(folder: Path, place: Path, writer: LogWriter, step: int) -> Iterator[list[Any]]:
    """The callbacks that log a stage (of the folder `place`) of a run, from a step on; none but in the main process."""
    if not distributed.main():
        yield []
        return
    cut_log(folder / LOG, writer.stage, step)
    callbacks: list[Any] = [writer]
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError:
        print("no TensorBoard files: it is not installed (pip install 'relook[train]')", file=sys.stderr)
        board = None
    else:
        if not step:
            shutil.rmtree(folder / BOARD / place.name, ignore_errors=True)
        board = SummaryWriter(str(folder / BOARD / place.name), purge_step=step + 1 if step else None)
        callbacks.append(TensorBoardCallback(board))
    bar = Bar() if sys.stderr.isatty() else None
    try:
        yield [*callbacks, bar] if bar is not None else callbacks
    finally:
        if bar is not None and bar.training_bar is not None:
            bar.training_bar.close()
        if board is not None:
            board.close()


def check_reporters(names: list[str]) -> None:
    """Raises UserError for a `report_to` that transformers does not know, or whose package is missing."""
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise UserError(f"report_to: {error}") from error
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to: {name} is not installed here; pip install it, or leave it out")


def cut_log(path: Path, stage: str, step: int) -> None:
    """Take out of a log what a stage logged past `step`, and a line that a killed run left unfinished."""
    if path.is_file():
        kept = [e for e in read_lines(path) if e.get("stage") != stage or 0 < e.get("step", step + 1) <= step]
        with replacing(path) as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)


def draw_curves(folder: Path) -> None:
    """Draw curves.png: the loss of every stage over its steps, in training and on validation, if any was logged."""
    entries = read_lines(folder / LOG)
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    if not stages:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: matplotlib is not installed (pip install 'relook[train]')", file=sys.stderr)
        return
    across = min(3, len(stages))
    down = -(-len(stages) // across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    for number, stage in enumerate(stages, 1):
        panel = figure.add_subplot(down, across, number)
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
            points = [(e["step"], e[key]) for e in entries if e["stage"] == stage and e.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
        panel.set(title=stage, xlabel="step", ylabel="loss")
        if panel.lines:
            panel.legend(frameon=False)
    with replacing_file(folder / CURVES) as aside:
        figure.savefig(aside, format="png", dpi=120)
