"""The receipts dataset: reproducible pages, ink inside the letter boxes, and correct answers."""

from __future__ import annotations

import random
import re
import zlib

import numpy as np
import pytest

from zoo.worlds import make_world
from zoo.worlds.receipts_asked import WORDINGS
from zoo.worlds.receipts_print import MONO, PROPORTIONAL, Style, print_line, width
from zoo.worlds.receipts_text import MAIN, QUESTIONS, write

PAGES = 24
AMOUNT = re.compile(r"-?[\d,]+\.\d\d")


def lines_in(page, box):
    """Lines entirely inside a box, from top to bottom."""
    x1, y1, x2, y2 = box
    lines = [
        at for at in page.meta["lines"] if at.box[0] >= x1 and at.box[1] >= y1 and at.box[2] <= x2 and at.box[3] <= y2
    ]
    return sorted(lines, key=lambda line: line.box[1])


def asked(pages, field):
    """(page, question) for each question of a field."""
    return [(page, qa) for page in pages for qa in page.qas if qa.field == field]


@pytest.fixture(scope="module")
def pages():
    world = make_world("receipts", 11)
    return [world.sample(i) for i in range(PAGES)]


def test_same_seed_same_page(pages):
    again = make_world("receipts", 11).sample(3)
    assert np.array_equal(np.asarray(again.image), np.asarray(pages[3].image))
    assert again.qas == pages[3].qas and again.glyphs == pages[3].glyphs
    other = make_world("receipts", 12).sample(3)
    assert other.image.size != pages[3].image.size or not np.array_equal(
        np.asarray(other.image), np.asarray(again.image)
    )


def test_pages_have_the_sizes_of_the_real_set(pages):
    for page in pages:
        assert page.image.mode == "RGB"
        assert 330 <= page.image.width <= 924 and 605 <= page.image.height <= 1280


def test_boxes_lie_on_the_page(pages):
    for page in pages:
        w, h = page.image.size
        boxes = [g.box for g in page.glyphs] + [b for qa in page.qas for b in qa.boxes] + [a.box for a in page.areas]
        assert boxes
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= w and 0 <= y1 < y2 <= h


def test_letters_are_ink(pages):
    """Where a letter is said to be, the page is darker than beside the line: judged on pixels, not on our own masks."""
    darker = total = 0
    for page in pages:
        grey = np.asarray(page.image.convert("L"), float)
        for line in page.meta["lines"]:
            x1, y1, x2, y2 = line.box
            if y1 < 8 or len(line.text) < 3:
                continue
            total += 1
            darker += grey[y1:y2, x1:x2].min() < np.median(grey[max(0, y1 - 8) : y2 + 8, x1:x2]) - 12
    assert total > 200 and darker / total > 0.97


def test_every_page_asks_what_the_real_set_asks(pages):
    fields = [{qa.field for qa in page.qas} for page in pages]
    assert all({"company", "date", "address", "total"} == set(MAIN) <= f for f in fields)
    assert set().union(*fields) == {*QUESTIONS, *WORDINGS}
    for page in pages:
        for qa in page.qas:
            forms = (QUESTIONS | WORDINGS)[qa.field]
            assert any(re.fullmatch(re.escape(form).replace(r"\{\}", ".+"), qa.question) for form in forms)


def test_additional_questions_follow_the_fields_and_have_no_areas(pages):
    """Recipes that weigh them out, and heads trained on areas, see what they saw before there were any."""
    order = [*QUESTIONS, *WORDINGS]
    for page in pages:
        places = [order.index(qa.field) for qa in page.qas]
        assert places == sorted(set(places))
        assert {area.label for area in page.areas} <= set(QUESTIONS)
    assert make_world("receipts", 1).labels == tuple(QUESTIONS)


def test_the_words_of_a_seed_are_pinned():
    """Trainings are repeatable from their seeds alone: pinned before the words got modules of their own."""
    said = []
    for seed in range(20):
        script = write(random.Random(seed))
        said.append([[(p.text, p.align, p.at, p.size, p.bold, p.field) for p in row] for row in script.rows])
        said.append([(name, script.answers[name]) for name in QUESTIONS if name in script.answers])
    assert zlib.crc32(repr(said).encode()) == 1452713384


def test_the_answer_stands_in_its_box(pages):
    for page in pages:
        for qa in page.qas:
            if qa.field not in ("items", "cash"):  # counted, or concluded
                (box,) = qa.boxes
                text = " ".join(line.text for line in lines_in(page, box))
                squeezed = re.sub(r"\s+", "", text)
                assert re.sub(r"\s+", "", qa.answer) in squeezed, (qa, text)


def test_the_price_is_the_amount_on_the_row_of_the_item_or_below_it(pages):
    found = asked(pages, "price")
    assert found
    for page, qa in found:
        forms = "|".join(re.escape(form).replace(r"\{\}", "(.+)") for form in WORDINGS["price"])
        (name,) = [group for group in re.fullmatch(forms, qa.question).groups() if group]
        (title,) = [line for line in page.meta["lines"] if line.text.strip() == name]
        (amount,) = lines_in(page, qa.boxes[0])
        assert AMOUNT.findall(amount.text) == [qa.answer] and amount.text.startswith(qa.answer)
        high = title.box[3] - title.box[1]
        assert amount.box[1] > title.box[1] - high
        between = [
            line
            for line in page.meta["lines"]
            if AMOUNT.match(line.text)
            and line.box[2] > amount.box[0]
            and title.box[1] + high < line.box[1] < amount.box[1] - high / 2
        ]
        assert not between, (qa, between)


def test_items_are_counted_where_the_receipt_says_it_or_one_by_one(pages):
    found = asked(pages, "items")
    ways = set()
    for page, qa in found:
        printed = [line for line in page.meta["lines"] if re.fullmatch(r"(ITEM.*|NO. ITEMS|TOTAL QTY): \d+", line.text)]
        ways.add(bool(printed))
        if printed:
            assert qa.boxes == (printed[0].box,) and printed[0].text.endswith(f" {qa.answer}")
        else:
            assert len(qa.boxes) == int(qa.answer)
            for box in qa.boxes:  # an item a box: a name and an amount at the end of its last row
                texts = [line.text for line in lines_in(page, box)]
                assert any(AMOUNT.match(text) for text in texts) and any(re.match(r"[A-Z]", text) for text in texts)
            tops = [box[1] for box in qa.boxes]
            assert tops == sorted(tops)
    assert ways == {True, False}


def test_cash_is_what_the_payment_line_says(pages):
    found = asked(pages, "cash")
    assert {qa.answer for _, qa in found} == {"YES", "NO"}
    for page, qa in found:
        (box,) = qa.boxes
        text = " ".join(line.text for line in lines_in(page, box))
        assert ("CASH" in text) == (qa.answer == "YES") and AMOUNT.search(text)
        assert qa.answer == "YES" or re.search("VISA|CARD|DEBIT", text)


def test_phrases_hold_every_wording_that_names_nothing():
    phrases = make_world("receipts", 1).phrases()
    assert {q for forms in QUESTIONS.values() for q in forms} | {*WORDINGS["items"], *WORDINGS["cash"]} <= set(phrases)
    assert "What is the price of?" in phrases and not any("{" in phrase for phrase in phrases)


def test_letters_stand_in_order_in_their_line(pages):
    for page in pages:
        for line in page.meta["lines"]:
            assert len(line.text) == len(line.boxes) == len(line.centres)
            assert line.text == line.text.upper()
            middles = [c[0] for c in line.centres if c]
            assert middles == sorted(middles)
            assert all((b is None) == (c == " ") for b, c in zip(line.boxes, line.text, strict=True))


def test_the_numbers_of_a_sale_add_up(pages):
    for page in pages:
        answers = {qa.field: qa.answer for qa in page.qas}
        if {"paid", "change"} <= set(answers):
            cents = {k: round(100 * float(answers[k].replace(",", ""))) for k in ("paid", "change", "total")}
            assert cents["paid"] - cents["total"] == cents["change"]


@pytest.mark.parametrize("face", MONO + PROPORTIONAL)
def test_every_face_prints_every_letter(face):
    """Each printable ASCII character but the space leaves ink, in order, inside the line's box."""
    text = "".join(chr(c) for c in range(33, 127))
    style = Style(face, 20)
    ink = np.zeros((40, int(width(style, text)) + 20), np.uint8)
    line = print_line(ink, 5, 5, text, style)
    assert line is not None and line.text == text
    for box in line.boxes:
        assert ink[box[1] : box[3], box[0] : box[2]].max() > 60
    outside = ink.copy()
    outside[line.box[1] : line.box[3], line.box[0] : line.box[2]] = 0
    assert outside.max() == 0


def test_letters_that_leave_the_sheet_are_not_claimed():
    ink = np.zeros((30, 60), np.uint8)
    line = print_line(ink, 4, 4, "ABCDEFGHIJ", Style("mono", 18))
    assert line is not None and 0 < len(line.text) < 10 and line.box[2] <= 60
    assert print_line(ink, 200, 4, "A", Style("mono", 18)) is None
