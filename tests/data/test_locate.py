"""`relook data locate`: answers among words that were read, objects by a detector, runs that go on after a cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from support.item_folder import Page as HtmlPage
from support.item_folder import call, refused, write

from relook.data import Question
from relook.data.locate import locate
from relook.data.locate.match import Line, Page, Place, places
from relook.errors import UserError
from relook.regions import covered

ROW, LETTER = 20, 10  # pixels: a line's height, a character's width


def page(*lines: str) -> Page:
    """A page of these lines in a fixed pitch; `|` begins another line in the same row, at its own place."""
    found = []
    for number, row in enumerate(lines):
        start = 0
        for text in row.split("|"):
            left = len(text) - len(text.lstrip())
            edges = tuple(float(LETTER * (start + left + i)) for i in range(len(text.strip()) + 1))
            box = (int(edges[0]), ROW * number, int(edges[-1]), ROW * number + ROW - 2)
            found.append(Line(text.strip(), box, 0.9, edges))
            start += len(text) + 1
    return Page(found)


def seen(page: Page, answer: str, question: str = "What is it?") -> list[str]:
    return [place.text for place in places(page, (answer,), question)]


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("1234.50", "1,234.50"),
        ("1,234.50", "1 234,50"),
        ("1.234,50 €", "1234.5"),
        ("RM 110.00", "RM110.00"),
        ("110", "110.00"),
        ("$5", "5.00"),
        ("12 %", "12%"),
        ("1'234'567", "1,234,567"),
        ("0.5", "0,50"),
        ("25/12/2018", "2018-12-25"),
        ("25/12/2018", "25 Dec 18"),
        ("December 25, 2018", "25.12.2018"),
        ("2018-12-25", "25DEC2018"),
        ("12/25/2018", "Dec 25 2018"),
        ("25/12/18", "20181225"),
        ("2018年12月25日", "25/12/2018"),
        ("25-12-18", "25/12/18"),
        ("25/12/2018", "25/12/201813:07"),  # a time that touches it
        ("25/12/18", "25/12/1805:16PM"),
        ("ACME Corp.", "acme  corp"),
        ("KEDAI PAPAN YEW CHUAN", "KEDAI PAPAN YEW CHUAM"),  # one letter misread
        ("Café Müller", "CAFE\u0301 MÜLLER"),
        ("10AM", "10 am"),
        ("2nd", "2nd"),
        ("5.00 EUR", "5.00"),
        ("007", "007"),
        ("03-1234 5678", "0312345678"),
        ("12:30", "12:30"),
        ("1,234,567", "1.234.567"),
        ("12 Long Street, 40150 Kuala Lumpur", "12 Long Street, 4010 Kuala Lumpur"),
        ("ACME ROAD 10 EAST", "ACME ROAD 1O EAST"),  # a digit read as a letter
    ],
)
def test_an_answer_is_found_however_it_is_written(answer, written):
    on = page("some heading", f"it says {written} here", "and a last line")
    (found,) = places(on, (answer,), "What is it?")
    start = len("it says ")
    at = start + written.index(found.text[0])  # after a currency, before a percent sign
    assert found.text.split()[0] in written
    left, top, right, bottom = found.box
    assert abs(left - at * LETTER) <= LETTER
    assert abs(right - (at + len(found.text)) * LETTER) <= (0 if found.text in written else 3) * LETTER
    assert (top, bottom) == (ROW, 2 * ROW - 2)


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("10", "110.00"),
        ("110.00", "1110.00"),
        ("12", "25/12/2018"),
        ("5", "12:05"),
        ("1.23", "1.234"),
        ("25/12/2018", "26/12/2018"),
        ("25/12/2018", "25/11/2018"),
        ("no", "notice"),
        ("INV 12345", "INV 12346"),  # digits are not letters that were misread
        ("yes", "a table and a chair"),
        ("No", "Invoice No 123"),  # what a page is asked about, and does not say
        ("true", "True Value Store"),
        ("Street 12", "Street 13"),
        ("Street 12", "Street 1"),
        ("12 Long Street, Kuala Lumpur Selangor", "13 Long Street, Kuala Lumpur Selangor"),
        ("2nd", "Qty 2"),
        ("10am", "10 apples"),
        ("3 kg", "3 pcs"),
        ("5%", "5 items"),
        ("1.2.3", "123"),
        ("1,2,3", "123"),
        ("192.168.1.1", "19216811"),
        ("007", "7 pieces"),
        ("...", "..."),
    ],
)
def test_what_is_another_thing_is_not_found(answer, line):
    assert seen(page("above", line, "below"), answer) == []


def test_words_of_the_question_decide_between_equal_amounts_and_nothing_else_does():
    receipt = page("ITEM  |5.00", "TOTAL |5.00", "CASH  |10.00", "CHANGE|5.00")
    (total,) = places(receipt, ("5.00",), "What is the total amount on this receipt?")
    assert total.box[1] == ROW
    (change,) = places(receipt, ("5.00",), "How much change was given?")
    assert change.box[1] == 3 * ROW
    assert len(places(receipt, ("5.00",), "How much is it?")) == 3
    # the way it is written comes after where it stands
    assert [place.box[1] for place in places(page("QTY 5", "TOTAL 5.00"), ("5",), "What is the total?")] == [ROW]
    assert seen(page("QTY 5", "SUM 5.00"), "5", "How many?") == ["5"]


def test_what_stands_there_as_it_is_written_is_the_one():
    assert seen(page("10 apples for opening", "Open 10am"), "10am", "When is the opening?") == ["10"]
    found = places(page("10 apples for opening", "Open 10am"), ("10am",), "When is the opening?")
    assert [place.box[1] for place in found] == [ROW]
    dates = page("Due 02/01/2018", "Issued 01/02/2018")
    assert seen(dates, "01/02/2018", "What is the due date?") == ["01/02/2018"]
    assert seen(page("Due 02/01/2018"), "01/02/2018") == ["02/01/2018"]  # in the other order


def test_an_answer_of_several_lines_has_the_box_around_them():
    on = page("ACME", "NO.54, BATU 5,", "51200 KUALA LUMPUR", "TEL 03-1")
    (found,) = places(on, ("NO.54, BATU 5, 51200 KUALA LUMPUR",), "What is the address?")
    assert found.box == (0, ROW, 18 * LETTER, 3 * ROW - 2)


def test_the_first_accepted_answer_that_stands_there_counts():
    assert [p.text for p in places(page("it is five"), ("5", "five"), "How many?")] == ["five"]


# ---- files


class Fake:
    """A locator that finds what it was given, by the answer; counts what it was asked."""

    source = {"by": "ocr", "with": "fake 1"}

    def __init__(self, **answers: list[Place]) -> None:
        self.answers, self.asked = answers, []

    def places(self, question: Question) -> list[Place]:
        self.asked.append(question)
        assert Path(question.image).is_file()
        if question.answer == "broken":
            raise UserError("no such image")
        return self.answers.get(question.answer, [])


ONE, OTHER = Place((10, 20, 60, 40), 0.9, "ACME"), Place((10, 50, 60, 70), 0.8, "ACME")


@pytest.fixture
def own(tmp_path) -> Path:
    (tmp_path / "own/images").mkdir(parents=True)
    Image.new("RGB", (640, 400), "white").save(tmp_path / "own/images/0.png")
    lines = [
        {"question": "Who?", "answer": "one"},
        {"question": "Where?", "answer": "two", "field": "place"},
        {"question": "When?", "answer": ["absent", "gone"]},
        {"question": "What?", "answer": "known", "bboxs": [[1, 2, 30, 40]], "width": 640, "height": 400},
        {"question": "Why?", "answer": "broken"},
    ]
    return write(tmp_path / "own/questions.jsonl", *({"image": "images/0.png"} | line for line in lines))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_boxes_are_added_with_their_source_and_nothing_is_replaced(own, tmp_path):
    fake, out = Fake(one=[ONE], two=[ONE, OTHER]), tmp_path / "out/located.jsonl"
    report = locate(own, out, fake)
    one, two, absent, known, broken = lines_of(out)
    assert one == {
        "image": "../own/images/0.png",
        "question": "Who?",
        "answer": "one",
        "width": 640,
        "height": 400,
        "bboxs": [[10, 20, 60, 40]],
        "located": {"by": "ocr", "with": "fake 1", "score": 0.9},
    }
    assert "bboxs" not in two and two["field"] == "place"
    assert [each["box"] for each in two["located"]["candidates"]] == [list(ONE.box), list(OTHER.box)]
    assert absent["answer"] == ["absent", "gone"] and absent["located"] == fake.source
    assert known["bboxs"] == [[1, 2, 30, 40]] and "located" not in known and "known" not in fake.asked
    assert broken["located"]["error"] == "no such image"
    assert dict(report.counts) == {"found": 1, "several": 1, "none": 1, "annotated": 1, "failed": 1}
    assert f"{own}:2: 'two' at 2 places: 'ACME' at 10,20,60,40" in str(report)
    assert "1 at several places, none of them chosen" in str(report) and f"{own}:3: 'absent' was not found" in str(
        report
    )
    assert [path.name for path in out.parent.iterdir()] == ["located.jsonl"]


def test_a_run_that_was_cut_goes_on_and_gives_the_same_file(own, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    answers = {"one": [ONE], "two": [ONE, OTHER]}
    said = str(locate(own, whole, Fake(**answers)))
    data = whole.read_bytes()
    for end in (0, 7, data.index(b"\n"), data.index(b"\n") + 1, len(data) - 9, len(data)):
        cut.write_bytes(data[:end])
        again = Fake(**answers)
        assert str(locate(own, cut, again)) == said
        assert cut.read_bytes() == data
        kept = [json.loads(line)["answer"] for line in data[:end].split(b"\n")[:-1]]
        assert len(again.asked) == 4 - sum(answer not in ("known", "broken") for answer in kept)  # which is tried again


def test_what_failed_is_tried_again(own, tmp_path):
    out = tmp_path / "out.jsonl"
    locate(own, out, Fake(one=[Place((1, 2, 30, 40), 0.9, "one")]))
    before = lines_of(out)
    again = Fake(broken=[Place((1, 2, 30, 40), 0.9, "broken")])
    again.places = lambda question: again.asked.append(question) or again.answers.get(question.answer, [])
    report = locate(own, out, again)
    assert [question.answer for question in again.asked] == ["broken"] and report.counts["failed"] == 0
    assert lines_of(out)[:-1] == before[:-1] and lines_of(out)[-1]["bboxs"] == [[1, 2, 30, 40]]


@pytest.mark.parametrize("there", ['{"image": "b.png", "question": "Who?", "answer": "x"}', '{"mine": 1}', "notes"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_file_of_something_else_is_left_alone(own, tmp_path, there, end):
    out = tmp_path / "out.jsonl"
    out.write_text(there + end)
    with pytest.raises(UserError, match="choose another place"):
        locate(own, out, Fake())
    assert out.read_text() == there + end
    with pytest.raises(UserError, match="is the file of questions"):
        locate(own, own, Fake())


def test_one_run_writes_at_a_time(own, tmp_path):
    out = tmp_path / "out.jsonl"

    class Second(Fake):
        def places(self, question):
            with pytest.raises(UserError, match="another run is writing here"):
                locate(own, out, Fake())
            return []

    locate(own, out, Second())
    assert len(lines_of(out)) == 5


def test_a_second_pass_looks_only_for_what_the_first_left(own, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    locate(own, first, Fake(one=[ONE]))
    detector = Fake(two=[OTHER])
    detector.source = {"by": "detector", "with": "owlv2"}
    locate(first, second, detector)
    assert [question.answer for question in detector.asked] == ["two", "absent", "broken"]
    by = [line.get("located", {}).get("by") for line in lines_of(second)]
    assert by == ["ocr", "detector", "detector", None, "detector"]


def test_items_keep_how_boxes_were_found_and_the_page_shows_it(own, tmp_path):
    located, items, html = tmp_path / "l.jsonl", tmp_path / "items.jsonl", tmp_path / "page.html"
    locate(own, located, Fake(one=[ONE], two=[OTHER]))
    call("data", "build", located, items)
    kept = {line["messages"][-1]["content"]: line for line in lines_of(items)}
    assert kept["one"]["located"] == {"by": "ocr", "with": "fake 1", "score": 0.9} and "located" not in kept["known"]
    call("data", "preview", items, html)
    shown = HtmlPage(html.read_text())
    boxes = shown.all("rect", "box")
    assert len(boxes) == 3 and len({box["stroke"] for box in boxes}) == 2
    assert "found by ocr (fake 1), score 0.9" in shown.text and "box annotated" in shown.text


def test_evaluate_says_how_many_boxes_were_found(own, tmp_path):
    located = tmp_path / "found.jsonl"
    locate(own, located, Fake(one=[ONE], two=[OTHER]))
    out = tmp_path / "evaluation"
    said = call("evaluate", "-m", "receipts-tiny", "--tasks", located, "--looks", "none", "--out", out)
    sentence = "found: of 3 questions with boxes, those of 2 were found (2 by ocr), not annotated"
    assert sentence in said
    (result,) = json.loads((out / "results.json").read_text())["results"]
    assert result["located"] == {"ocr": 2, "annotated": 1}
    call("report", out, "--out", tmp_path / "report")
    assert sentence in (tmp_path / "report/table.md").read_text()


# ---- engines


def test_wrong_engines_are_one_line(own, tmp_path):
    out = tmp_path / "out.jsonl"
    assert "neither 'ocr' nor a folder" in refused("data", "locate", own, out, "--by", "owlv2")
    assert "no open-vocabulary detector" in refused("data", "locate", own, out, "--by", tmp_path)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["owlv2", "grounding_dino"])
def test_a_detector_finds_what_transformers_pipeline_finds(kind, tmp_path):
    """Random weights: the boxes mean nothing, and are those of the pipeline, in the frame of the upright image."""
    pytest.importorskip("scipy", reason="OWLv2 without torchvision resizes by scipy")
    from support import tiny_detectors
    from transformers import pipeline

    folder = getattr(tiny_detectors, kind)(tmp_path / kind)
    picture = Image.effect_noise((200, 120), 80).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    wanted = pipeline("zero-shot-object-detection", model=str(folder))(
        picture, candidate_labels=["red dog"], threshold=0.0
    )
    asked = {"image": "turned.png", "question": "What is it?"}
    questions = write(tmp_path / "q.jsonl", *(asked | {"answer": answer} for answer in ("Red dog.", "yes", "12")))
    said = call("data", "locate", questions, tmp_path / "out.jsonl", "--by", folder, "--threshold", 0)
    found, *others = (line["located"] for line in lines_of(tmp_path / "out.jsonl"))
    assert others == [{"by": "detector", "with": kind.replace("_", "-")}] * 2 and "2 not found" in said
    places = found.get("candidates") or [found | {"box": lines_of(tmp_path / "out.jsonl")[0]["bboxs"][0]}]
    assert places[0]["score"] == pytest.approx(wanted[0]["score"], abs=0.01)
    for place in places:  # the picture is stored turned: pixels are resampled a little differently
        near = [max(map(abs, map(int.__sub__, place["box"], each["box"].values()))) for each in wanted]
        assert min(near) <= 2


def drawn(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """A receipt drawn by Pillow, and the box of each of its texts."""
    from relook import data

    fonts = Path(data.__file__).parent / "fonts"
    font = ImageFont.truetype(str(next(fonts.glob("*.otf"))), 28) if fonts.is_dir() else ImageFont.load_default(28)
    image, boxes = Image.new("RGB", (640, 300), "white"), {}
    pen = ImageDraw.Draw(image)
    rows = [("ACME HARDWARE STORE",), ("DATE", "25/12/2018"), ("SUBTOTAL", "1,234.50"), ("ROUNDING", "0.05")]
    for number, row in enumerate(rows):
        for text, x in zip(row, (40, 380), strict=False):
            pen.text((x, 30 + 60 * number), text, "black", font)
            boxes[text] = pen.textbbox((x, 30 + 60 * number), text, font)
    image.save(path)
    return boxes


def test_words_of_a_page_are_read_and_located(tmp_path):
    pytest.importorskip("rapidocr_onnxruntime", reason="needs relook[ocr]", exc_type=ImportError)
    boxes = drawn(tmp_path / "page.png")
    asked = {
        "When was it?": ("25 December 2018", "25/12/2018"),
        "What is the subtotal?": ("1234.50", "1,234.50"),
        "Which shop?": ("Hardware Store", "ACME HARDWARE STORE"),
        "Who is the cashier?": ("BOB", None),
    }
    lines = [{"image": "page.png", "question": question, "answer": answer} for question, (answer, _) in asked.items()]
    said = call("data", "locate", write(tmp_path / "q.jsonl", *lines), tmp_path / "out.jsonl")
    assert "4 questions: 3 found, 1 not found" in said
    for line, (_, text) in zip(lines_of(tmp_path / "out.jsonl"), asked.values(), strict=True):
        if text is None:
            assert "bboxs" not in line
            continue
        (box,) = line["bboxs"]
        share = 0.74 if text.startswith("ACME") else 1  # without its first word
        assert covered(boxes[text], box) > 0.7 and covered(box, boxes[text]) > 0.85 * share, (box, boxes[text])
        assert line["located"]["by"] == "ocr" and line["located"]["score"] > 0.8
