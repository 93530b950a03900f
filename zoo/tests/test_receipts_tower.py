"""zoo/tools/receipts_tower.py: the shipped encoder reads held-out receipts; mistakes give one-sentence errors."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support import ROOT

RECEIPTS = ROOT / "../shared/data/receipts"


def told(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "zoo/tools/receipts_tower.py", "zoo/recipes/receipts-tower", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not RECEIPTS.is_dir(), reason="../shared/data/receipts is not there")
def test_the_encoder_reads_held_out_receipts():
    done = told("--lines", 60)
    assert done.returncode == 0, done.stderr
    means = {name.strip(): float(mean) for name, mean in re.findall(r"^(.{44}) +([\d.]+) %", done.stdout, re.MULTILINE)}
    assert means["character error rate, mean over lines"] < 15
    assert means["whole lines right"] > 45
    assert means["first look: best token in the address"] > 90
    assert "n = 60" in done.stdout and len(means) == 7


def test_missing_heads_or_data_raise(tmp_path):
    for options, message in (
        (("--scans", tmp_path), f"{tmp_path} holds no receipts to read; give --scans FOLDER."),
        (("--heads", tmp_path), f"{tmp_path} holds no heads.safetensors"),
    ):
        done = told(*options)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
