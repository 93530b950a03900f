"""The page at /: what it shows and sends, in a real browser at two widths, with canned answers and a real model."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.page_actions import EVIL, PHONE, QUESTION, WIDE, ask, drag, place, shares
from support.page_server import CELLS, GRID, WARNING, canned_app, opened, served

import relook
from relook.perceive.local import LocalEngine
from relook.regions import widen
from relook.serve.app import create_app
from relook.serve.page import FOLDER
from relook.serve.settings import ServeSettings


def test_the_page_is_served_under_a_policy_that_runs_its_own_files_only():
    client = TestClient(canned_app())
    for path, kind in {
        "/": "text/html", "/static/style.css": "text/css", "/static/app.js": "javascript",
        "/static/icon.svg": "image/svg", "/static/examples/receipt-1.webp": "image/webp",
    }.items():  # fmt: skip
        response = client.get(path)
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200 and kind in response.headers["content-type"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and response.headers["x-content-type-options"] == "nosniff"
    tag = client.get("/static/app.js").headers["etag"]
    assert client.get("/static/app.js", headers={"If-None-Match": tag}).status_code == 304
    for path in ("/static/../serve/page.py", "/static/%2e%2e/serve/page.py", "/static/gone.js", "/static/"):
        assert client.get(path).status_code == 404


def test_nothing_comes_from_elsewhere_and_texts_never_become_markup():
    files = [path for path in FOLDER.rglob("*") if path.suffix in (".html", ".css", ".js", ".json", ".svg")]
    for text in (path.read_text(encoding="utf-8") for path in files):
        assert set(re.findall(r"https?://[^\s\"'`>]*", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|\bon\w+=\"", text)
        assert not re.search(r"@import|<style|style=\"", text)
    listed = json.loads((FOLDER / "examples/index.json").read_text())
    assert {each["file"] for each in listed} | {"index.json"} == {path.name for path in (FOLDER / "examples").iterdir()}


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["1280", "390"])
def test_one_click_on_an_example_shows_what_the_model_looked_at(visit, viewport):
    page = visit(viewport)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.get_by_role("button", name=QUESTION).click()
    page.locator(".cost:visible").wait_for()
    assert page.locator("#exchanges h2").inner_text() == QUESTION
    assert page.locator(".answer").inner_text() == "164" and page.locator(".before").inner_text() == "Let me see."
    assert place(page, "#overlay .cells") == shares(CELLS) and page.locator("#overlay .grid").count() == 1
    assert place(page, "#overlay .box") == shares(widen(CELLS, 1, GRID))  # what it saw
    dimmed = "([x, y]) => document.querySelector('#overlay .dim').isPointInFill(new DOMPoint(x, y))"
    assert [page.evaluate(dimmed, [x, 420]) for x in (100, 500, 300)] == [True, False, False]  # box: 256 to 512
    assert page.locator("figcaption").inner_text() == "Looked closer at columns 5–6, row 6"
    assert page.locator(".crop img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [256, 192]
    assert "1,234 positions · 640 patches" in page.locator(".cost summary").inner_text()
    page.locator(".cost summary").click()
    assert "tokens reused from before" in page.locator(".cost dl").inner_text()
    assert page.locator("#status").inner_text() == "Answer: 164" and page.locator("#warnings").inner_text() == WARNING
    for seen in ("#frame", ".answer", "#question"):
        assert page.locator(seen).evaluate("each => each.getBoundingClientRect().top >= 0")
    for shown in ("#picture", ".crop img", ".answer"):  # one below the other or side by side, nothing over it
        area = page.locator(shown).bounding_box()
        middle = [area["x"] + area["width"] / 2, area["y"] + area["height"] / 2]
        over = page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('#frame, .run') !== null", middle)
        assert over, shown
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_events_may_be_cut_anywhere(card):
    page = card(answer="Café 164 für 日本")
    ask(page, "in pieces")
    assert page.locator(".answer").inner_text() == "Café 164 für 日本"
    assert page.locator(".crop img").evaluate("image => image.naturalWidth") == 256


def test_looks_not_taken_crops_in_texts_and_warnings_of_an_answer(card):
    page = card()
    ask(page, "nowhere")
    assert page.locator(".looks").inner_text() == "Wanted to look again, but the region names no cells."
    assert page.locator("#overlay > *").count() == 0 and page.locator(".run .problem:visible").count() == 0
    ask(page, "warn of crops")
    assert page.locator(".answer").last.inner_text() == "164"
    assert page.locator(".run").last.locator(".problem").inner_text() == "the image was turned."


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["1280", "390"])
def test_looks_are_compared_side_by_side(card, viewport):
    page = card(viewport)
    page.locator("#question").fill(QUESTION)
    page.get_by_role("button", name="Compare looks").click()
    page.locator(".compared .cost:visible").nth(2).wait_for()
    assert [body.get("relook") for body in page.asked] == [{"look": look} for look in ("none", "region", "clip")]
    columns = page.locator(".compared .run")
    assert [columns.nth(i).locator(".answer").inner_text() for i in range(3)] == ["164"] * 3
    assert [columns.nth(i).locator("svg .box").count() for i in range(3)] == [0, 1, 0]
    assert [columns.nth(i).locator("svg .heat").count() for i in range(3)] == [0, 0, 1]
    tops, lefts = ({round(columns.nth(i).bounding_box()[side]) for i in range(3)} for side in ("y", "x"))
    assert (len(tops), len(lefts)) == ((1, 3) if viewport is WIDE else (3, 1))
    assert page.locator("#overlay .box").count() == 1
    columns.nth(2).get_by_role("button", name="Show on image").click()
    assert page.locator("#overlay .heat").count() == 1 and page.locator("#overlay .box").count() == 0
    assert page.locator("#caption").inner_text() == "The brighter, the more it weighed."
    assert page.locator("[aria-pressed=true]").count() == 1


def test_a_look_inside_a_look_is_drawn_over_what_was_seen_before(card):
    page = card()
    ask(page, "zoom in")
    left, top, right, bottom = shares(widen(CELLS, 1, GRID)).expected
    inside = pytest.approx([left, (top + bottom) / 2, (left + right) / 2, bottom], abs=0.02)
    assert place(page, "#overlay .box >> nth=1") == inside == place(page, "#overlay .cells >> nth=1")
    assert page.locator("#overlay .grid").count() == 2
    assert place(page, "#overlay .grid >> nth=1") == pytest.approx([left, top, right, bottom], abs=0.02)
    dimmed = (
        "([x, y]) => { const dim = document.querySelector('#overlay .dim'), { width, height } = dim.ownerSVGElement"
    )
    dimmed += ".viewBox.baseVal; return dim.isPointInFill(new DOMPoint(x * width, y * height)); }"
    places = [
        ((2 * left + right) / 3, bottom - 0.01),
        (right - 0.01, top + 0.01),
        (left - 0.01, bottom - 0.01),
        (right - 0.01, top / 2),
    ]
    assert [page.evaluate(dimmed, [x, y]) for x, y in places] == [False, False, True, True]  # both boxes are lit
    said = page.locator("figcaption").all_inner_texts()
    assert said == ["Looked closer at columns 5–6, row 6",
                    "Looked closer at columns 0–3, rows 4–7 of what it saw before"]  # fmt: skip


def test_only_looks_that_the_model_has_are_offered(card):
    page = card(looks=("clip",))
    assert page.locator("#look option").evaluate_all("all => all.map((each) => each.value)") == ["auto", "none", "clip"]
    assert not page.locator("#mark").is_visible()
    page.locator("#frame").hover(position={"x": 10, "y": 10})
    page.mouse.down()
    page.mouse.move(400, 400)
    page.mouse.up()
    assert page.locator("#overlay .mark").count() == 0


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["1280", "390"])
def test_a_dragged_box_is_asked_about(card, viewport):
    page = card(viewport)
    ask(page)
    if viewport is PHONE:
        drag(page, (0.3, 0.3), (0.6, 0.6))  # scrolls
        assert page.locator("#overlay .mark").count() == 0
        page.get_by_role("button", name="Mark a region").tap()
    drag(page, (0.55, 0.4), (0.3, 0.2))
    assert place(page, "#overlay .mark") == shares((2, 1, 4, 3)) and page.locator("#overlay .box").count() == 0
    assert page.locator("#marked span").inner_text() == "In your region: columns 2–4, rows 1–3"
    page.get_by_role("button", name="Ask again here").click()
    page.locator(".cost:visible").nth(1).wait_for()
    assert page.asked[1]["relook"] == {"region": [2, 1, 4, 3]}
    assert len(page.asked[1]["messages"]) == 1 and page.asked[1]["messages"][0]["content"][1]["text"] == QUESTION
    assert place(page, "#overlay .box") == shares((1, 0, 5, 4)) and not page.locator("#marked").is_visible()


@pytest.mark.parametrize("size", [(60, 2400), (2400, 60), (24, 24)], ids=str)
def test_images_of_unusual_shapes_are_marked_where_the_mouse_is(visit, tmp_path, size):
    page = visit({"width": 900, "height": 700})
    Image.new("RGB", size, "teal").save(tmp_path / "odd.png")
    page.locator("#file").set_input_files(tmp_path / "odd.png")
    page.get_by_role("button", name="Mark a region").click()
    area = page.locator("#picture").bounding_box()
    scale = min(area["width"] / size[0], area["height"] / size[1])
    corner = [area["x"] + (area["width"] - size[0] * scale) / 2, area["y"] + (area["height"] - size[1] * scale) / 2]
    at = [corner[i] + size[i] * scale * (5.5 / 8) for i in range(2)]
    page.mouse.click(*at)
    assert [page.locator("#region input").nth(i).input_value() for i in range(4)] == ["5"] * 4
    mark = page.locator("#overlay .mark").bounding_box()
    assert mark["x"] - 3 < at[0] < mark["x"] + mark["width"] + 3 and mark["y"] < at[1] < mark["y"] + mark["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 900


def test_a_follow_up_carries_the_conversation_and_a_new_question_does_not(card):
    page = card()
    ask(page)
    ask(page, "And the green one?")
    first, assistant, last = page.asked[1]["messages"]
    assert first["content"][0]["type"] == "image_url" and first["content"][1]["text"] == QUESTION
    assert assistant["content"] == "164" and assistant["relook"]["looks"][0]["cells"] == list(CELLS)
    assert last == {"role": "user", "content": "And the green one?"}
    page.locator("#follow").uncheck()
    ask(page, "A third")
    assert len(page.asked[2]["messages"]) == 1
    page.get_by_role("button", name="Show on image").first.click()
    page.locator("#follow").check()
    ask(page, "From the first")  # what is shown is what goes on
    assert [each["content"] for each in page.asked[3]["messages"][1:]] == ["164", "From the first"]
    page.locator("#question").fill("vanish")
    page.locator("#send").click()
    page.locator(".run .problem:visible").wait_for()
    ask(page, "After a failure")
    assert [each["content"] for each in page.asked[5]["messages"][1:]] == [
        "164",
        "From the first",
        "164",
        "After a failure",
    ]


def test_a_model_of_single_questions_is_asked_single_questions(card):
    page = card(domain="cards")
    ask(page)
    assert not page.locator("#follow").is_checked()
    page.get_by_role("button", name="New image").click()
    assert page.locator("#examples button").count() == 3


def test_images_are_pasted_dropped_and_kept(visit):
    page = visit()
    coded = base64.b64encode((FOLDER / "examples/card-1.webp").read_bytes()).decode()
    give = """([kind, coded, type]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(coded), (c) => c.charCodeAt(0))], "given.webp", {type}));
        const options = {bubbles: true, cancelable: true};
        document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent("paste", {clipboardData: data, ...options})
            : new DragEvent("drop", {dataTransfer: data, ...options}));
    }"""
    for kind in ("paste", "drop"):
        page.locator("#welcome").wait_for()
        page.evaluate(give, [kind, coded, "image/webp"])
        page.locator("#stage").wait_for()
        ask(page, f"What is {kind}ed?")
        assert opened(page.asked[-1]).size == (512, 512)
        page.get_by_role("button", name="New image").click()
    assert page.locator("#history button").all_inner_texts() == ["What is droped?", "What is pasteed?"]
    page.locator("#history button").nth(1).click()
    assert page.locator("#exchanges h2").all_inner_texts() == ["What is pasteed?"]
    assert page.locator("#overlay .box").count() == 1
    page.evaluate(give, ["drop", base64.b64encode(b"%PDF-1.7").decode(), "application/pdf"])
    page.get_by_role("alert").get_by_text("given.webp is no image this browser can show").wait_for()
    assert page.locator("#exchanges h2").count() == 1


def test_the_copied_curl_and_python_give_the_same_answer(card, tmp_path):
    page = card(answer="one six four")
    ask(page)
    page.locator("#look").select_option("region")
    ask(page, EVIL)
    (tmp_path / "card-1.webp").write_bytes((FOLDER / "examples/card-1.webp").read_bytes())
    for name, command in (("curl", ["bash"]), ("Python", [sys.executable])):
        page.get_by_role("button", name=f"Copy as {name}").last.click()
        page.get_by_role("button", name="Copied").last.wait_for()
        code = page.evaluate("navigator.clipboard.readText()")
        done = subprocess.run([*command, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert "one six four" in done.stdout, done.stderr
        copied = {name: value for name, value in page.asked[-1].items() if name != "stream"}
        assert copied == {name: value for name, value in page.asked[1].items() if name != "stream"}
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as over http from elsewhere
    page.get_by_role("button", name="Copy as curl").first.click()
    page.locator("pre").first.wait_for()
    assert page.evaluate("getSelection().toString()").startswith("curl http://127.0.0.1")


# ---- with a real model


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngine(relook.load("cards-tiny"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def real(engine):
    """The server that `relook serve cards-tiny` runs."""
    with served(create_app(engine)) as url:
        yield url


def test_the_page_needs_no_key_where_the_api_does(engine):
    settings = ServeSettings.model_validate({"security": {"keys": ["sesame-sesame-sesame"]}})
    client = TestClient(create_app(engine, settings))
    statuses = [client.get(path).status_code for path in ("/", "/static/app.js", "/v1/models")]
    assert statuses == [200, 200, 401]


def test_the_real_server_shows_where_a_real_model_looks(chromium, real):
    context = chromium.new_context(viewport=WIDE, reduced_motion="reduce")
    page = context.new_page()
    page.goto(real)
    page.get_by_role("button", name=QUESTION).click()
    page.get_by_role("button", name="Ask again").wait_for()
    assert page.locator(".answer").inner_text() == "164"
    left, top, right, bottom = place(page, "#overlay .box")
    assert left < 336 / 512 < 416 / 512 < right and top < 400 / 512 < 448 / 512 < bottom  # the blue box is in it
    page.get_by_role("button", name="Compare looks").click()
    page.locator(".compared .cost:visible").nth(2).wait_for()
    assert page.locator(".compared .answer").all_inner_texts()[1:] == ["164", "164"]
    assert page.locator(".compared .heat").count() == 1
    page.locator("#frame").press("ArrowUp")
    page.get_by_role("button", name="Ask again here").click()
    page.get_by_role("button", name="Ask again").wait_for()
    assert page.locator(".run").last.get_by_text("In your region: columns 2–5, rows 2–5").is_visible()
    page.locator("#follow").check()
    ask(page, "Which code does the green box show?")
    assert page.locator("#exchanges > li").last.get_by_text("Follow-up").is_visible()
    context.close()


def test_the_client_of_the_readme_runs(engine, capsys, monkeypatch):
    root = Path(__file__).parents[2]
    (code,) = re.findall(
        r"(?m)^ {4}import base64, openai\n(?: {4}.*\n)+", (root / "README.md").read_text(encoding="utf-8")
    )
    monkeypatch.chdir(root)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with served(create_app(engine, ServeSettings(name="receipts-tiny"))) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        exec(textwrap.dedent(code), {})
    assert capsys.readouterr().out.strip()
