"""Evaluation of looks that nest: what the settings ask for, what is counted of the first and the last look, records."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.hand_made_records import call, record, save
from support.synthetic import PAGES

from relook.data import Question
from relook.errors import UserError
from relook.evaluate import SETTINGS, evaluate
from relook.evaluate.report import collect
from relook.evaluate.report.browser import browser_data
from relook.evaluate.runner import Batch, Plan, Runner
from relook.evaluate.settings import Case, find_settings, random_box
from relook.evaluate.tasks import Task
from relook.regions import cells_in, covered
from relook.trace import Answer, Look, Usage, region_turns
from relook.train.validation import region_iou

SIZE, BOX = (640, 400), (100, 120, 110, 126)
# On cells of 80 x 50 px the box lies in (1, 2), which is 80,100,160,150; on cells of 10 x 6.25 px of that in (2, 3..4).
FIRST = Look("region", (1, 2, 1, 2), (80, 100, 160, 150), frame=(0, 0, *SIZE))
SECOND = Look("region", (2, 3, 2, 4), (100, 118, 110, 131), frame=FIRST.box, turn=1)
BESIDE = Look("region", (6, 3, 6, 4), (140, 118, 150, 131), frame=FIRST.box, turn=1)


def case(boxes=(BOX,), size=SIZE, seed=0, **values) -> Case:
    return Case(Question("a.png", "?", ("a",), tuple(boxes)), size, 8, np.random.default_rng(seed), **values)


# -- settings


def test_the_annotated_region_is_reached_step_by_step_and_no_further():
    assert SETTINGS["oracle"].options(case(looks=3)) == {"box": BOX, "max_looks": 2}
    assert SETTINGS["oracle"].options(case(looks=1)) == {"region": (1, 2, 1, 2), "max_looks": 1}
    assert SETTINGS["oracle"].options(case([(0, 0, 600, 400)], looks=3)) == {"region": (0, 0, 7, 7), "max_looks": 1}
    assert SETTINGS["oracle"].options(case([(900, 0, 950, 10)], looks=3)) is None
    assert SETTINGS["once"].options(case(looks=3)) == {"look": "region", "max_looks": 1}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.tuples(*[st.integers(2, 600)] * 2), seed=st.integers(0, 99))
def test_a_random_region_has_the_annotated_ones_size(data, size, seed):
    x, y = (data.draw(st.integers(0, side - 1)) for side in size)
    box = (x, y, data.draw(st.integers(x + 1, size[0])), data.draw(st.integers(y + 1, size[1])))
    drawn = random_box(case([box], size, seed, looks=2))
    assert (drawn[2] - drawn[0], drawn[3] - drawn[1]) == (box[2] - box[0], box[3] - box[1])
    assert drawn[0] >= 0 and drawn[1] >= 0 and drawn[2] <= size[0] and drawn[3] <= size[1]
    asked = SETTINGS["random"].options(case([box], size, seed, looks=2))
    assert asked.get("box", drawn) == drawn and asked["max_looks"] == (2 if "box" in asked else 1)


def test_once_is_for_models_that_look_more_often(tiny_vlm):
    with pytest.raises(UserError, match="'once' leaves out further looks, and this model takes one"):
        find_settings(["once"], tiny_vlm())


# -- what is counted


def test_turns_of_regions():
    wrong = Look("region", problem="cut off")
    assert region_turns([wrong, FIRST, Look("clip"), SECOND, BESIDE], nested=True) == [[FIRST], [SECOND, BESIDE]]
    assert region_turns([FIRST, SECOND], nested=False) == [[FIRST, SECOND]]
    assert region_turns([wrong, Look("clip")], nested=True) == []
    whole = Look("region", (0, 0, 7, 7), (0, 0, *SIZE), frame=(0, 0, *SIZE))
    assert region_turns([whole, FIRST, SECOND], nested=True) == [[whole, FIRST], [SECOND]]


class Looks:
    """A VLM that answers with these looks, on a processor of these settings."""

    looks, name, image = ["region"], "looks", Image.new("RGB", SIZE)

    def __init__(self, *taken: Look, region_of: str = "last"):
        self.taken = list(taken)
        self.processor = SimpleNamespace(grid_size=8, region_margin=0, region_of=region_of, max_looks=3)

    def ask_many(self, requests, **options):
        return [Answer("a", self.taken, Usage(1, 1), image=self.image) for _ in requests]


def recorded(vlm, boxes) -> dict:
    question = Question(vlm.image, "?", ("a",), tuple(boxes))
    plan = Plan(("t",), ("region",), 1, 0, 1, None, "default")
    task = Task("t", "", lambda *_: iter([question]))
    (found,) = Runner(vlm, plan).ask(Batch(task, 0, 0, [question]), SETTINGS["region"])
    return found


def test_recall_and_iou_are_of_the_last_look_and_the_first_has_its_own():
    half = (100, 118, 120, 131)  # the second look shows half of it
    found = recorded(Looks(FIRST, SECOND), [half])
    assert (found["first_recall"], found["recall"], found["iou"]) == (1, 0.5, 0.5)
    assert [look.get("frame") for look in found["looks"]] == [None, FIRST.box]
    json.dumps(found)
    both = recorded(Looks(FIRST, SECOND, BESIDE), [SECOND.box, BESIDE.box])
    assert (both["first_recall"], both["recall"], both["iou"]) == (1, 1, 1)
    alone = recorded(Looks(FIRST), [half])
    assert alone["first_recall"] == alone["recall"] == 1 and alone["iou"] == pytest.approx(260 / 4000)
    assert recorded(Looks(), [half])["first_recall"] is None


def test_records_of_other_models_are_as_they_were():
    flat = Look("region", SECOND.cells, (160, 150, 240, 250), frame=(0, 0, *SIZE))
    found = recorded(Looks(FIRST, flat, region_of="whole"), [(80, 100, 160, 150), (160, 150, 240, 200)])
    assert "first_recall" not in found and all("frame" not in look for look in found["looks"])
    assert found["recall"] == 1 and found["iou"] == pytest.approx(8000 / 12000)


def test_validation_counts_the_last_look():
    answer = Answer("a", [FIRST, SECOND], image=Image.new("RGB", SIZE))
    assert region_iou(answer, (SECOND.box,), 8, nested=True) == 1
    assert region_iou(answer, (FIRST.box,), 8, nested=True) == pytest.approx(130 / 4000)


def test_the_browser_has_the_view_of_a_nested_look(tmp_path):
    looks = [{"kind": "region", "cells": look.cells, "box": look.box, "problem": None} for look in (FIRST, SECOND)]
    looks[1]["frame"] = SECOND.frame
    changes = {"size": SIZE, "grid": 8, "looks": looks, "recall": 0.5, "first_recall": 1.0}
    save(tmp_path / "run", [record(0, 1.0, look="region", **changes)])
    data, _ = browser_data(collect([tmp_path / "run"]), 0)
    first, second = data["answers"][0]["looks"]
    assert first["named"] == [*FIRST.box] or first["named"] == FIRST.box
    assert tuple(second["named"]) == SECOND.box and second["frame"] == [*FIRST.box] and second["grid"] == 8
    assert "frame" not in first and (data["answers"][0]["recall"], data["answers"][0]["first"]) == (0.5, 1.0)
    assert "first recall %" in call("report", tmp_path / "run").stdout


# -- the real loop


def test_the_first_pixel_is_looked_at_as_any_other_box(tiny_vlm):
    """Alone it would pass for a box in fractions of the image's sides."""
    vlm = tiny_vlm(looks=("region",), region_of="last", max_looks=3, region_margin=0)
    question = Question(Image.new("RGB", SIZE), "?", ("a",), ((0, 0, 1, 1),))
    task = Task("t", "", lambda *_: iter([question]))
    plan = Plan(("t",), ("oracle",), 1, 0, 1, 2, "default")
    (found,) = Runner(vlm, plan).ask(Batch(task, 0, 0, [question]), SETTINGS["oracle"])
    assert found["failed"] is None and [look["box"] for look in found["looks"]] == [
        (0, 0, 80, 50),
        (0, 0, 10, 6),
        (0, 0, 1, 1),
    ]


def test_the_real_loop_reaches_what_is_annotated_in_steps(tiny_vlm):
    """A random model on pages: made to look, it sees the box in views that halve; `once`, it looks once."""
    vlm = tiny_vlm(looks=("region",), region_of="last", max_looks=3, region_margin=0)
    names = ["oracle", "random", "once", "none"]
    run = evaluate(vlm, [PAGES], names, n=3, batch=3, max_new_tokens=2, by=["field"])
    assert [result.answered for result in run.results] == [3] * 4, run.results[0].errors
    oracle = run.result("pages", "oracle")
    assert oracle.measures["recall"].mean == oracle.measures["first_recall"].mean == 1
    for question in oracle.questions:
        (found,) = question.answers
        views = [look["box"] for look in found["looks"]]
        frames = [tuple(look.get("frame") or (0, 0, *found["size"])) for look in found["looks"]]
        assert [(0, 0, *found["size"]), *map(tuple, views[:-1])] == frames
        for look, frame in zip(found["looks"], frames, strict=True):
            assert tuple(look["box"]) == cells_in(look["cells"], frame, 8) and covered(look["box"], found["boxes"][0])
    assert max(len(q.answers[0]["looks"]) for q in oracle.questions) > 1
    assert {len(q.answers[0]["looks"]) for q in run.result("pages", "once").questions} == {1}
    assert run.result("pages", "none").measures["first_recall"].n == 0
