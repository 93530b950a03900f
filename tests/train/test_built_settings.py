"""From questions to a model: how items are built is said by the model, stored with them, and compared where it is used.

Rows of "own data" (issue 26): nothing is copied from one command to the next.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT
from support.synthetic import Pages
from typer.testing import CliRunner

from relook.cli import app
from relook.data import read_items

BUILT = {"grid": 16, "margin": 1, "free_choice": True, "question_first": True}  # as receipts-tiny was trained
OTHER = {"grid": 8, "margin": 0, "free_choice": False, "question_first": False}


def relook(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def questions(tmp_path: Path, monkeypatch) -> Path:
    """Six pages with two questions each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    lines, pages = [], Pages(5)
    for number in range(6):
        page = pages.sample(number)
        page.image.save(tmp_path / f"{number}.png")
        for qa in page.qas[:2]:
            line = {"image": f"{number}.png", "question": qa.question, "answer": [qa.answer, f"no. {qa.answer}"]}
            lines.append(json.dumps(line | {"bboxs": [list(box) for box in qa.boxes], "field": qa.field}) + "\n")
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    return tmp_path / "questions.jsonl"


def test_the_model_says_how_items_are_built_and_they_store_it(questions):
    relook("data", "build", questions, "items.json", "--for", "receipts-tiny")
    item = next(read_items("items.json"))
    assert item.extra["built"] == BUILT and item.extra["field"] and len(item.extra["answers"]) == 2
    assert item.messages[0].content.endswith("\n<image>") and "Identify" not in item.messages[0].content
    for command in (("check", "items.json"), ("check", "items.json", "--for", "receipts-tiny")):
        assert "no fault found" in relook("data", *command)
    relook("data", "preview", "items.json", "page.html")
    assert json.loads(relook("data", "stats", "items.json", "--json"))["regions_not_on_the_grid"] == 0


def test_a_recipe_stands_for_the_model_it_starts_from(questions):
    Path("mine.yaml").write_text("model: {start: receipts-tiny}\n")
    relook("data", "build", questions, "items.json", "--for", "mine.yaml")
    relook("data", "build", questions, "usual.json", "--for", "recipes/own-data.yaml")  # a published checkpoint
    assert next(read_items("items.json")).extra["built"] == BUILT
    assert next(read_items("usual.json")).extra["built"] == OTHER | {"margin": 1}


def test_what_disagrees_with_the_model_is_refused_with_both_values(questions):
    said = relook("data", "build", questions, "items.json", "--for", "receipts-tiny", "--grid", 8, code=2)
    assert "grid is 8, but receipts-tiny has 16" in said
    said = relook("data", "build", questions, "items.json", "--for", "receipts-tiny", "--look", "seg", code=2)
    assert "receipts-tiny has region, clip" in said
    assert not Path("items.json").exists()


def test_train_dry_run_and_check_refuse_items_of_another_model(questions):
    relook("data", "build", questions, "items.json")
    assert next(read_items("items.json")).extra["built"] == OTHER
    differ = "grid 8 (the model: 16), margin 0 (the model: 1), free_choice False (the model: True)"
    train = ("train", "recipes/own-data.yaml", "data.path=items.json", "model.start=receipts-tiny", "out=run")
    for more in ((), ("--dry-run",)):
        said = relook(*train, "validation.items=2", "threads=1", *more, code=2)
        assert differ in " ".join(said.split()) and "--for" in said and not Path("run").exists()
    said = relook("data", "check", "items.json", "--for", "receipts-tiny", code=1)
    assert "12 other-settings" in said and differ[:60] in said
    assert "no fault found" in relook("data", "check", "items.json")  # for the model that they were built for


def test_items_of_two_builds_in_one_file_are_found(questions):
    relook("data", "build", questions, "one.jsonl", "--for", "receipts-tiny")
    relook("data", "build", questions, "two.jsonl", "--grid", 16)
    Path("both.jsonl").write_text(Path("one.jsonl").read_text() + Path("two.jsonl").read_text())
    report = json.loads(relook("data", "check", "both.jsonl", "--json", code=1))
    assert report["counts"]["other-settings"] == 12
    assert {finding["item"] for finding in report["findings"] if finding["rule"] == "other-settings"} == {
        *range(13, 25)
    }
