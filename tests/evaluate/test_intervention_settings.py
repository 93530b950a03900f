"""Evaluation under interventions on looks: what a run asks for, records and shows in its report."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.hand_made_records import record, save
from support.synthetic import FIRST_SEED, PAGES, Pages

import relook
from relook.data import Question
from relook.errors import UserError
from relook.evaluate import SETTINGS, evaluate, read_folder
from relook.evaluate.report import collect
from relook.evaluate.report.browser import browser_data
from relook.evaluate.runner import Batch, Plan, Runner
from relook.evaluate.settings import Case, find_settings, why_not
from relook.evaluate.summary import compare_looks
from relook.evaluate.tasks import Task
from relook.interventions import INTERVENTIONS, STEPS
from relook.trace import Answer, Look, Usage

ROWS = ["auto-blank", "other", "blurred", "moved", "image-only", "text-only"]
SIZE, CALLED = (640, 400), (80, 100, 320, 250)


def case(**values) -> Case:
    given = {"random": np.random.default_rng(0)} | values
    return Case(Question("a.png", "?", ("a",), ()), SIZE, 8, **given)


def test_every_intervention_is_a_setting_that_leaves_the_look_to_the_model():
    assert {SETTINGS[name].intervention for name in ROWS} == set(INTERVENTIONS)
    for name in ROWS:
        options = SETTINGS[name].options(case(other=Image.new("RGB", (9, 9))))
        assert options["look"] == "auto" and options["intervention"].name == SETTINGS[name].intervention
        assert SETTINGS[name].needs == "region" and "the model decides" in SETTINGS[name].about
    assert SETTINGS["other"].options(case()) is None and "another image" in SETTINGS["other"].lacks
    drawn = {SETTINGS["moved"].options(case(random=np.random.default_rng(i)))["intervention"].step for i in range(40)}
    assert drawn == set(STEPS)
    assert not INTERVENTIONS["image-only"].text and not INTERVENTIONS["text-only"].image


def test_they_are_compared_with_the_free_choice_only():
    rows = [{**record(0, 1.0, look=name), "looks": []} for name in ("auto", "region", "none", *ROWS)]
    pairs = {(found.a, found.b) for found in compare_looks(rows)}
    assert {("auto", name) for name in ROWS} | {(name, "none") for name in ROWS} <= pairs
    assert not {("region", name) for name in ROWS} & pairs


class Looker:
    """A VLM that looks at `CALLED` of every image, and says the look's box and the other image's corner."""

    name, looks = "looker", ["region"]
    processor = SimpleNamespace(grid_size=8, region_margin=0, region_of="whole", max_looks=1)

    def ask_many(self, pairs, **options):
        return [self.answer(**pair) for pair in pairs]

    def answer(self, image, question, look="auto", intervention=None):
        box = CALLED if intervention is None else intervention.region(CALLED, (0, 0, *SIZE), 8)
        other = intervention and intervention.image
        said = str(other.getpixel((0, 0))[0]) if other else "-"
        return Answer(said, [Look("region", (1, 2, 3, 4), box, frame=(0, 0, *SIZE))], Usage(1, 1))


def pictures(tmp_path, shades):
    """A question a shade, about an image of its own; the same shade is the same file."""
    for shade in shades:
        Image.new("RGB", SIZE, (shade,) * 3).save(tmp_path / f"{shade}.png")
    return [
        Question(str(tmp_path / f"{shade}.png"), f"Which {i}?", (str(shade),), ()) for i, shade in enumerate(shades)
    ]


def records_of(questions, looks, n=None, batch=2, seed=0, vlm=None):
    task = Task("t", "", lambda *_: iter(questions))
    plan = Plan(("t",), tuple(looks), n, seed, batch, None, "default")
    object.__setattr__(plan, "questions", lambda task: iter(questions))
    runner, found = Runner(vlm or Looker(), plan), []
    for first in range(0, len(questions), batch):
        several = questions[first : first + batch]
        found += [each for setting in runner.settings for each in runner.ask(Batch(task, 0, first, several), setting)]
    return sorted(found, key=lambda each: (each["look"], each["index"]))


def test_the_image_of_another_question_is_another_image_and_stays_the_same(tmp_path):
    shades = [10, 10, 20, 30, 10, 40]
    questions = pictures(tmp_path, shades)
    found = records_of(questions, ["other"])
    assert [each["failed"] for each in found] == [None] * 6
    for each in found:
        other = each["other"]
        assert shades[other["index"]] != shades[each["index"]] and other["image"] == questions[other["index"]].image
        assert each["answer"] == str(shades[other["index"]]) and other["size"] == list(SIZE)
        assert each["looks"][0]["other"] == CALLED  # of an image as large
    drawn = [each["other"]["index"] for each in found]
    assert [each["other"]["index"] for each in records_of(questions, ["other"], batch=5)] == drawn
    assert [each["other"]["index"] for each in records_of(questions, ["other"], seed=1)] != drawn
    alone = records_of(pictures(tmp_path, [10, 10]), ["other"])
    assert all("no question here is about another image" in each["skipped"] for each in alone)
    missing = [questions[0], Question(str(tmp_path / "gone.png"), "?", ("a",), ())]
    first, second = records_of(missing, ["other"])
    assert "the image of another question: " in first["failed"] and "gone.png" in first["failed"] and second["failed"]


def test_a_moved_region_is_recorded_where_it_was_shown(tmp_path):
    questions = pictures(tmp_path, range(30))
    found = records_of(questions, ["moved"])
    boxes = {tuple(each["looks"][0]["box"]) for each in found}
    assert boxes == {(160, 100, 400, 250), (0, 100, 240, 250), (80, 150, 320, 300), (80, 50, 320, 200)}
    again = records_of(questions, ["moved"], batch=3)
    assert [each["looks"] for each in again] == [each["looks"] for each in found]


def test_which_rows_apply(tiny_vlm):
    region, clip = tiny_vlm(("region",)), tiny_vlm(("clip",))
    assert [setting.name for setting in find_settings(ROWS, region)] == ROWS
    with pytest.raises(UserError, match="'blurred' needs a region look"):
        find_settings(["blurred"], clip)
    server = SimpleNamespace(looks=["region", "clip"], interventions=("blank", "other", "moved"), engine=None)
    assert [name for name in ROWS if not why_not(SETTINGS[name], server)] == ["auto-blank", "other", "moved"]
    assert "in this process" in why_not(SETTINGS["clip-unconditioned"], server)


def test_a_run_of_a_model_that_reads(tmp_path):
    """cards-tiny: the first call is the same under every row, and the records say what was shown."""
    vlm = relook.load("cards-tiny")
    evaluate(vlm, ["cards"], ["auto", "none", *ROWS], n=3, out=tmp_path / "run", batch=3)
    folder = read_folder(tmp_path / "run")
    own = {each["index"]: each for each in folder.under("cards", "auto")}
    for name in ROWS:
        for each in folder.under("cards", name):
            assert each["failed"] is None and each["looks"][0]["cells"] == own[each["index"]]["looks"][0]["cells"]
            assert (each["looks"][0]["box"] == own[each["index"]]["looks"][0]["box"]) == (name != "moved")
            assert ("other" in each) == (name == "other")
            wide, high = vlm.processor.view(Image.new("RGB", each["size"]), "first").size
            assert each["seen"] == [wide, high]
    assert [each["scores"]["exact"] for each in folder.under("cards", "auto")] == [1.0] * 3
    assert [each["scores"]["exact"] for each in folder.under("cards", "auto-blank")] == [0.0] * 3
    data, _ = browser_data(collect([tmp_path / "run"]), 0)
    names = {number: row["look"] for number, row in enumerate(data["rows"])}
    shown = {names[answer["row"]]: answer["looks"][0] for answer in data["answers"] if answer.get("looks")}
    assert {name for name, look in shown.items() if "instead" in look} == set(ROWS)
    assert {name for name, look in shown.items() if look.get("uncut")} == {
        "auto-blank",
        "other",
        "blurred",
        "text-only",
    }


def test_pages_in_memory_lend_their_images(tiny_vlm):
    run = evaluate(tiny_vlm(("region",)), [PAGES], ["other"], n=2, batch=1, max_new_tokens=1)
    for question in run.results[0].questions:
        (found,) = question.answers
        assert found["other"]["where"] != found["where"] and found["other"]["pixels"] != found["pixels"]
        assert Pages(FIRST_SEED).sample(found["other"]["index"]).image.size == tuple(found["other"]["size"])


def test_reports_of_forced_blank_crops_are_as_they_were(tmp_path):
    look = {"kind": "region", "cells": [0, 0, 1, 1], "box": [0, 0, 9, 9], "problem": None}
    save(tmp_path / "run", [record(0, 1.0, look="blank", looks=[look], size=[20, 20], grid=8)])
    data, _ = browser_data(collect([tmp_path / "run"]), 0)
    assert data["answers"][0]["looks"][0]["instead"] == "shown blank"
