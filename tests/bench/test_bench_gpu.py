"""The GPU training benchmark, run small on a CPU: it completes, and its count of model FLOPs is correct."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support import ROOT
from torch import nn

SCRIPT = ROOT / "tools" / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_in_small(bench, tmp_path: Path, capsys) -> None:
    small = ["--tiny", "--device", "cpu", "--batch", "1", "--steps", "1", "--warmup", "0", "--length", "700"]
    bench.main([*small, "--most", "1", "--looks", "none", "clip", "--out", str(tmp_path)])
    entries = json.loads((tmp_path / "bench.json").read_text())["entries"]
    told = [(e["model"], e["look"], e["checkpointing"]) for e in entries]
    assert told == [(m, look, c) for m in ("stock", "relook") for look in ("none", "clip") for c in (False, True)]
    assert all(e["seconds"] > 0 and e["largest_batch"] == 1 and e["utilisation"] is None for e in entries)
    table = (tmp_path / "bench.md").read_text()
    assert table.count("\n| ") == 5 and table.strip() in capsys.readouterr().out


def test_model_flops_are_those_of_the_products(bench) -> None:
    """6 for a weight and position that learns, 2 for one that rests; a CPU's attention is not counted."""
    length, patches = 700, 36 * 36
    model = bench.build("cpu", tiny=True, stock=True)
    counted = bench.flops(model, bench.batch(bench.config(True), "none", 1, length, "cpu", stock=True))
    expected = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            positions = patches // 4 if "merger" in name else patches if "visual" in name else length
            expected += (2 if "visual" in name else 6) * module.weight.numel() * positions
    assert counted == pytest.approx(expected, rel=0.02)


def test_the_largest_batch_is_found(bench) -> None:
    tried = []
    assert bench.largest(lambda n: tried.append(n) or n <= 21, 64) in (20, 21)
    assert max(tried) == 32
    assert bench.largest(lambda n: n <= 21, 16) == 16 and bench.largest(lambda n: False, 16) == 0
