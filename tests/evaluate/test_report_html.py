"""report.html: content, escaping of record texts, and behavior in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hand_made_records import call, record, save

from relook.evaluate import collect, write
from relook.evaluate.report import page_html
from relook.evaluate.report.heat_maps import CELLS, heat_maps
from relook.evaluate.report.pictures import SIDE, gather

EVIL = """</script><script>alert(1)</script><img src=x onerror=alert(2)> "quotes' & $x^2$ <!-- {{ 7 * 7 }} \ud800 ]]>"""
REGION = {"kind": "region", "cells": [1, 1, 2, 2], "box": [0, 0, 60, 60], "problem": None}


class Outline(HTMLParser):
    """A page as its tags, ids, links, scripts and visible text."""

    VOID = frozenset(("meta", "img", "input", "br", "link", "hr"))

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(self.texts["script"][0])

    @property
    def policy(self) -> str:
        return next(meta["content"] for meta in self.all("meta") if "http-equiv" in meta)


def answers(folder: Path, n: int = 6, **changes) -> list[dict]:
    """Records of n questions about n images, of 200 x 100 pixels, under two looks; every third is wrong under `region`,
    all are under `none`."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(n):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (100, 200, 3), dtype=np.uint8)).save(path)
        common = {"boxes": [[10, 10, 50, 40]], "size": [200, 100], "grid": 8, "image": str(path), **changes}
        looks = {"looks": [REGION], "recall": 1.0, "iou": 0.25}
        found.append(record(i, float(i % 3 > 0), look="region", answer=f"answer {i}", **looks, **common))
        found.append(record(i, 0.0, look="none", answer="nothing", **common))
    return found


def page(folder: Path, records: list[dict], images: int = 100, **run) -> Outline:
    return Outline(page_html(collect([save(folder, records, **run)]), images))


# ---- what stands in it


def test_the_page_holds_tables_figures_and_every_answer(tmp_path):
    found = page(tmp_path / "one", answers(tmp_path / "images"), model="cards-tiny")
    assert not found.open  # every element is closed where it should be
    assert {"Records", "Notes", "Where it looked"} <= set(found.texts["h2"] + found.texts["h3"])
    assert len(found.all("table")) == 5  # the scores of all rows, and by field two scores, recall and IoU
    figures = found.all("figure")
    assert [figure["class"].split() for figure in figures] == [["chart"]] * 3 + [["chart", "heat"]] * 2
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    assert "exact match, %" in found.texts["text"]  # an SVG's text is text
    data = found.data
    assert [row["name"] for row in data["rows"]] == ["none", "region"] and data["scores"] == ["exact", "anls"]
    assert len(data["questions"]) == 6 and len(data["answers"]) == 12 and len(data["pictures"]) == 6
    first = next(each for each in data["answers"] if each["row"] == 1)
    assert first["looks"] == [
        {"kind": "region", "cells": [1, 1, 2, 2], "box": [0, 0, 60, 60], "named": [25, 12, 75, 37]}
    ]
    assert first["scores"] == {"exact": 0.0, "anls": 0.0} and first["recall"] == 1.0 and first["question"] == 0
    assert data["questions"][0]["boxes"] == [[10, 10, 50, 40]] and data["questions"][0]["picture"] == 0
    assert "model" in found.texts["dt"] and "cards-tiny" in found.texts["dd"]


def test_ids_are_each_there_once(tmp_path):
    ids = [
        attributes["id"]
        for _, attributes in page(tmp_path / "one", answers(tmp_path / "images")).tags
        if "id" in attributes
    ]
    assert len(ids) == len(set(ids)) > 50


def test_links_inside_the_page_go_somewhere(tmp_path):
    found = page(tmp_path / "one", answers(tmp_path / "images"))
    ids = {attributes.get("id") for _, attributes in found.tags}
    links = [
        value for _, attributes in found.tags for name, value in attributes.items() if name in ("href", "xlink:href")
    ]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= ids


def test_the_same_report_gives_the_same_page(tmp_path):
    report = collect([save(tmp_path / "one", answers(tmp_path / "images"))])
    assert page_html(report) == page_html(report)


def test_a_map_is_there_in_percent_and_lies_where_its_tokens_do(tmp_path):
    look = {
        "kind": "detection",
        "cells": None,
        "box": [0, 0, 200, 100],
        "problem": None,
        "attention": [[0.5, -4.5], [2.5, float("nan")]],
    }
    found = page(tmp_path / "one", [each | {"looks": [look]} for each in answers(tmp_path / "images", n=1)[:1]])
    (kept,) = found.data["answers"][0]["looks"]
    assert kept == {"kind": "detection", "map": [[11, 100], [56, 0]], "area": [56.2, 6.2, 143.8, 93.8]}


def test_a_judge_a_failure_and_what_the_model_wrote_are_there(tmp_path):
    records = [
        record(0, 0.0, scores={"exact": 0.0, "judge": 0.5}, judged={"model": "judge-2026", "reply": "0.5"},
               transcript=[{"role": "assistant", "text": "<|region_start|>", "sampled": True}]),
        record(1, None), record(2, 1.0, judged={"problem": "timed out"}),
    ]  # fmt: skip
    data = page(tmp_path / "one", records).data
    assert data["scores"] == ["exact", "anls", "judge"]
    assert data["answers"][0]["judge"] == {"model": "judge-2026", "reply": "0.5"}
    assert data["answers"][0]["said"] == ["<|region_start|>"]
    assert data["answers"][1]["failed"] == "out of memory" and data["answers"][2]["judge"] == {"problem": "timed out"}


# ---- nothing gets out of its place


def test_text_of_records_stays_text(tmp_path):
    folder = tmp_path / "<i>evil"
    records = answers(tmp_path / "images", n=2, question=EVIL, accepted=[EVIL], where=EVIL, field=EVIL, task=EVIL[:90])
    records[0] |= {
        "answer": EVIL,
        "judged": {"model": EVIL, "reply": EVIL},
        "transcript": [{"role": "x", "text": EVIL, "sampled": True}],
    }
    records[1] |= {"failed": EVIL, "scores": {}, "answer": None, "usage": None}
    records[2] |= {"field": "another"}
    found = page(folder, records, model=EVIL)
    assert not found.open and len(found.all("script")) == 2 and not found.all("img")
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert found.data["answers"][0]["failed"] == EVIL and found.data["questions"][0]["text"] == EVIL
    assert any("alert(1)" in text for text in found.texts["dd"]) and "49" not in "".join(found.texts["h2"])


def test_a_plans_title_and_rows_stay_text(tmp_path):
    save(tmp_path / "one", answers(tmp_path / "images", n=2))
    evil = json.dumps(EVIL.replace("\ud800", ""))
    text = f"title: {evil}\nnote: {evil}\nrows: [{{name: {evil}, title: {evil}, records: one, look: region}}]"
    (tmp_path / "rows.yaml").write_text(text)
    found = Outline(page_html(collect([tmp_path / "rows.yaml"])))
    assert not found.open and len(found.all("script")) == 2 and not found.all("img")
    assert all(any("alert(1)" in each for each in found.texts[tag]) for tag in ("h1", "p", "th", "td"))


def test_the_policy_lets_one_script_run_and_nothing_be_fetched(tmp_path):
    found = page(tmp_path / "one", answers(tmp_path / "images", n=1))
    digest = base64.b64encode(hashlib.sha256(found.texts["script"][1].encode()).digest()).decode()
    assert found.policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
    assert f"script-src 'sha256-{digest}'" in found.policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", found.texts["script"][1])
    assert not re.search(r"url\((?!#)|@import", found.texts["style"][0])
    assert not [a for _, a in found.tags for name in ("src", "srcset", "action") if name in a] and not found.all("link")


# ---- pictures


def test_a_picture_limit_is_spread_evenly_and_stated(tmp_path):
    records = answers(tmp_path / "images")
    found = page(tmp_path / "one", records, images=2)
    assert [question.get("picture") for question in found.data["questions"]] == [0, None, None, 1, None, None]
    told = "".join(found.texts["p"])
    assert "2 of 6 images are on this page" in told and "4 were left out" in told and "--images 6" in told
    assert found.data["questions"][1]["why"] == "beyond the number of pictures this page was made with"
    none = page(tmp_path / "one", records, images=0)
    assert none.data["pictures"] == [] and none.data["questions"][0]["size"] == [200, 100]


def test_images_that_most_answers_are_about_come_first(tmp_path):
    records = answers(tmp_path / "images") + [each | {"index": 9} for each in answers(tmp_path / "images")[4:6]]
    found = page(tmp_path / "one", records, images=1)
    assert [question["index"] for question in found.data["questions"] if "picture" in question] == [2, 9]


def test_large_images_are_made_small_and_keep_the_frame_of_the_original(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    shown = gather([record(0, 1, image=str(tmp_path / "0.png"))], 1).shown
    ((source, size),) = shown.values()
    kind, _, coded = source.partition(";base64,")
    (tmp_path / "shown").write_bytes(base64.b64decode(coded))
    assert kind == "data:image/jpeg" and size == (2400, 300) and Image.open(tmp_path / "shown").size == (SIDE, 128)


@pytest.mark.parametrize(("change", "words"), [({}, "no image"), ({"size": [9, 9]}, "9 x 9")])
def test_an_image_that_is_gone_or_another_is_said(tmp_path, change, words):
    image = tmp_path / "0.png"
    if change:
        Image.new("RGB", (4, 4)).save(image)
    data = page(tmp_path / "one", [record(0, 1, image=str(image), **change)]).data
    assert "picture" not in data["questions"][0] and data["pictures"] == []
    assert words in data["questions"][0]["why"] or not change


# ---- where it looked


def test_densities_are_shares_of_the_boxes_at_each_place(tmp_path):
    report = collect([save(tmp_path / "one", answers(tmp_path / "images"))])
    (annotated, looked), left = heat_maps(report, "own", gather([], 0))
    assert left == 0 and (annotated.aspect, looked.aspect) == (0.5, 0.5)
    assert looked.density.shape == (CELLS, CELLS) and looked.density[0, 0] == 1 and looked.density[-1, -1] == 0
    assert looked.density.mean() == pytest.approx(60 * 60 / (200 * 100))
    assert annotated.density.mean() == pytest.approx(40 * 30 / (200 * 100))
    assert looked.annotated == pytest.approx(annotated.density)
    assert looked.about == "region: 6 looks; the brightest place is in 100% of them"


def test_looks_at_images_of_unknown_size_are_counted_and_left_out(tmp_path):
    records = [each | {"size": None, "image": str(tmp_path / "gone.png")} for each in answers(tmp_path / "images")]
    maps, left = heat_maps(collect([save(tmp_path / "one", records)]), "own", gather([], 0))
    assert maps == [] and left == 6
    assert any("the images of 6 answers are not known" in text for text in page(tmp_path / "one", records).texts["p"])


# ---- the command


def test_the_command_writes_the_page_with_the_given_number_of_pictures(tmp_path):
    folder = save(tmp_path / "one", answers(tmp_path / "images"))
    for options, count in (((), 6), (("--images", 2), 2), (("--no-images",), 0)):
        call("report", folder, "--out", tmp_path / "out", *options)
        assert len(Outline((tmp_path / "out/report.html").read_bytes()).data["pictures"]) == count
    (tmp_path / "out/report.html").unlink()
    call("report", folder, "--out", tmp_path / "out", "--no-page")
    assert not (tmp_path / "out/report.html").exists() and (tmp_path / "out/table.md").exists()


# ---- in a real browser


@pytest.fixture
def opened(chromium, request):
    """Opens a page from its file; a message on the console, an error or a request for anything fails the test."""
    heard: list[str] = []

    def open_page(path: Path, **options):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        request.addfinalizer(context.close)
        shown = context.new_page()
        shown.on("console", lambda message: heard.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: heard.append(f"error: {error}"))
        shown.on("request", lambda asked: heard.append(asked.url) if not asked.url.startswith("data:") else None)
        shown.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        shown.goto(path.as_uri())
        assert heard.pop(0) == path.as_uri()
        return shown

    yield open_page
    assert heard == []


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    records = answers(folder / "images", n=60)
    records[0] |= {"answer": EVIL, "question": EVIL, "scores": {"exact": 1.0}}
    records[1] |= {"question": EVIL}
    records[4] |= {"answer": "a crossing zebra"}
    records[3] |= {"failed": "out of memory", "scores": {}, "answer": None}
    write(collect([save(folder / "one", records)]), folder / "out", images=30)
    return folder / "out/report.html"


@pytest.mark.slow
def test_filters_say_which_answers_are_listed(opened, real):
    page = opened(real)
    entries = page.locator("#list .entry")
    assert page.locator("#found").inner_text() == "120 answers of 120" and entries.count() == 50
    page.locator("label.choice", has_text="right").click()
    assert page.locator("#found").inner_text() == "41 answers of 120" and entries.count() == 41
    assert page.locator("#list .mark.right").count() == 41 == page.locator("#list .mark").count()
    page.locator("#row").select_option("0")  # none: never right
    assert page.locator("#found").inner_text() == "0 answers of 120"
    assert page.locator("#detail").inner_text() == "No answer passes these filters."
    page.locator("label.choice", has_text="wrong").click()
    page.locator("#other").select_option("1")  # wrong without a look, right with one
    assert page.locator("#found").inner_text() == "40 answers of 120"
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("document.getElementById('found').textContent.startsWith('120 answers')")
    page.locator("#kind").select_option("region")
    assert page.locator("#found").inner_text() == "60 answers of 120"
    page.locator("#text").fill("ZEBRA  crossing")
    assert page.locator("#found").inner_text() == "1 answer of 120"
    page.locator("#text").fill("")
    page.locator("#pictured").check()
    assert page.locator("#found").inner_text() == "30 answers of 120"


@pytest.mark.slow
def test_an_answer_shows_its_image_boxes_and_crop(opened, real):
    page = opened(real)
    page.locator("#kind").select_option("region")
    page.locator("#list .entry").nth(2).click()
    boxes = page.locator("#detail svg.page rect.box")
    kinds = [boxes.nth(i).get_attribute("class") for i in range(boxes.count())]
    assert kinds == ["box named", "box seen", "box truth"]
    assert page.locator("#detail svg.page").get_attribute("viewBox") == "0 0 200 100"
    assert page.locator("#detail .looks svg").get_attribute("viewBox") == "0 0 60 60"
    shown, seen = (page.locator(f"#detail {each}").bounding_box() for each in ("svg.page image", "rect.seen"))
    assert seen["width"] / shown["width"] == pytest.approx(0.3, abs=0.02)
    assert seen["x"] == pytest.approx(shown["x"], abs=2)
    assert page.locator("#detail .others .entry").count() == 1
    page.locator("#detail .others .entry").click()
    assert "no second look" in page.locator("#detail").inner_text() and page.locator("#detail .looks").count() == 0


@pytest.mark.slow
def test_everything_can_be_done_with_the_keyboard(opened, real):
    page = opened(real)
    page.locator("#list .entry").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.answer") == "1"
    page.keyboard.press("End")
    assert page.locator("#page").inner_text() == "page 3 of 3"
    assert page.evaluate("document.activeElement.dataset.answer") == "119"
    assert page.locator("#list [aria-current=true]").get_attribute("data-answer") == "119"
    page.locator("#outcomes input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#outcomes input:checked").get_attribute("value") == "right"
    assert page.locator("#page").inner_text() == "page 1 of 1"


@pytest.mark.slow
def test_text_of_records_is_shown_as_text(opened, real):
    page = opened(real)
    page.locator("#text").fill("alert(1)")
    assert page.locator("#found").inner_text() == "2 answers of 120"
    page.locator("#row").select_option("1")
    assert "</script><script>alert(1)</script>" in page.locator("#detail h3").inner_text()
    assert "onerror=alert(2)" in page.locator("#detail .said-answer").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_it_fits_the_window_and_follows_the_theme(opened, real, width, scheme):
    page = opened(real, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.querySelector('.chart svg text')).fill")
    assert (paper, ink) == {"light": ("rgb(245, 246, 249)", "rgb(24, 29, 44)"),
                            "dark": ("rgb(17, 20, 27)", "rgb(232, 235, 243)")}[scheme]  # fmt: skip


@pytest.mark.slow
def test_tables_and_figures_show_without_javascript(opened, real):
    page = opened(real, java_script_enabled=False)
    assert page.locator("table").first.is_visible() and page.locator("figure svg").first.is_visible()
    assert page.locator("noscript").inner_text().startswith("The browser of records needs JavaScript")
    assert not page.locator("#browser").is_visible()


@pytest.mark.slow
def test_ten_thousand_answers_open(opened, tmp_path):
    records = [record(i, float(i % 7 == 0), answer="x" * 40, image=f"{i // 4}.png") for i in range(10_000)]
    (path,) = (p for p in write(collect([save(tmp_path / "one", records)]), tmp_path / "out") if p.suffix == ".html")
    page = opened(path)
    assert page.locator("#found").inner_text() == "10,000 answers of 10,000"
    page.locator("label.choice", has_text="right").click()
    assert page.locator("#found").inner_text() == "1,429 answers of 10,000"
    assert page.locator("#list .entry").count() == 50 and page.locator("#page").inner_text() == "page 1 of 29"
