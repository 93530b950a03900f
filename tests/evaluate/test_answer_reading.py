"""Answers as models write them, read as a person would; beside them what lmms-eval and VLMEvalKit read.

Theirs were worked out by hand from their rules as published (read 2026-11-28): lmms-eval's
`parse_multi_choice_response` (from MMMU; where it finds nothing it draws an option at random, here None) and
VLMEvalKit's `can_infer` (rules before any judge model), over the options steel, rubber, wood, glass.
"""

from __future__ import annotations

import pytest

from relook.evaluate.judge import parse_score
from relook.evaluate.metrics import SCORERS, choice, read_letter

OPTIONS = {"A": "steel", "B": "rubber", "C": "wood", "D": "glass"}

LETTERS = [  # answer, ours, lmms-eval's, VLMEvalKit's
    ("B", "B", "B", "B"),
    ("b", "B", None, None),
    ("(B)", "B", "B", "B"),
    ("(b)", "B", None, None),
    ("B.", "B", "B", "B"),
    ("**B**", "B", None, "B"),
    ("B。", "B", None, None),
    ("B. rubber", "B", "B", "B"),
    ("(B) rubber", "B", "B", "B"),
    ("B) rubber", "B", None, "B"),
    ("b) rubber", "B", None, "B"),
    ("B rubber", "B", "B", "B"),
    ("A、steel", "A", None, "A"),
    ("B because it is red.", "B", "B", None),
    ("Option B is correct.", "B", "B", "B"),
    ("Option A is correct.", "A", "A", None),
    ("The answer is B because it shines", "B", "B", "B"),
    ("The answer is B.", "B", "B", "B"),
    ("the answer is b", "B", None, None),
    ("Answer: (B)", "B", "B", "B"),
    ("答案是B", "B", "B", None),
    ("I think it is C", "C", "C", "C"),
    ("It is rubber (B)", "B", "B", "B"),
    ("rubber.", "B", None, "B"),
    ("The answer is rubber", "B", None, "B"),
    ("It is not (A), it is (B)", "B", "B", None),
    ("The answer is not B", None, "B", "B"),  # which of the others is not said
    ("(A) or (B)", None, "B", None),
    ("B or C", None, "C", None),
    ("B) no, (C)", None, "C", None),
    ("B) rubber or C) wood", None, None, None),
    ("B is wrong", None, "B", "B"),
    ("A. The answer is B.", None, "B", None),  # says two
    ("A red one", None, "A", "A"),  # an article
    ("The answer is a dog", None, None, None),
    ("i.e. rubber", None, None, "B"),
    ("Cotton", None, None, None),
    ("", None, None, None),
]


@pytest.mark.parametrize(("answer", "letter", "lmms_eval", "vlmevalkit"), LETTERS)
def test_the_option_that_an_answer_names(answer, letter, lmms_eval, vlmevalkit):
    scored = [key for key, words in OPTIONS.items() if choice(answer, (key, words))]
    assert scored == ([] if letter is None else [letter])


@pytest.mark.parametrize(("answer", "letter"), [("A rubber", None), ("I", "I"), ("I see a dog", None)])
def test_a_letter_that_is_a_word_is_none(answer, letter):
    assert read_letter(answer) == letter


AMOUNTS = [  # answer, accepted, score
    ("MYR 9.00", "RM 9.00", 1),
    ("9.00 RM", "RM 9.00", 1),
    ("US$9", "$9.00", 1),
    ("9 USD", "$9.00", 1),
    ("€9", "9 EUR", 1),
    ("Rs. 900", "Rs 900", 1),
    ("¥1,000", "JPY 1000", 1),
    ("RM 9.00", "$9.00", 0),
    ("5 10", "510", 0),  # two numbers
    ("1 234,50", "1234.50", 1),
    ("1\u00a0234,50", "1234.50", 1),  # no-break space
    ("1\u202f234,50", "1234.50", 1),  # narrow no-break space
    ("1\u2019234.50", "1234.50", 1),  # the Swiss apostrophe, curly
    ("12.05.2018", "12052018", 0),  # a date
    ("12.05.2018", "12,05,2018", 0),
    ("12.05.2018", "12.05.2018", 1),
    ("12,345,67", "12345.67", 0),
    ("1.2.3", "123", 0),
    ("007", "7", 0),  # a code
    ("9:00", "9.00", 0),
    ("03-1234", "3", 0),
    ("10%", "10", 0),
    ("1.234", "1,234", 0),
    ("1.500", "1.5", 1),
    ("0,500", "0.5", 1),
    ("1,23,456.00", "123456", 1),  # India's groups
    ("Rp 10.000", "Rp 10000", 1),  # rupiah have no decimals
    ("(9.00)", "-9.00", 1),
    ("\u22129.00", "-9.00", 1),  # the minus sign
    ("-RM9.00", "RM -9.00", 1),
    ("9.00-", "9.00", 0),
    ("9.-", "9.00", 1),
    ("１２.00", "12.00", 1),  # full width
    ("9.00.", "9.00", 1),
    ("A 9", "9", 0),
    ("9.00 SR", "9.00", 0),
    ("", "9.00", 0),
]


@pytest.mark.parametrize(("answer", "accepted", "score"), AMOUNTS)
def test_an_amount_and_what_is_none(answer, accepted, score):
    assert SCORERS["amount"](answer, [accepted]) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [  # lmms-eval wants the very word "yes" or "no"; POPE's script says yes to 1, 6, and no to 3
        ("1. Yes", "yes", 1),
        ("There isn\u2019t a dog.", "no", 1),
        ("Yes, not only one", "yes", 1),
        ("None", "no", 1),
        ("It cannot be seen", "no", 1),
        ("A dog.", "yes", 0),
        ("Dr. Smith: yes", "yes", 1),
        ("Now answer the question. yes", "yes", 1),
        ("A dog. It is not red.", "no", 0),  # says nothing about what was asked
        ("", "no", 0),
    ],
)
def test_yes_and_no(answer, accepted, score):
    assert SCORERS["yes_no"](answer, [accepted]) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "scores"),
    [
        ("Caf\u00e9", "cafe\u0301", ("exact", "anls", "vqa_exact")),  # NFC and NFD
        ("it\u2019s", "it's", ("exact", "anls", "vqa_exact")),
        ("x\u00a0b", "x b", ("exact", "anls", "vqa_exact")),
        ("a\u200bb", "ab", ("exact", "anls")),  # a zero-width space
        ("\u0130stanbul", "istanbul", ("exact", "anls")),
        ("stra\u00dfe", "STRASSE", ("exact", "anls")),  # the VQA challenge's normalization lowers case only
    ],
)
def test_one_text_in_two_encodings_is_one(answer, accepted, scores):
    assert [SCORERS[name](answer, [accepted]) for name in scores] == [1.0] * len(scores)


@pytest.mark.parametrize("name", [name for name in SCORERS if name not in ("choice", "yes_no")])
@pytest.mark.parametrize("answer", ["", " ", "the", "..."])
def test_an_empty_answer_is_never_right(name, answer):
    """The VQA challenge's normalization leaves nothing of "A" or "the", and nothing equals nothing."""
    assert SCORERS[name](answer, ["A"] * 10) == 0
    assert SCORERS[name](answer, ["A"]) == 0
    assert SCORERS[name]("", [""]) == 0


def test_what_normalizes_to_nothing_still_equals_itself():
    assert SCORERS["vqa_exact"]("a", ["A"]) == 1 and SCORERS["vqa"]("A", ["A"] * 10) == 1
    assert choice("", ("A", "the")) == 0


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 1 out of 10", None),
        ("score:1 of 10", None),
        ("Score: 1 point out of 10", None),
        ("score: 7/10", None),
        ("score: 100%", None),
        ("score: 0,5", 0.5),
        ("score: 0.5-0.7", None),
        ("score: 0.5, since the score 1 is for full", None),
        ("score: 0.5 (out of 1)", 0.5),
        ("score: S = 0.5", 0.5),
        ("score - 1", 1.0),
        ("score: -1", None),
        ("**Score:** 0.8", 0.8),
        ('{"score": 0.5}', 0.5),
        ("The score is .5.", 0.5),
        ("Underscore 1", None),
        ("score: 1.5", None),
        ("score: one", None),
    ],
)
def test_a_judges_reply(reply, score):
    assert parse_score(reply) == score
