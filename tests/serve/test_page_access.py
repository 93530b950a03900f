"""The page at /: keys, errors, hostile texts, motion and what axe-core finds, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.page_actions import EVIL, PHONE, QUESTION, WIDE, ask, pick, place, shares

AXE = Path(__file__).parent.parent / "fixtures/axe-core/axe.min.js"


def test_everything_can_be_done_with_the_keyboard(visit):
    page = visit()
    page.locator("#examples button").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_role("button", name=QUESTION).press("Enter")
    page.locator(".cost:visible").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    page.locator("#frame").focus()
    for key, cells in (
        ("ArrowDown", (2, 2, 5, 5)), ("ArrowRight", (3, 2, 6, 5)), ("Shift+ArrowUp", (3, 2, 6, 4)),
        ("ArrowRight", (4, 2, 7, 4)), ("ArrowRight", (4, 2, 7, 4)), ("Shift+ArrowLeft", (4, 2, 6, 4)),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert place(page, "#overlay .mark") == shares(cells)
    assert page.locator("#status").inner_text() == "Region: columns 4–6, rows 2–4"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Mark a region: the numbers
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.labels[0].textContent.trim()") == "Left"
    page.keyboard.type("1")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    assert place(page, "#overlay .mark") == shares((1, 3, 6, 4))
    page.locator("#question").focus()
    page.keyboard.type("And there?")
    page.keyboard.press("Enter")
    page.locator(".cost:visible").nth(1).wait_for()
    assert page.asked[1]["relook"] == {"region": [1, 3, 6, 4]}
    page.locator("#frame").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    assert page.locator("#overlay .mark").count() == 0 and not page.locator("#marked").is_visible()


def test_numbers_off_the_grid_mark_nothing(card):
    page = card()
    page.get_by_role("button", name="Mark a region").click()
    for numbers, marked in (("2 3 4 5", 1), ("2 3 8 5", 0), ("5 3 4 5", 0), ("0 0 7 7", 1), ("0 0 7", 0)):
        for i in range(4):
            page.locator("#region input").nth(i).fill([*numbers.split(), ""][i])
        assert page.locator("#overlay .mark").count() == marked, numbers


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["1280", "390"])
def test_errors_are_sentences_beside_the_question(card, viewport):
    page = card(viewport, refused=True)
    for question, sentence in (
        ("refuse this", "The question 'refuse this' is refused; ask another."),
        ("busy", "32 requests are waiting. Try again in 7 s."),
        ("break", "The deadline of 120 s has passed."),
        ("vanish", "The connection ended before the answer did. Ask again."),
    ):
        page.locator("#question").fill(question)
        page.locator("#send").click()
        page.locator(".run").last.get_by_text(sentence).wait_for()
        assert page.locator("#status").inner_text() == sentence
    ask(page)  # and the page goes on
    assert page.locator(".answer").last.inner_text() == "164" and len(page.asked[-1]["messages"]) == 1


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(card):
    page = card(answer="one six four", refused=True)
    page.locator("#question").fill("wait for me")
    page.locator("#send").click()
    page.locator(".answer").get_by_text("one", exact=True).wait_for()
    assert page.locator("#overlay .box").count() == page.locator(".crop img").count() == 1
    page.get_by_role("button", name="Stop").click()
    page.locator(".run").get_by_text("Stopped.").wait_for()
    page.locator("#question").fill("wait again")
    page.locator("#send").click()
    page.locator(".answer").last.get_by_text("one", exact=True).wait_for()
    with page.expect_event("requestfailed"):  # who leaves the image leaves the answer
        page.get_by_role("button", name="New image").click()


def test_a_server_that_is_gone_is_said(card):
    page = card(refused=True)
    ask(page)
    page.route("**/v1/**", lambda route: route.abort())
    page.get_by_role("button", name="Ask again").click()
    page.locator(".run").get_by_text("does not answer. Is it still running?").wait_for()


def test_a_key_is_asked_for_and_kept_for_the_tab(visit):
    page = visit(refused=True, key="sesame-sesame-sesame")
    for key in ("wrong", "sesame-sesame-sesame"):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Continue").click()
        if key == "wrong":
            page.get_by_role("alert").get_by_text("The API key is wrong.").wait_for()
    pick(page)
    ask(page)
    page.get_by_role("button", name="Copy as curl").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "$RELOOK_API_KEY" in copied and "sesame" not in copied
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, json={"error": {"message": "gone"}}))
    page.get_by_role("button", name="Ask again").click()
    page.get_by_label("API key").fill("sesame-sesame-sesame")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Continue").click()
    ask(page, "The conversation goes on")
    page.reload()
    page.locator("#welcome").wait_for()
    assert "sesame" not in page.url and page.evaluate("localStorage.length") == 0


def test_texts_of_the_server_stay_text(card):
    page = card(answer=EVIL, warnings=[EVIL], domain=EVIL)
    ask(page, EVIL)
    assert page.locator(".answer").inner_text() == EVIL and page.locator("#warnings").inner_text() == EVIL
    assert page.locator("#exchanges h2").inner_text() == EVIL
    page.locator(".cost summary").click()
    assert EVIL in page.locator(".turns").inner_text()


def test_nothing_is_cut_off_at_any_width(card):
    page = card()
    ask(page)
    page.get_by_role("button", name="Compare looks").click()
    page.locator(".compared .cost:visible").nth(2).wait_for()
    page.get_by_role("button", name="Mark a region").click()
    page.locator("#frame").press("ArrowUp")
    outside = """width => [...document.querySelectorAll("main button, main select, main img, main input, main p")]
        .filter((each) => !each.closest("#suggestions, .unseen") && each.checkVisibility())
        .filter((each) => each.getBoundingClientRect().right > width).map((each) => each.outerHTML.slice(0, 80))"""
    inside = "[...document.querySelectorAll('#ask .row')].every((row) => row.scrollWidth <= row.clientWidth)"
    for width in (320, 360, 390, 480, 600, 768, 820, 821, 900, 1024, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate(outside, width) == [] and page.evaluate(inside), width


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_the_crop_slides_where_motion_is_welcome(card, motion):
    page = card(reduced_motion=motion)
    page.evaluate("""() => {
        window.moved = [];
        const animate = Element.prototype.animate;
        Element.prototype.animate = function (...all) { moved.push(this.tagName); return animate.apply(this, all); };
        document.addEventListener("animationstart", (event) => moved.push(event.animationName));
    }""")
    ask(page)
    page.wait_for_timeout(200)
    moved = set(page.evaluate("moved")) - {"beat"}  # the dot that says it is at work
    assert moved == (set() if motion == "reduce" else {"IMG", "appear", "light", "rise"})


@pytest.mark.parametrize("viewport", [WIDE, PHONE, {"width": 320, "height": 480}], ids=["1280", "390", "320"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(visit, viewport, scheme):
    page = visit(viewport, color_scheme=scheme, refused=True)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    page.locator("#examples button").first.wait_for()

    def check(state):
        found = page.evaluate("axe.run({resultTypes: ['violations']}).then((result) => result.violations)")
        told = [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found]
        assert told == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], state

    check("welcome")
    pick(page)
    ask(page)
    page.locator(".cost summary").click()
    check("answered")
    page.get_by_role("button", name="Compare looks").click()
    page.locator(".compared .cost:visible").nth(2).wait_for()
    page.get_by_role("button", name="Mark a region").click()
    page.locator("#frame").press("ArrowUp")
    check("compared and marked")
    page.locator("#question").fill("refuse this")
    page.locator("#send").click()
    page.locator(".run .problem:visible").wait_for()
    check("refused")


def test_axe_finds_no_fault_where_a_key_is_asked_for(visit):
    page = visit(refused=True, key="sesame-sesame-sesame")
    page.get_by_label("API key").wait_for()
    page.evaluate(AXE.read_text(encoding="utf-8"))
    assert page.evaluate("axe.run().then((result) => result.violations.map((each) => each.id))") == []
