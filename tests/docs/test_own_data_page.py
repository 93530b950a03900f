"""docs/own-data.md: its commands run in order, on a few pages and two training steps."""

from __future__ import annotations

import json
import re

import pytest
from support import ROOT
from support.synthetic import Pages
from typer.testing import CliRunner

from relook.cli import app

PAGE = ROOT / "docs/own-data.md"
SHORT = ["stages.tune.steps=2", "stages.tune.batch=1", "stages.tune.accumulate=1", "stages.tune.checkpointing=false"]
SHORT += ["validation.items=2", "validation.questions=1", "threads=1", "workers=0", "evaluate_every=2"]
QUICK = {"train": SHORT, "evaluate": ["--n", "2"]}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The folder of somebody with ten receipts and questions about them."""
    (tmp_path / "own/images").mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    world, lines = Pages(5), []
    for number in range(10):
        page = world.sample(number)
        page.image.save(tmp_path / f"own/images/{number}.png")
        for qa in page.qas[:2]:
            line = {"image": f"images/{number}.png", "question": qa.question, "answer": qa.answer, "field": qa.field}
            lines.append(json.dumps(line | {"bboxs": [list(box) for box in qa.boxes]}) + "\n")
    (tmp_path / "own/questions.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own"


def commands() -> list[list[str]]:
    """What a reader would type."""
    lines = re.findall(r"^\$ relook (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [[part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)] for line in lines]


def test_the_page_as_written(own):
    said = {}
    for words in commands():
        done = CliRunner().invoke(app, [*words, *QUICK.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output)
        said[" ".join(words[:2])] = done.stdout
    items, kept = (json.loads((own / name).read_text()) for name in ("items.json", "items.val.json"))
    assert len(items) + len(kept) == 20 and kept
    names = [{item["images"][0] for item in part} for part in (items, kept)]
    assert not names[0] & names[1]
    assert "data:image" in (own / "preview.html").read_text()
    results = json.loads((own / "evaluation/results.json").read_text())["results"]
    assert [(r["look"], r["answered"]) for r in results] == [("auto", 2), ("oracle", 2), ("none", 2)]
    assert (own / "answer.png").is_file() and (own / "run/curves.png").is_file()
    log = [json.loads(line) for line in (own / "run/log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in entry for entry in log)
    provenance = json.loads((own / "run/final/config.json").read_text())["provenance"]
    assert provenance["recipe"] == "own-data" and provenance["samples"] == 2
