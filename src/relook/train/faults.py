"""What can end a run before its time: a signal, a full disk, a loss that is no number, an exploding gradient.

Each becomes one line that says what happened, where the last good checkpoint is and what to do. Knows signals and
errors; not what a checkpoint holds.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from relook.errors import RelookError
from relook.train import ranks

ASKED_BY = (signal.SIGTERM, signal.SIGINT)  # from a scheduler; Ctrl-C
GO_ON = "the same command goes on from there"


class Stopped(RelookError):
    """A run that was told to stop and saved where it was. `exit_code` is what a shell makes of the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Signals:
    """While it lasts, a first SIGTERM or Ctrl-C is remembered in `seen` and not obeyed; a second one is.

    Processes that draw examples inherit it and pay no heed: they end with the one that trains. Outside the main thread
    Python allows no handlers, and signals do what they always do.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        self._noted = False  # `seen` may be another process's
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Signals:
        try:
            self._before = {number: signal.signal(number, self._note) for number in ASKED_BY}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agree(self) -> int | None:
        """What one of several processes has seen, all have; None while none has. All get the same answer."""
        told = next((seen for seen in ranks.gather(self.seen) if seen is not None), None)
        if told is not None:
            self.seen = told
        return told

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self._noted:
            self.__exit__()
            if signal.getsignal(number) is signal.SIG_IGN:  # a script's `command &` has SIGINT ignored: not twice
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(self._process, number)
            return
        self._noted, self.seen = True, number
        name = signal.Signals(number).name
        ranks.say(f"{name}: saving and stopping after this step (once more: at once)")


@contextmanager
def writing(path: Path, last: Callable[[], str]) -> Iterator[None]:
    """Around what writes files: a write that fails is told in one line, with the room there is and the last checkpoint.

    Raises:
        RelookError: the write failed; the libraries that write raise OSError, RuntimeError or SafetensorError.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:120]
        there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
        free = shutil.disk_usage(there).free / 1e6
        raise RelookError(f"{path} could not be written: {why} ({free:.0f} MB free). Make room; {last()}") from error


def check_loss(loss: float, step: int, last: Callable[[], str]) -> None:
    """Raise RelookError for a loss that is no number; `step` is the one it belongs to."""
    if not math.isfinite(loss):
        raise RelookError(f"the loss of step {step} is {loss}. Lower lr, or look at its examples; {last()}")


def check_gradient(norm: float, step: int, limit: float | None, last: Callable[[], str]) -> None:
    """Raise RelookError for a gradient (its norm before clipping) that is no number or beyond the recipe's max_grad."""
    if not math.isfinite(norm):
        raise RelookError(f"the gradient of step {step} has norm {norm}. Lower lr, or look at its examples; {last()}")
    if limit is not None and norm > limit:
        raise RelookError(
            f"the gradient of step {step} exploded: its norm is {norm:.3g}, over max_grad={limit:g}. "
            f"Lower lr, or raise max_grad; {last()}"
        )
