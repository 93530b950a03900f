"""docs/own-data.md: its commands run in order, on a CSV, a few pages and two training steps."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest
from support import ROOT
from support.synthetic import Pages
from typer.testing import CliRunner

from relook.cli import app

PAGE = ROOT / "docs/own-data.md"
SHORT = [f"stages.{stage}.{size}" for stage in ("look", "settle") for size in ("samples=2", "batch=1")]
SHORT += [
    "validation.items=2",
    "validation.examples=2",
    "validation.questions=1",
    "threads=1",
    "workers=0",
    "evaluate_every=2",
]
QUICK = {"train": SHORT, "evaluate": ["--n", "2"]}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of somebody with ten receipts and a CSV of questions about them."""
    (tmp_path / "own/images").mkdir(parents=True)
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    world, lines = Pages(5), []
    for number in range(10):
        page = world.sample(number)
        page.image.save(tmp_path / f"own/images/{number:03}.png")
        for qa in page.qas[:2]:
            lines.append({"image": f"images/{number:03}.png", "question": qa.question, "answer": qa.answer})
    with (tmp_path / "own/questions.csv").open("w", newline="") as file:
        (table := csv.DictWriter(file, [*lines[0]])).writeheader()
        table.writerows(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own"


def commands() -> list[list[str]]:
    """What a reader would type."""
    lines = re.findall(r"^\$ relook (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [[part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)] for line in lines]


def serve(words: list[str]) -> str:
    """The page that a server shows, which is then stopped."""
    command = [sys.executable, "-m", "relook", *words, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as running:
        try:
            address = next(found.group() for line in running.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
            return urllib.request.urlopen(address, timeout=60).read().decode()
        finally:
            running.kill()


def test_the_page_as_written(own):
    pytest.importorskip("rapidocr_onnxruntime", reason="needs relook[ocr]", exc_type=ImportError)
    for words in commands():
        if words[0] == "serve":
            assert "<title>" in serve(words)
            continue
        done = CliRunner().invoke(app, [*words, *QUICK.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output)
    items, kept = (json.loads((own / name).read_text()) for name in ("items.json", "items.val.json"))
    assert len(items) + len(kept) >= 16 and kept, "OCR finds nearly all of the 20 answers"
    names = [{item["images"][0] for item in part} for part in (items, kept)]
    assert not names[0] & names[1]
    assert "data:image" in (own / "preview.html").read_text()
    results = json.loads((own / "evaluation/results.json").read_text())["results"]
    assert [(r["look"], r["answered"]) for r in results] == [("auto", 2), ("oracle", 2), ("none", 2)]
    assert (own / "answer.png").is_file() and (own / "run/curves.png").is_file()
    log = [json.loads(line) for line in (own / "run/log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in entry for entry in log)
    provenance = json.loads((own / "run/final/config.json").read_text())["provenance"]
    assert provenance["recipe"] == "own-pages" and provenance["samples"] == 4
