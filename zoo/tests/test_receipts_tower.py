"""zoo/tools/receipts_tower.py: the shipped encoder reads held-out receipts; mistakes give one-sentence errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from relook.errors import UserError
from zoo.tools import receipts_tower

RECEIPTS = ROOT / "../shared/data/receipts"
COMMAND = ["zoo/tools/receipts_tower.py", "zoo/recipes/receipts-tower"]


def some_receipts(folder: Path, count: int) -> Path:
    """A folder with the first `count` validation receipts."""
    for path in RECEIPTS.resolve().iterdir():
        if path.name != "val.jsonl":
            (folder / path.name).symlink_to(path)
    records = (RECEIPTS / "val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "val.jsonl").write_text("".join(records[:count]), encoding="utf-8")
    images = [re.search(r'"image": "([^"]+)"', record)[1] for record in records[:count]]
    (folder / "val_qa.jsonl").unlink(missing_ok=True)
    questions = (RECEIPTS / "val_qa.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in questions if re.search(r'"image": "([^"]+)"', line)[1] in images]
    (folder / "val_qa.jsonl").write_text("".join(kept), encoding="utf-8")
    return folder


@pytest.mark.skipif(not RECEIPTS.is_dir(), reason="../shared/data/receipts is not there")
def test_the_encoder_reads_held_out_receipts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*COMMAND, "--lines", "60", "--scans", str(some_receipts(tmp_path, 25))])
    receipts_tower.main()
    printed = capsys.readouterr().out
    means = {name.strip(): float(mean) for name, mean in re.findall(r"^(.{44}) +([\d.]+) %", printed, re.MULTILINE)}
    assert means["character error rate, mean over lines"] < 15
    assert means["whole lines right"] > 45
    assert means["first look: best token in the address"] > 90
    assert "n = 60" in printed and len(means) == 7


def test_missing_heads_or_data_raise(tmp_path, monkeypatch):
    done = subprocess.run(
        [sys.executable, *COMMAND, "--heads", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and f"{tmp_path} holds no heads.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*COMMAND, "--scans", str(tmp_path)])
    with pytest.raises(UserError, match="holds no receipts to read; give --scans FOLDER"):
        receipts_tower.main()
