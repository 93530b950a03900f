"""docs/data.md: every command, run in order in an empty folder, prints what the page shows."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from support import ROOT
from typer.testing import CliRunner

from relook.cli import app

PAGE = ROOT / "docs/data.md"
SHARED = {name: ROOT / "../shared/data" / name for name in ("receipts", "viscot_benchmark")}


def transcripts(page: str) -> list[tuple[str, str]]:
    """(command, what the page says it prints) in order, of all blocks that hold commands."""
    found: list[tuple[str, str]] = []
    for block in re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed.rstrip("\n")))
    return found


def printed_by(command: str) -> str:
    """stdout and stderr together, without spaces at line ends."""
    if command.startswith("relook "):
        text = CliRunner().invoke(app, shlex.split(command)[1:]).output
    else:
        text = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


def test_the_page_shows_what_its_commands_print(tmp_path, monkeypatch):
    """Commands on files that only lie beside the checkout are passed over where they do not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    absent = {name for name, folder in SHARED.items() if not folder.is_dir()}
    for name in SHARED.keys() - absent:
        (tmp_path / name).symlink_to(SHARED[name])
    run, without = 0, re.compile("|".join([f"{name}[/ ]" for name in absent]) or "(?!)")
    made: set[str] = set()  # by a command that was passed over
    for command, says in transcripts(PAGE.read_text(encoding="utf-8")):
        words = command.split()
        if without.search(command) or made & {*words}:
            made |= {words[4]} if words[2] == "build" else set()
            continue
        shown = printed_by(command)
        parts = [re.escape(part) for part in re.split(r"^\.\.\.(?:\n|$)", says, flags=re.MULTILINE)]
        if not re.fullmatch(r"(?:.*\n?)*?".join(parts), shown):
            pytest.fail(f"$ {command}\nprints\n{shown}\nbut {PAGE.name} says\n{says}")
        run += 1
    assert run > 15
