"""Metrics of a run and where they go: log.jsonl, TensorBoard and other reporters, a progress bar, curves.

Every figure passes through the Trainer's `log` once and reaches all of them. A run that goes on from a checkpoint takes
back what was logged past it, so that the log reads as that of one straight run.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_callback import ProgressCallback

from relook.errors import UserError
from relook.io import replacing
from relook.train import distributed

LOG, CURVES, BOARD = "log.jsonl", "curves.png", "tensorboard"


class Metrics:
    """Figures of batches, and their means since the last call of `take`."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a batch."""
        for name, value in figures.items():
            self.values.setdefault(name, []).append(float(value))

    def take(self) -> dict[str, float]:
        """Means, without entries that were always nan (no example of a kind); start anew."""
        means = {k: float(np.nanmean(v)) for k, v in self.values.items() if not np.all(np.isnan(v))}
        self.values = {}
        return means

    def take_from_all(self) -> dict[str, float]:
        """`take` of what all processes added."""
        added = distributed.gather(self.values)
        if len(added) > 1:
            self.values = {name: [v for one in added for v in one.get(name, [])] for one in added for name in one}
        return self.take()


class Tally:
    """Counts samples, tokens, loss and time of a stage, and goes on from what a checkpoint's record says.

    `batch` is what is learnt from at once, by all processes together; tokens are those of this process. They are real
    positions of the language model (padding apart); where a stage has no text, image tokens.
    """

    def __init__(self, batch: int, record: dict[str, Any] | None = None) -> None:
        before = record or {}
        self.batch = batch
        self.samples, self.loss_sum = int(before.get("samples", 0)), float(before.get("loss_sum", 0.0))
        self._begun = time.perf_counter() - float(before.get("seconds", 0.0))
        self._mark = (time.perf_counter(), self.samples, 0)  # when rates were last asked for, and the counts then
        self._tokens = 0

    def add(self, loss: float, batch: dict[str, Any]) -> None:
        """Count one batch; `loss` is its share of the step's loss."""
        self.samples, self.loss_sum = self.samples + self.batch, self.loss_sum + loss
        if "attention_mask" in batch:
            self._tokens += int(batch["attention_mask"].sum())
        elif "image_grid_thw" in batch:
            self._tokens += int(batch["image_grid_thw"].prod(-1).sum()) // 4

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def total(self) -> dict[str, Any]:
        """What a checkpoint's record keeps."""
        return {"samples": self.samples, "seconds": round(self.seconds, 1), "loss_sum": self.loss_sum}

    def rates(self) -> dict[str, float]:
        """Samples and tokens a second since the last call, evaluation apart; memory in MB (on a GPU: its peak)."""
        now, (then, samples, tokens) = time.perf_counter(), self._mark
        self._mark = (now, self.samples, self._tokens)
        past = max(now - then, 1e-9)
        return {
            "samples_per_s": (self.samples - samples) / past,
            "tokens_per_s": (self._tokens - tokens) / past,
            "memory_mb": memory() / 1e6,
        }

    def rates_of_all(self) -> dict[str, float]:
        """`rates` of processes that train together: tokens add up, `samples` were counted for all, the most memory."""
        rates = distributed.gather(self.rates())
        tokens = sum(rate["tokens_per_s"] for rate in rates)
        return {**rates[0], "tokens_per_s": tokens, "memory_mb": max(rate["memory_mb"] for rate in rates)}

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count against the rates."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            then, samples, tokens = self._mark
            self._mark = (then + time.perf_counter() - begun, samples, tokens)


def memory() -> int:
    """Bytes: the most that torch has held on the GPU, else what this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


class LogWriter(TrainerCallback):
    """Writes what is logged to log.jsonl, one line a time, and to stderr.

    Args:
        samples: of the whole stage.
    """

    def __init__(self, path: Path, stage: str, samples: int, tally: Tally) -> None:
        self.path, self.stage, self.samples, self.tally = path, stage, samples, tally
        self._last = -1  # step of the last line about training

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        step, evaluation = state.global_step, "eval_loss" in (logs or {})
        if not logs or (not evaluation and step == self._last):  # nothing new since the last line
            return
        figures = {k: v for k, v in logs.items() if k not in LEFT_OUT}
        if not evaluation:
            self._last = step
            figures = {"loss": logs.get("loss", logs.get("train_loss")), **figures}
        record = {
            "stage": self.stage,
            "step": step,
            "samples": self.tally.samples,
            "seconds": round(self.tally.seconds, 1),
            **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = "  ".join(f"{k} {v:.3g}" for k, v in figures.items() if v is not None)
        place = f"{self.stage} {record['samples']}/{self.samples}  {record['seconds']:.0f} s"
        tqdm.write(f"{place}  {shown}", file=sys.stderr)
        sys.stderr.flush()


# what the Trainer logs beside our figures and nobody needs twice
LEFT_OUT = ("epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class Bar(ProgressCallback):
    """The library's bar of steps, without its printed lines: `LogWriter` prints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}")

    def close(self) -> None:
        if self.training_bar is not None:
            self.training_bar.close()


@contextmanager
def logging_to(folder: Path, place: Path, stage: str, samples: int, tally: Tally, step: int) -> Iterator[list[Any]]:
    """The callbacks that log a stage of a run (none but in the main process); closed however the stage ends.

    Args:
        folder: of the run.
        place: of the stage.
        step: from which the stage goes on.
    """
    if not distributed.main():
        yield []
        return
    cut_log(folder / LOG, stage, step)
    writer = _board(folder / BOARD / place.name, step)
    callbacks: list[Any] = [LogWriter(folder / LOG, stage, samples, tally)]
    if writer is not None:
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(writer))
    bar = Bar() if sys.stderr.isatty() else None
    try:
        yield [*callbacks, bar] if bar is not None else callbacks
    finally:
        if bar is not None:
            bar.close()
        if writer is not None:
            writer.close()


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer; None, and a word about it, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard files: it is not installed (pip install 'relook[train]')", file=sys.stderr)
        return None
    if not step:
        shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def check_reporters(names: list[str]) -> None:
    """Refuse a `report_to` that transformers does not know, or whose package is missing.

    Raises:
        UserError: names it.
    """
    for name in names:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise UserError(f"report_to: {error}") from error
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to: {name} is not installed here; pip install it, or leave it out")


def reporters(names: list[str]) -> list[str]:
    """For TrainingArguments: all but what is written anyway."""
    return [name for name in names if name != "tensorboard"] or ["none"]


def cut_log(path: Path, stage: str, step: int) -> None:
    """Take out of a log what a stage logged past `step`, and a line that a killed run left unfinished."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _stays(line, stage, step)]
    if len(kept) < len(lines):
        with replacing(path) as file:
            file.writelines(line + "\n" for line in kept)


def _stays(line: str, stage: str, step: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return entry.get("stage") != stage or 0 < entry.get("step", step + 1) <= step


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; none where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def draw_curves(folder: Path) -> Path | None:
    """curves.png: the loss of every stage over its samples, in training and on validation.

    None where matplotlib is missing (a line says so), or nothing was logged.
    """
    entries = read_log(folder / LOG)
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    if not stages:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no curves: matplotlib is not installed (pip install 'relook[train]')", file=sys.stderr)
        return None
    across = min(3, len(stages))
    down = -(-len(stages) // across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel in panels[len(stages) :]:
        panel.remove()
    for panel, stage in zip(panels, stages, strict=False):
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
            points = [(e["samples"], e[key]) for e in entries if e["stage"] == stage and e.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
        panel.set_title(stage, fontsize=10)
        panel.set_xlabel("samples", fontsize=8)
        panel.set_ylabel("loss", fontsize=8)
        panel.tick_params(labelsize=7)
        if panel.lines:
            panel.legend(fontsize=7, frameon=False)
    aside = folder / f".{CURVES}"
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(folder / CURVES)
    return folder / CURVES
