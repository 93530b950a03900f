"""Effect of the second look: looks compared item by item, and paired tests against known values."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relook.evaluate.results import Evaluation
from relook.evaluate.runner import _look
from relook.evaluate.statistics import mcnemar, paired_test, sign_flips
from relook.evaluate.summary import compare_looks
from relook.trace import Look

# ---- paired tests


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (121, 59, 0.000004),  # these six by VassarStats, as statsmodels' tests have them (test_contingency_tables.py)
        (70, 59, 0.378688),
        (80, 59, 0.089452),
        (30, 60, 0.00206),
        (10, 30, 0.002221),
        (10, 10, 1.0),
        (0, 6, 2 / 64),  # six heads or six tails of six
        (1, 7, 2 * 9 / 256),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_a_fair_coins_two_tails(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, abs=1e-6) == mcnemar(second, first)


def test_fishers_sign_flips():
    """Darwin's maize, in eighths of an inch (R's HistData::ZeaMays; Fisher 1935, Design of Experiments, section 21):
    of the 2^15 arrangements 863 give a sum of at least the 314 observed (Ernst 2004), as many one of at most -314."""
    darwin = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48], dtype=float)
    assert sign_flips(darwin, draws=2**15) == pytest.approx(1726 / 2**15) == pytest.approx(0.0527, abs=1e-4)
    assert sign_flips(darwin, seed=1) == pytest.approx(0.0527, abs=0.01)  # 10,000 draws in place of all


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_all_signs_are_all_signs(differences):
    sums = np.array(differences, dtype=float)
    totals = [abs(np.dot(signs, sums)) for signs in product((1, -1), repeat=len(sums))]
    assert sign_flips(sums) == pytest.approx(np.mean([total >= abs(sums.sum()) - 1e-9 for total in totals]))


def test_questions_about_one_image_are_one_vote():
    apart = paired_test([(f"page {i}", 1.0, 0.0) for i in range(8)])
    together = paired_test([("page", 1.0, 0.0) for _ in range(8)])
    assert (apart, together) == (2 / 256, 1.0)
    assert paired_test([]) is None


# ---- looks against each other


def record(look: str, index: int, right: float, looked: bool = True, task: str = "t") -> dict:
    looks = [{"kind": "region", "problem": None}] if looked else []
    empty = {
        "image": f"{index}.png",
        "where": "",
        "question": "",
        "accepted": [],
        "field": None,
        "failed": None,
        "skipped": None,
    }
    return {"task": task, "look": look, "index": index, "scores": {"exact": right}, "looks": looks, **empty}


def arm(look: str, rights: str, looked: str = "") -> list[dict]:
    """Records of a look: "10-" is right, wrong, failed."""
    looked = looked or "1" * len(rights)
    return [record(look, i, float(r), looked[i] == "1") for i, r in enumerate(rights) if r != "-"]


def test_questions_are_counted_by_which_look_gets_them_right():
    (found,) = compare_looks([*arm("auto", "1110-1", "110101"), *arm("none", "001011", "000000")])
    assert (found.a, found.b, found.score, found.n) == ("auto", "none", "exact", 5)
    assert (found.only_a, found.only_b, found.both, found.neither) == (2, 0, 2, 1)
    assert found.gain.mean == pytest.approx(2 / 5)
    assert found.looked.mean == pytest.approx(2 / 4) and found.looked.n == 4  # not where it did not look
    assert found.p == 0.5  # two heads of two


def test_each_part_taken_away_has_its_line():
    looks = ("auto", "none", "region", "clip", "blank", "random", "clip-unconditioned")
    pairs = {(c.a, c.b) for c in compare_looks([r for look in looks for r in arm(look, "10")])}
    assert {(look, "none") for look in looks if look != "none"} <= pairs
    assert {("region", "blank"), ("region", "random"), ("clip", "clip-unconditioned"), ("auto", "blank")} <= pairs
    assert ("region", "clip-unconditioned") not in pairs and ("clip", "blank") not in pairs


def test_a_single_look_gives_no_comparison():
    assert compare_looks(arm("auto", "101")) == [] and str(Evaluation({}, [])) == ""


def test_the_table_says_it_in_points():
    evaluation = Evaluation({}, [], compare_looks([*arm("auto", "11110000"), *arm("none", "00000001")]))
    line = next(line for line in str(evaluation).splitlines() if line.startswith("t: auto - none"))
    assert line.split()[4:9] == ["8", "4", "1", "0", "3"] and "+37.5" in line and line.split()[-1] == "0.375"
    assert evaluation.to_dict()["compared"][0]["only_a"] == 4


def test_tasks_are_kept_apart():
    mixed = [*arm("auto", "11"), *arm("none", "00"), record("auto", 0, 1.0, task="u"), record("none", 0, 1.0, task="u")]
    assert [(c.task, c.n, c.gain.mean) for c in compare_looks(mixed)] == [("t", 2, 1.0), ("u", 1, 0.0)]


def test_a_map_that_is_no_numbers_is_not_written_into_records():
    """What stands in a file of records is JSON, which has no NaN; a map of numbers is kept."""
    sound, broken = (_look(Look("clip", attention=np.full((2, 2), value))) for value in (0.123, np.nan))
    assert sound["attention"] == [[0.12, 0.12]] * 2 and "attention" not in broken
    json.dumps([sound, broken], allow_nan=False)
