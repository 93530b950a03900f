"""The command line: each command parses, calls one library function, and prints.

Results go to stdout (`--json` for machines), progress and warnings to stderr. Exit codes: 0 done, 1 the work failed,
2 the input was wrong (one line: what was seen, what to do), 130 interrupted.
Torch and transformers load inside the commands that need them, so `relook --help` stays quick.
"""

from relook.cli.app import app, main

__all__ = ["app", "main"]
