"""A folder that one run writes into: a second run is refused, and the lock of a killed process is gone."""

import subprocess
import sys

import pytest

from relook.errors import UserError
from relook.io import locked_folder

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
