"""The command line. Each command parses its arguments, calls one library function and prints the result.

Results go to stdout (as JSON with `--json`), progress and warnings to stderr. Exit codes: 0 done, 1 the work failed,
2 the input was wrong (one line: what was found, what to do), 130 interrupted.
torch and transformers are imported inside the commands that need them, so that `relook --help` stays fast.
"""

from relook.cli.app import app, main

__all__ = ["app", "main"]
