"""The zoo's tasks: pages rendered again for reports, and the committed records of the shipped models reproduced."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from support import ROOT
from support.hand_made_records import record

from relook.errors import UserError
from relook.evaluate import collect, evaluate, find_task
from relook.evaluate.report import table_md
from relook.evaluate.report.pictures import gather
from relook.evaluate.report.rows import read_config
from zoo.worlds import make_world


def test_pages_are_drawn_again_unless_they_are_others_now():
    where = "cards page 3 of seed 1000000007"
    card = make_world("cards", 1_000_000_007).sample(3)
    asked = {
        "question": card.qas[0].question,
        "accepted": [card.qas[0].answer],
        "where": where,
        "image": None,
        "task": "cards",
    }
    shown = gather([record(3, 1, **asked) | {"image": None}], 9)
    assert list(shown.shown) == [where] and shown.shown[where][1] == card.image.size
    other = gather([record(3, 1, **{**asked, "question": "Another?"}) | {"image": None}], 9)
    assert not other.shown and "drawn differently now" in other.why[where]
    assert "in memory only" in gather([record(0, 1, where="somewhere") | {"image": None}], 9).why["somewhere"]


def test_missing_real_receipts_are_said_plainly(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zoo.tasks.REAL_RECEIPTS", Path("../nowhere/val_qa.jsonl"))
    with pytest.raises(UserError, match="needs the real receipts"):
        list(find_task("receipts-real").items(None, 0))


def test_tasks_say_how_many_questions_are_usual():
    assert find_task("cards").usual == 1000 and find_task("receipts").usual == 500


# ---- committed records


def test_the_experiment_in_the_repository_is_well_formed():
    plan = read_config(ROOT / "zoo/receipts/arms.yaml")
    assert {"a", "b", "b2", "c", "d", "e"} <= {row.name for row in plan.rows}


def test_the_experiments_table_is_what_its_records_give():
    folder = ROOT / "zoo/receipts"
    assert table_md(collect([folder / "arms.yaml"])) == (folder / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "task", "records"),
    [("cards-tiny", "cards", "cards"), ("receipts-tiny", "receipts", "receipts-float32")],
)
def test_shipped_models_answer_as_their_committed_records_say(tmp_path, model, task, records):
    """40 questions each, in batches of 8 as they were asked: answers and looks are the same word for word.

    In float32: in bfloat16 answers depend on the machine and its number of threads.
    """
    with gzip.open(ROOT / "zoo/records" / records / "records.jsonl.gz", "rt", encoding="utf-8") as file:
        known = [row for row in map(json.loads, file) if row["look"] == "auto" and row["index"] < 40]
    evaluate(model, [task], ["auto"], n=40, batch=8, dtype="float32", out=tmp_path)
    asked = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(known) == 40
    assert [(row["answer"], row["looks"]) for row in asked] == [(row["answer"], row["looks"]) for row in known]
