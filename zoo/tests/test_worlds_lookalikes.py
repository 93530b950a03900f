"""Receipts with look-alike rows: answers in their boxes, beside the labels a reader would look for."""

from __future__ import annotations

import re
from datetime import datetime

import numpy as np
import pytest

from zoo.worlds import make_world, receipts_asked, receipts_lookalikes, receipts_text
from zoo.worlds.receipts import Receipts

PAGES = 80
AMOUNT = re.compile(r"-?\d[\d,]*\.\d\d")
LABELS = {  # what stands before the answer in its row, or in its own line: written from real receipts, not from ROWS
    "subtotal": r"S(UB|/) ?-?TOTAL",
    "net": r"EXCL|BEFORE",
    "gross": r"TOTAL",
    "rounding": r"ROUND",
    "total": r"TOTAL|AMOUNT DUE",
    "deposit": r"DEPOSIT",
    "due": r"BAL|OUTSTANDING",
    "change": r"CHANGE|BALANCE",
    "quantity": r"QTY|QUANTITY",
    "taxable": r"[SZ]R?( |$)",
    "due_date": r"DUE",
    "printed": r"PRINT",
    "fax": r"F",
    "mobile": r"H/P|HP|MOBILE",
    "gst": r"GST",
}
FORMS = ["%d/%m/%Y", "%d-%m-%Y", "%d/%m/%y", "%d-%m-%y", "%d-%b-%Y", "%d.%m.%Y", "%Y-%m-%d", "%d/%b/%Y", "%d%b%Y"]


@pytest.fixture(scope="module")
def pages():
    world = make_world("receipts-lookalikes", 11)
    return [world.sample(i) for i in range(PAGES)]


def inside(page, box):
    lines = [
        line
        for line in page.meta["lines"]
        if line.box[0] >= box[0] and line.box[1] >= box[1] and line.box[2] <= box[2] and line.box[3] <= box[3]
    ]
    return " ".join(line.text for line in sorted(lines, key=lambda line: line.box[1]))


def row_of(page, box):
    """Text of the line at a box and of those before it in its row (print runs to the right, rows may be skewed)."""
    lines = page.meta["lines"]
    at = next(i for i, line in enumerate(lines) if line.box == box)
    first = at
    while first and lines[first - 1].box[2] <= lines[first].box[0]:
        first -= 1
    return " ".join(line.text for line in lines[first : at + 1])


def cents(text):
    return round(100 * float(text.replace(",", "")))


def answers_of(page):
    return {qa.field: qa.answer for qa in page.qas}


def test_a_recipes_name_and_the_option_are_one_world(pages):
    again = Receipts(11, lookalikes=True).sample(3)
    assert np.array_equal(np.asarray(again.image), np.asarray(pages[3].image)) and again.qas == pages[3].qas
    assert again.meta == pages[3].meta


def test_every_question_comes_up_once_a_page_and_its_answer_stands_in_its_box(pages):
    seen = set()
    for page in pages:
        fields = [qa.field for qa in page.qas]
        assert len(fields) == len(set(fields)) and {"company", "date", "address", "total"} <= set(fields)
        seen |= set(fields)
        for qa in page.qas:
            if qa.field not in ("items", "cash"):  # counted, or concluded
                (box,) = qa.boxes
                assert re.sub(r"\s+", "", qa.answer) in re.sub(r"\s+", "", inside(page, box)), qa
    assert seen == {*receipts_text.QUESTIONS, *receipts_asked.WORDINGS, *receipts_lookalikes.WORDINGS}


def test_the_row_of_an_answer_says_what_it_is(pages):
    counted = dict.fromkeys(LABELS, 0)
    for page in pages:
        for qa in page.qas:
            if qa.field in LABELS:
                counted[qa.field] += 1
                assert re.search(LABELS[qa.field], row_of(page, qa.boxes[0])), (qa, row_of(page, qa.boxes[0]))
    assert min(counted.values()) >= 3, counted


def test_the_amounts_add_up(pages):
    checked = dict.fromkeys(("rounding", "due", "change", "net"), 0)
    for page in pages:
        answers = {name: cents(text) for name, text in answers_of(page).items() if AMOUNT.fullmatch(text)}
        if {"gross", "rounding"} <= set(answers):
            checked["rounding"] += 1
            assert answers["gross"] + answers["rounding"] == answers["total"]
        if {"deposit", "due"} <= set(answers):
            checked["due"] += 1
            assert answers["total"] - answers["deposit"] == answers["due"]
        if {"paid", "change"} <= set(answers):
            checked["change"] += 1
            assert answers["paid"] - answers.get("due", answers["total"]) == answers["change"]
        two_rates = re.search("0%|ZERO|STANDARD", " ".join(line.text for line in page.meta["lines"]))
        if {"net", "tax"} <= set(answers) and not two_rates:
            checked["net"] += 1
            assert answers["net"] + answers["tax"] + answers.get("rounding", 0) == answers["total"]
    assert min(checked.values()) >= 3, checked


def test_most_pages_have_what_can_be_taken_for_the_total_or_the_date(pages):
    """Another amount in a row that says total, or that is paid, due or before rounding; another date or time."""
    money, days = 0, 0
    for page in pages:
        answers = answers_of(page)
        rows = [line for line in page.meta["lines"] if AMOUNT.search(line.text)]
        others = {AMOUNT.findall(line.text)[-1] for line in rows if re.search("TOTAL|CASH|BAL", row_of(page, line.box))}
        money += bool(others - {answers["total"]})
        dates = [line.text for line in page.meta["lines"] if re.search("DATE|TIME|DUE:?|PRINT", row_of(page, line.box))]
        days += len(dates) > 2
    assert money > 0.6 * PAGES and days > 0.5 * PAGES


def parsed(text):
    """The day that a date of one of FORMS names."""
    for form in (*FORMS, "%d %b %Y", "%d %b %y"):
        try:
            return datetime.strptime(text, form)
        except ValueError:
            pass
    raise AssertionError(text)


def test_what_is_due_is_due_later(pages):
    for page in pages:
        answers = answers_of(page)
        if "due_date" in answers:
            assert 7 <= (parsed(answers["due_date"]) - parsed(answers["date"])).days <= 30
        if "printed" in answers:
            assert 0 <= (parsed(answers["printed"]) - parsed(answers["date"])).days <= 2


def test_a_question_about_neighbors_has_no_area_and_a_wording_that_the_tokenizer_is_told(pages):
    phrases = make_world("receipts-lookalikes", 1).phrases()
    assert make_world("receipts-lookalikes", 1).labels == make_world("receipts", 1).labels
    for page in pages:
        assert {area.label for area in page.areas} <= set(receipts_text.QUESTIONS)
        assert {qa.question for qa in page.qas if qa.field in receipts_lookalikes.WORDINGS} <= set(phrases)
    assert set(make_world("receipts", 1).phrases()) < set(phrases)
