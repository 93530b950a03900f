"""Evaluation settings on the real loop: two settings differ exactly in what their names state.

The regions that a model sees and records are tested in test_run.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.synthetic import PAGES, Pages

from relook.data import Question
from relook.errors import UserError
from relook.evaluate import SETTINGS, evaluate
from relook.evaluate.settings import Case, find_settings
from relook.looks import LOOKS


@pytest.fixture(scope="module")
def asked(tiny_vlm):
    """Asks one question about a page under a setting of this name."""
    vlm = tiny_vlm()
    page = Pages(0).sample(0)
    question = Question(page.image, page.qas[0].question, (page.qas[0].answer,), tuple(page.qas[0].boxes))

    def ask(name: str):
        case = Case(question, page.image.size, vlm.processor.grid_size, np.random.default_rng(0))
        return vlm.ask_many(
            [{"image": question.image, "question": question.text, **SETTINGS[name].options(case)}], max_new_tokens=3
        )[0]

    return ask


@pytest.mark.parametrize("look", [name for name, spec in LOOKS.items() if spec.reencodes])
def test_an_unconditioned_look_sees_and_costs_the_same(asked, look):
    plain, without = asked(look), asked(f"{look}-unconditioned")
    assert plain.looks == without.looks and plain.transcript[:4] == without.transcript[:4]
    assert plain.usage.vision_patches == without.usage.vision_patches
    assert plain.looks[0].attention is not None and without.looks[0].attention is None


def test_old_names_are_accepted_with_a_notice():
    with pytest.warns(DeprecationWarning, match="SETTINGS"):
        from relook.evaluate import ARMS
    assert ARMS is SETTINGS


def test_regions_have_no_condition_to_leave_out():
    assert [name for name in SETTINGS if "unconditioned" in name] == [
        "clip-unconditioned",
        "detection-unconditioned",
        "seg-unconditioned",
    ]


def test_blank_asks_for_the_same_region_and_shows_nothing(asked):
    plain, blank = asked("region"), asked("blank")
    assert plain.looks == blank.looks and plain.transcript[:4] == blank.transcript[:4]
    assert plain.looks[0].image.size == blank.looks[0].image.size
    assert len(blank.looks[0].image.getcolors()) == 1 < len(plain.looks[0].image.getcolors(1 << 20))


def test_ablated_settings_need_the_look_itself(tiny_vlm):
    assert [arm.name for arm in find_settings(["blank", "seg-unconditioned"], tiny_vlm())] == [
        "blank",
        "seg-unconditioned",
    ]
    for name, has, lacks in (("seg-unconditioned", ("region", "clip"), "seg"), ("blank", ("clip",), "region")):
        with pytest.raises(UserError, match=f"{name!r} needs a {lacks} look"):
            find_settings([name], tiny_vlm(has))


def test_a_run_goes_through_them(tiny_vlm):
    looks = ["clip", "clip-unconditioned", "region", "blank"]
    run = evaluate(tiny_vlm(("region", "clip")), [PAGES], looks, n=2, batch=2, max_new_tokens=2)
    assert [result.answered for result in run.results] == [2] * 4, [result.errors for result in run.results]
    assert [list(result.kinds) for result in run.results] == [["clip"], ["clip"], ["region"], ["region"]]
