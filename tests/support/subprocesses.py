"""Processes that start without importing torch and relook again, for tests that kill processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["PIL.Image", "torch", "relook.evaluate", "relook.evaluate.runner", "support"]


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_in_process(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """Run `function(*args)`, both picklable, in a process forked from a server that has imported `PRELOADED`.

    Returns:
        The process's exit code (0 done, 1 an exception, -9 SIGKILL) and what the function returned.
    """
    receiver, sender = _context().Pipe(duplex=False)
    process = _context().Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    process.join()
    returned = receiver.recv() if process.exitcode == 0 else None
    return process.exitcode, returned


def _send(sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    sender.send(function(*args))
