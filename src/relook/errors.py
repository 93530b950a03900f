"""Errors that are shown to people. Each message is one line: what was seen, what was expected, what to do.

The command line maps `exit_code` to the process's exit status. Any other exception (a `TypeError`, a `KeyError`) is a
bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class RelookError(Exception):
    """The work was asked for rightly and failed (out of memory, a server that does not answer)."""

    exit_code = 1
    quiet = False  # where another process of the same work says it


class UserError(RelookError, ValueError):
    """The input was wrong. Also a `ValueError`, so library users can catch it without knowing relook."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint that does not fit: the message names missing, unexpected or ill-shaped weights."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """A context in which a `UserError` opens with the place of the record it is about, once."""
    try:
        yield
    except UserError as error:
        if not where or str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from None
