"""From questions to a model: how items are built is said by the model, stored with them, and compared where it is used.

Rows of "own data" (issue 26): nothing is copied from one command to the next.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from support import ROOT
from support.own_items import conversation, picture
from support.synthetic import Pages
from typer.testing import CliRunner

from relook.cli import app
from relook.data import read_items, read_questions
from relook.data.dataset import open_items
from relook.data.rules import Data
from relook.evaluate.tasks import find_task
from relook.model.loading import load_processor
from relook.train.checkpoints import made_of
from relook.train.dry_run import dry_run
from relook.train.recipe import load_recipe

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


# -- one split: made once, by image, and used by training, validation and evaluation


def images_of(path: str) -> set[str]:
    return {item.images["images"][0] for item in read_items(path)}


def test_one_split_is_used_by_training_validation_and_evaluation(questions):
    relook("data", "build", questions, "items.json", "--for", "receipts-tiny", "--val", 0.4)
    taught, held = images_of("items.json"), images_of("items.val.json")
    assert taught and held and not taught & held
    items = open_items(Data.model_validate({"path": "items.json"}), 1, 2, load_processor("receipts-tiny"))
    assert {Path(item.images["images"][0]).name for item in items.validation} <= held and len(items.validation) == 2
    assert {Path(item.images["images"][0]).name for item in items} == taught  # nothing more is held out of them
    given = ["data.path=items.json", "model.start=receipts-tiny", "threads=1", "validation.items=2"]
    given += ["stages.tune.batch=1", "stages.tune.checkpointing=false"]
    (stage,) = dry_run("recipes/own-data.yaml", given).stages
    assert stage.items is not None and stage.items.lines()[0].endswith(
        f"{len(items)}, 2 more held out in items.val.json, {len(taught)} image files; every image is there, every token"
        " is known"
    )


def test_a_run_whose_split_has_changed_is_another_run(questions):
    relook("data", "build", questions, "items.json", "--val", 0.4)
    recipe = load_recipe("recipes/own-data.yaml", ["data.path=items.json", "model.start=receipts-tiny"])
    before = made_of(recipe, recipe.stages[0], None)
    Path("items.val.json").write_text(Path("items.json").read_text())
    assert made_of(recipe, recipe.stages[0], None) != before


def test_evaluate_reads_items_as_the_questions_they_were_built_from(questions):
    relook("data", "build", questions, "items.json", "--for", "receipts-tiny", "--free-choice")
    ours, theirs = list(read_questions("items.json")), list(read_questions(questions))
    same = ("text", "answers", "boxes", "field")
    assert [[getattr(q, name) for name in same] for q in ours] == [[getattr(q, name) for name in same] for q in theirs]
    assert [Path(q.image).name for q in ours] == [Path(q.image).name for q in theirs]
    said = relook(
        "evaluate", "-m", "receipts-tiny", "--tasks", "items.json", "--looks", "oracle", "--n", 4, "--seed", 3
    )
    assert "items: 4 of 12 questions, on 4 of 6 images (seed 3)" in said


def test_an_item_of_another_source_is_asked_with_the_boxes_of_its_calls(tmp_path):
    item = conversation(["region"], image="a.png")
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    (question,) = read_questions(tmp_path / "items.jsonl")
    assert question.boxes == ((8, 12, 32, 30),) and question.answers == ("a cat",)


def test_n_draws_over_images_by_the_seed(tmp_path):
    lines = [{"image": f"{n // 10}.png", "question": f"Q{n}?", "answer": "a"} for n in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = find_task(str(tmp_path / "q.jsonl"))
    drawn = {seed: task.sample(6, seed)[0] for seed in (0, 1)}
    for several in drawn.values():
        assert len({q.image for q in several}) == 6  # the first 6 lines would be one image
        assert [q.where for q in several] == sorted((q.where for q in several), key=lambda w: int(w.rpartition(":")[2]))
    assert drawn[0] != drawn[1] and drawn[0] == task.sample(6, 0)[0]
    assert Counter(q.image for q in task.sample(15, 0)[0]).most_common()[-1][1] == 2
    assert task.sample(100, 0)[1] == "q: 60 of 60 questions, on 6 of 6 images (seed 0)"
