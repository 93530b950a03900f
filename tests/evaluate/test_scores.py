"""Scores, compared with official scripts' outputs, tables of papers and textbook examples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relook.errors import UserError
from relook.evaluate import SCORERS, SPLIT_SCORES
from relook.evaluate.metrics import (
    amount,
    choice,
    read_amount,
    relaxed,
    rouge_l,
    vqa_accuracy,
    vqa_exact,
    vqa_normalize,
    yes_no,
)
from relook.evaluate.split_metrics import split_scores
from relook.evaluate.summary import summarize

# ---- the VQA challenge

# What processPunctuation and processDigitArticle of the challenge's script (GT-Vision-Lab/VQA) make of each; it was
# also run beside ours on 200,000 random strings of these marks and words, without one difference.
OFFICIAL = {
    "The two dogs, dont they?": "2 dogs don't they",
    "red/blue": "red blue",
    "1,000.50": "1000.50",
    "No.": "no",
    "None": "0",
    "It's 3.5 m.": "it's 3.5 m",
    "a/b, c": "b c",
    "U.S.A.": "usa",
    "Yes!": "yes",
    "he'dve gone": "he'd've gone",
    "black-and-white": "black and white",
    "5,000 people; maybe": "5000 people maybe",
    "  The   Answer\n": "answer",
    "7:30 p.m.": "7:30 pm",
}


@pytest.mark.parametrize("text", OFFICIAL)
def test_vqa_normalisation_is_the_official_scripts(text):
    assert vqa_normalize(text) == OFFICIAL[text]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"ab19 .,;/'-?!()\n", "the ", "two ", "dont ", "1,000", "no."]), max_size=12))
def test_vqa_normalisation_is_lmms_evals(pieces):
    """The same steps as another project carries them, where that project is installed."""
    theirs = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric", reason="lmms-eval is not installed")
    processor, text = theirs.EvalAIAnswerProcessor(), "".join(pieces)
    spaced = text.replace("\n", " ").replace("\t", " ").strip()
    assert vqa_normalize(text) == processor.process_digit_article(processor.process_punctuation(spaced))


def test_vqa_exact_forgives_what_plain_exact_does_not():
    assert vqa_exact("The red one.", ["red 1"]) == 1 and SCORERS["exact"]("The red one.", ["red 1"]) == 0
    assert vqa_exact("blue", ["red"]) == 0


@pytest.mark.parametrize(("people", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_how_many_of_ten_agree(people, score):
    """The values that follow from leaving one person out in turn, as visualqa.org explains its metric."""
    assert vqa_accuracy("A dog", ["dog"] * people + ["cat"] * (10 - people)) == pytest.approx(score)


def test_vqa_accuracy_of_few_answers_is_a_match():
    assert (
        vqa_accuracy("dog", ["dog"]) == vqa_accuracy("dog", ["cat", "dog"]) == 1 and vqa_accuracy("dog", ["cat"]) == 0
    )


# ---- numbers


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("105", "100", 1),  # 5 % is in
        ("105.01", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("52%", "0.5", 1),  # ChartQA's script reads a percentage as its share
        ("52", "50%", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),
        ("Yes", "yes", 1),
        ("1.0", "one", 0),
        ("2018", "2012", 1),  # known of the metric: years are numbers to it
    ],
)
def test_relaxed_accuracy_as_chartqa_has_it(answer, accepted, score):
    assert relaxed(answer, [accepted]) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("RM 9.00", "9.00", 1),
        ("9.00", "RM9.00", 1),
        ("RM9", "9.00", 1),
        ("9,00 €", "9.00", 1),
        ("$1,234.50", "1234.5", 1),
        ("1.234,50", "1,234.50", 1),
        ("1,234", "1234", 1),
        ("12,345,678", "12345678", 1),
        ("S$ 5", "$5", 0),  # Singapore's dollars are not known to be these
        ("$9.00", "RM 9.00", 0),
        ("9.01", "9.00", 0),
        ("90.0", "9.00", 0),
        ("9.00 (incl. 0.50 tax)", "9.00", 0),  # which of the two?
        ("12/03/2018", "12/03/2018", 1),  # no amount: exact match
        ("12/03/2018", "12-03-2018", 0),
        ("Sin Thye", "sin thye", 1),
        ("-5.00", "5.00", 0),
        ("6%", "6", 0),
    ],
)
def test_amounts_are_numbers_with_or_without_a_currency(answer, accepted, score):
    assert amount(answer, [accepted]) == score


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["{:.2f}", "{:,.2f}", "RM {:.2f}", "{:,.2f} USD", "${:,.2f}"]))
def test_an_amount_is_read_as_it_was_written(cents, form):
    value, _ = read_amount(form.format(cents / 100))
    assert value * 100 == cents


# ---- one of a few


@pytest.mark.parametrize(
    ("answer", "score"), [("B", 1), ("(B) leather", 1), ("C", 0), ("Rubber.", 1), ("leather", 0), ("A rubber", 1)]
)
def test_a_choice_is_a_letter_or_else_the_options_words(answer, score):
    """A letter decides where there is one; "A rubber" names none, and without its article it is the option."""
    assert choice(answer, ["B", "rubber"]) == score


def record(answer: str, accepted: str, field: str | None = None, **scores: float) -> dict:
    usage = {"lm_positions": 1, "vision_patches": 1, "generated_tokens": 1}
    asked = {"index": 0, "question": "", "image": None, "where": ""}
    empty = {"looks": [], "recall": None, "iou": None, "seconds": 0.1, "failed": None, "skipped": None}
    return {
        "answer": answer,
        "accepted": [accepted],
        "field": field,
        "scores": scores,
        "usage": usage,
        **asked,
        **empty,
    }


def split(right: int, false: int, missed: int, rejected: int) -> list[dict]:
    counts = ((right, "Yes.", "yes"), (false, "Yes", "no"), (missed, "No, it is not.", "yes"), (rejected, "no", "no"))
    found = [record(said, true, yes_no=yes_no(said, [true])) for n, said, true in counts for _ in range(n)]
    return [each | {"where": f"page {number}"} for number, each in enumerate(found)]


# POPE's own table (Li et al., arXiv 2305.10355, table 3, COCO, random), looked up: accuracy, precision, recall, F1, yes
# in percent, of 3000 questions half of which have a yes; the counts follow from recall and yes.
POPE_TABLE = {
    "LLaVA": ((1497, 1364), (54.43, 52.32, 99.80, 68.65, 95.37)),
    "mPLUG-Owl": ((1493, 1394), (53.30, 51.71, 99.53, 68.06, 96.23)),
    "MiniGPT-4": ((1240, 405), (77.83, 75.38, 82.67, 78.86, 54.83)),
    "InstructBLIP": ((1409, 247), (88.73, 85.08, 93.93, 89.29, 55.20)),
}


@pytest.mark.parametrize("model", POPE_TABLE)
def test_yes_no_figures_are_those_of_popes_table(model):
    (right, false), published = POPE_TABLE[model]
    records = split(right, false, 1500 - right, 1500 - false)
    result = summarize("pope", "none", {"": [each | {"index": i} for i, each in enumerate(records)]}, ["yes_no"])
    names = ("yes_no", "yes_precision", "yes_recall", "yes_f1", "yes_ratio")
    assert [round(100 * result.measures[name].mean, 2) for name in names] == list(published)


def test_an_interval_of_f1_holds_what_other_samples_give():
    """Draw samples from a known population: about 95 of 100 intervals hold its F1."""
    generator = np.random.default_rng(0)
    held, (right, false, missed, rejected) = 0, (0.4, 0.1, 0.1, 0.4)
    true = 2 * right / (2 * right + false + missed)
    for trial in range(100):
        counts = generator.multinomial(150, (right, false, missed, rejected))
        f1 = SPLIT_SCORES["yes_f1"].estimate(split(*counts), seed=trial)
        held += f1.low <= true <= f1.high
    assert 88 <= held <= 100


def test_what_is_not_defined_is_none_and_not_nought():
    never = split(0, 0, 3, 3)
    figures = split_scores(never)
    assert figures["yes_precision"].mean is None and figures["yes_recall"].mean == 0
    assert "yes_f1" not in split_scores([record("x", "x", exact=1.0)])


def test_cv_bench_weighs_its_sources_as_published():
    """The formula of the data set's card, by hand: ((2/4 + 1/2) / 2 + 1) / 2."""
    rights = {"ADE20K": (1, 1, 0, 0), "COCO": (1, 0), "Omni3D": (1,)}
    records = [record("", "", source, choice=float(r)) for source, each in rights.items() for r in each]
    assert split_scores(records)["cv_bench"].mean == pytest.approx(0.75)
    assert "cv_bench" not in split_scores(records[:4])


# ---- captions


def test_rouge_l_by_the_papers_example():
    """Lin (2004), section 3.1: against "police killed the gunman", S2 scores 3/4 and S3 2/4."""
    reference = ["police killed the gunman"]
    assert rouge_l("police kill the gunman", reference) == 0.75
    assert rouge_l("the gunman kill police", reference) == 0.5
    assert rouge_l("", reference) == 0 and rouge_l("Police killed the gunman!", ["x", *reference]) == 1


@pytest.mark.slow  # make test-slow installs the library
def test_cider_is_the_librarys():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed (extra: captions)")
    said = {"1": "a dog runs on the grass", "2": "two men ride a red bus", "3": "a cat"}
    wanted = {"1": "a dog runs over green grass", "2": "two people ride a bus", "3": "a bird on a wire"}
    records = [record(said[key], wanted[key], rouge_l=0.5) for key in said]
    theirs, _ = scorer.Cider().compute_score({k: [v] for k, v in wanted.items()}, {k: [v] for k, v in said.items()})
    assert split_scores(records)["cider"].mean == pytest.approx(theirs)


def test_cider_without_its_library_says_what_to_install(monkeypatch):
    row = SPLIT_SCORES["cider"]
    monkeypatch.setattr("relook.evaluate.split_metrics.find_spec", lambda name: None)
    assert "cider" not in split_scores([record("a", "a", rouge_l=1.0)])
    with pytest.raises(UserError, match=r"pycocoevalcap.*relook\[captions\]"):
        row.require()


def test_every_score_is_between_nought_and_one_and_right_answers_get_one():
    cases = SimpleNamespace(choice=("B", ["B", "x"]), yes_no=("yes", ["Yes"]), vqa=("x", ["x"] * 10))
    for name, score in SCORERS.items():
        answer, accepted = getattr(cases, name, ("x", ["x"]))
        assert score(answer, accepted) == 1 and score("q", accepted) == 0, name
