"""Locked folders and JSON lines: a second run is refused, a killed one leaves neither a lock nor a broken file."""

import subprocess
import sys

import pytest

from relook.errors import UserError
from relook.io import append_lines, locked_folder, read_lines

HOLD = """
import sys, time
from relook.io import locked_folder
with locked_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_kill(tmp_path):
    folder = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing here"), locked_folder(folder):
            pass
    finally:
        other.kill()
        other.wait()
    with locked_folder(folder):
        pass


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked_folder(tmp_path / "file" / "run"):
        pass


def test_lines_are_appended_after_a_write_that_was_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"a": 1}, {"text": "\u00e9 \udc80"}])
    with path.open("ab") as file:
        file.write(b'{"cut": "in the mid')
    append_lines(path, [{"b": 2}])
    assert read_lines(path) == [{"a": 1}, {"text": "\u00e9 \udc80"}, {"b": 2}]
