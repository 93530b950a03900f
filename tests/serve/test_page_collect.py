"""The page of `relook serve --collect`: marking the right box, correcting the answer, and the queue; a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.canned_engine import CannedEngine
from support.page_actions import EVIL, PHONE, QUESTION, WIDE, ask, drag, pick, place
from support.page_server import served
from support.scripted_model import picture
from typer.testing import CliRunner

import relook
from relook.cli import app as cli
from relook.perceive.local import LocalEngine
from relook.serve.app import create_app
from relook.serve.collect import Collection
from relook.serve.page import FOLDER
from relook.serve.settings import ServeSettings

AXE = Path(__file__).parent.parent / "fixtures/axe-core/axe.min.js"
WIDTHS = pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["1280", "390"])
KEY = "sesame-sesame-sesame"
SURE = {"one": 0.9, "two": 0.2, "three": 0.5}


@pytest.fixture(scope="module")
def cards():
    engine = LocalEngine(relook.load("cards-tiny"))
    yield engine
    engine.close()


@pytest.fixture
def collect(chromium, tmp_path, request):
    """Opens the page of a server that collects; script errors and messages on the console fail the test."""
    heard = []

    def collect(viewport=WIDE, engine=None, queue=None, refused=False, scheme="light", **settings):
        collection = Collection(tmp_path / "own.jsonl", queue)
        app = create_app(engine or CannedEngine(SURE), ServeSettings.model_validate(settings), collection)
        server = served(app)
        url = server.__enter__()
        request.addfinalizer(lambda: server.__exit__(None, None, None))
        phone = viewport is PHONE
        context = chromium.new_context(
            viewport=viewport, has_touch=phone, is_mobile=phone, color_scheme=scheme, reduced_motion="reduce"
        )
        context.set_default_timeout(20_000)
        request.addfinalizer(context.close)
        page = context.new_page()
        noted = re.compile("Failed to load resource.*(status of 4|ERR_FAILED)" if refused else "$^")
        page.on("console", lambda note: None if noted.search(note.text) else heard.append(note.text))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.goto(url)
        return page

    yield collect
    assert heard == []


@pytest.fixture
def queue(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = []
    for number, question in enumerate(SURE):
        picture(number, (320, 200)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": question})
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "q.jsonl"


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "own.jsonl").read_text(encoding="utf-8").splitlines()]


def saved(page, text) -> None:
    page.locator("#saved").get_by_text(text).wait_for()


@WIDTHS
def test_a_box_is_dragged_an_answer_corrected_and_build_takes_the_line(collect, cards, tmp_path, viewport, monkeypatch):
    page = collect(viewport, cards)
    pick(page)
    ask(page)
    assert page.locator("#right").input_value() == page.locator(".answer").inner_text() == "164"
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    if viewport is PHONE:
        page.get_by_role("button", name="Mark it").tap()
        drag(page, (0.62, 0.76), (0.84, 0.9))
        page.get_by_role("button", name="Done").tap()
    else:
        drag(page, (0.84, 0.9), (0.62, 0.76))
    assert place(page, "#overlay .mark") == pytest.approx([0.62, 0.76, 0.84, 0.9], abs=0.02)
    assert page.locator("#place span").inner_text().startswith("Right box: pixels 3")
    page.locator("#right").fill("165")
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "Saved: line 1 of own.jsonl.")
    (line,) = lines(tmp_path)
    image = f"own_images/{next((tmp_path / 'own_images').iterdir()).name}"
    (box,) = line.pop("bboxs")
    assert line == {"image": image, "question": QUESTION, "answer": "165"}
    assert box == pytest.approx([0.62 * 512, 0.76 * 512, 0.84 * 512, 0.9 * 512], abs=4)
    assert (tmp_path / image).read_bytes() == (FOLDER / "examples/card-1.webp").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli, ["data", "build", "own.jsonl", "items.jsonl"]).exit_code == 0
    assert json.loads((tmp_path / "items.jsonl").read_text())["messages"][-1]["content"] == "165"


def test_a_line_is_saved_once_corrected_and_kept_apart_by_question(collect, tmp_path):
    page = collect()
    pick(page)
    ask(page)
    drag(page, (0.1, 0.1), (0.3, 0.2))
    page.get_by_role("button", name="Save", exact=True).dblclick()
    saved(page, "Saved: line 1")
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "Saved before: line 1")
    page.locator("#right").fill("other")
    page.locator("#right").press("Enter")
    saved(page, "Corrected: line 1")
    ask(page, "Another question")  # starts without box, and with the model's words
    assert page.locator("#overlay .mark").count() == 0 and page.locator("#right").input_value() == "ANOTHER QUESTION"
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "Saved: line 2 of own.jsonl, without a box.")
    first, second = lines(tmp_path)
    assert (first["answer"], second["answer"], second["bboxs"]) == ("other", "ANOTHER QUESTION", [])
    assert first["image"] == second["image"]


def test_what_is_typed_and_marked_stays_when_the_model_looks_there(collect, tmp_path):
    engine = CannedEngine()
    page = collect(engine=engine)
    pick(page)
    ask(page)
    page.locator("#right").fill("mine")
    drag(page, (0.30, 0.1), (0.6, 0.2))
    page.get_by_role("button", name="Ask again here").click()
    page.locator(".cost:visible").nth(1).wait_for()
    assert page.locator("#right").input_value() == "mine" and page.locator("#overlay .mark").count() == 1
    assert page.locator(".run").last.get_by_text("In your region: columns 2–4, rows 0–1").count() == 1
    page.locator("#unbox").click()
    assert page.locator("#overlay .mark").count() == 0
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "without a box")


@WIDTHS
def test_the_queue_brings_the_least_sure_first(collect, queue, tmp_path, viewport):
    engine = CannedEngine(SURE)
    page = collect(viewport, engine, queue)
    page.locator("#queue .progress").get_by_text("0 of 3 saved in own.jsonl. The least sure answer is next.").wait_for()
    page.get_by_role("button", name="Next question").click()
    page.locator("#exchanges h2").get_by_text("two").wait_for()
    saved(page, "It was 20 % sure of its answer.")
    assert page.locator(".answer").inner_text() == page.locator("#right").input_value() == "TWO"
    assert page.locator(".crop img").evaluate("image => image.naturalWidth") == 120  # 3 of 8 columns
    assert page.locator(".cost summary").inner_text().startswith("0.25 s")  # the model's time
    assert len(engine.asked) == 3  # nothing was asked twice
    if viewport is PHONE:
        page.get_by_role("button", name="Mark it").tap()
    drag(page, (0.25, 0.5), (0.5, 0.75))
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator("#exchanges h2").get_by_text("three").wait_for()
    saved(page, "Saved: line 1 of own.jsonl. It was 50 % sure")
    assert page.locator("#overlay .mark").count() == 0
    page.get_by_role("button", name="Skip").click()
    page.locator("#exchanges h2").get_by_text("one").wait_for()
    page.locator("#right").fill("1")
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator("#queue .progress").get_by_text("2 of 3 saved in own.jsonl.").wait_for()
    assert page.locator("#status").inner_text().endswith("without a box. No more questions.")
    assert page.locator("#earlier").is_hidden()
    first, second = lines(tmp_path)
    assert first == {"image": "in/1.png", "question": "two", "answer": "TWO", "bboxs": first["bboxs"]}
    assert first["bboxs"][0] == pytest.approx([80, 100, 160, 150], abs=3)
    assert second == {"image": "in/0.png", "question": "one", "answer": "1", "bboxs": []}


def test_progress_is_shown_while_the_model_answers(collect, queue):
    engine = CannedEngine(SURE)
    engine.gate.clear()
    page = collect(engine=engine, queue=queue)
    page.locator("#queue .progress").get_by_text("The model has answered 0, 3 are to come;").wait_for()
    engine.gate.set()
    page.locator("#queue .progress").get_by_text("The least sure answer is next.").wait_for()


def test_answers_and_boxes_that_the_queue_has_are_shown_and_kept(collect, tmp_path):
    picture(0, (320, 200)).save(tmp_path / "a.png")
    boxes = [[32, 20, 96, 60], [100, 100, 200, 150]]
    row = {"image": "a.png", "question": "one", "answer": "known", "bboxs": boxes, "field": "total"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    page = collect(queue=tmp_path / "q.jsonl")
    page.get_by_role("button", name="Next question").click()
    page.locator("#correct").wait_for()
    assert page.locator("#right").input_value() == "known"
    assert page.locator("#place span").inner_text() == "Right box: pixels 32–95 across, 20–59 down and 1 more"
    assert place(page, "#overlay .mark") == pytest.approx([0.1, 0.1, 0.3, 0.3], abs=0.02)
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator("#queue .progress").get_by_text("1 of 1 saved").wait_for()
    assert lines(tmp_path) == [row]
    assert page.get_by_role("button", name="Next question").is_disabled()


def test_everything_can_be_done_with_the_keyboard(collect, queue, tmp_path):
    page = collect(queue=queue)
    page.get_by_role("button", name="Next question").press("Enter")
    page.locator("#correct").wait_for()
    assert page.evaluate("document.activeElement.id") == "right"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # Mark it
    assert page.evaluate("document.activeElement.id") == "frame"
    for key in ("ArrowDown", "ArrowRight", "Shift+ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.locator("#place span").inner_text() == "Right box: pixels 106–213 across, 66–130 down"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "right"
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("typed")
    page.keyboard.press("Enter")
    page.locator("#exchanges h2").get_by_text("three").wait_for()
    (line,) = lines(tmp_path)
    assert line == {"image": "in/1.png", "question": "two", "answer": "typed", "bboxs": [[106, 66, 214, 131]]}


def test_a_box_is_typed_in_pixels(collect, tmp_path):
    page = collect()
    pick(page)
    ask(page)
    page.get_by_role("button", name="Mark the right box").click()
    for numbers, marked in (("2 3 400 5", 1), ("2 3 512 5", 0), ("0 0 511 511", 1), ("10 20 29 39", 1)):
        for i, number in enumerate(numbers.split()):
            page.locator("#region input").nth(i).fill(number)
        assert page.locator("#overlay .mark").count() == marked, numbers
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "Saved: line 1")
    assert lines(tmp_path)[0]["bboxs"] == [[10, 20, 30, 40]]


@WIDTHS
def test_errors_are_sentences_beside_the_answer(collect, queue, tmp_path, viewport):
    page = collect(viewport, queue=queue, refused=True)
    page.get_by_role("button", name="Next question").click()
    page.locator("#correct").wait_for()
    page.locator("#right").fill(" ")
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "The right answer is empty. Say what it is.")
    page.locator("#right").fill("see <image>")
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "<image> in a text would stand for an image")
    page.route("**/v1/collect", lambda route: route.abort() if route.request.method == "POST" else route.continue_())
    page.locator("#right").fill(EVIL)
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "does not answer. Is it still running?")
    page.unroute("**/v1/collect")
    (queue.parent / "2.png").unlink()  # the next one's image
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator("#exchanges h2").get_by_text("one").wait_for()
    page.locator("#correct .progress").get_by_text("1 could not be asked (question 3:").wait_for()
    assert lines(tmp_path)[0]["answer"] == EVIL


def test_a_key_is_asked_for(collect, queue, tmp_path):
    page = collect(queue=queue, refused=True, security={"keys": [KEY]})
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Next question").click()
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator("#exchanges h2").get_by_text("three").wait_for()
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("viewport", [WIDE, PHONE, {"width": 320, "height": 480}], ids=["1280", "390", "320"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_and_nothing_is_cut_off(collect, queue, viewport, scheme):
    page = collect(viewport, queue=queue, scheme=scheme, refused=True)
    page.evaluate(AXE.read_text(encoding="utf-8"))

    def check(state):
        found = page.evaluate("axe.run({resultTypes: ['violations']}).then((result) => result.violations)")
        told = [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found]
        assert told == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], state

    page.locator("#queue .progress").get_by_text("is next").wait_for()
    check("welcome")
    page.get_by_role("button", name="Next question").click()
    page.locator("#correct").wait_for()
    page.locator("#frame").press("ArrowUp")
    check("marked")
    page.locator("#right").fill(" ")
    page.get_by_role("button", name="Save", exact=True).click()
    saved(page, "is empty")
    check("refused")
