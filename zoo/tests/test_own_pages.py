"""Delivery notes, the files that are made of them, and the objective that teaches where to look on own pages."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw
from support import ROOT
from support.objectives import objective_of
from typer.testing import CliRunner

from relook.cli import app
from relook.data.dataset import SampledItems
from relook.data.rules import Data
from relook.evaluate import collect
from relook.evaluate.results import COLUMNS, cell
from relook.looks import parse_calls
from relook.model import new as tiny
from relook.regions import box_to_cells
from relook.train.recipe import Stage
from zoo.tools import own_pages
from zoo.worlds.notes import FIELDS, HELD_OUT, TAUGHT, Notes

PAGES = [Notes(3).sample(i) for i in range(5)] + [Notes(3, HELD_OUT).sample(0)]
OBJECTIVE = "zoo.objectives.own_pages:OwnPages"


@pytest.mark.parametrize("page", PAGES, ids=[form.supplier for form in (*TAUGHT, *HELD_OUT)])
def test_answers_stand_in_their_boxes(page) -> None:
    """What the letters inside a box spell is the answer, and all of the box's ink is theirs."""
    assert [qa.field for qa in page.qas] == list(FIELDS)
    grey = np.asarray(page.image.convert("L")).astype(int)
    for qa in page.qas:
        ((x1, y1, x2, y2),) = qa.boxes
        assert 0 <= x1 < x2 <= page.image.width and 0 <= y1 < y2 <= page.image.height
        inside = [g for g in page.glyphs if x1 <= sum(g.box[::2]) / 2 < x2 and y1 <= sum(g.box[1::2]) / 2 < y2]
        assert "".join(g.char for g in sorted(inside, key=lambda g: g.box)) == qa.answer.replace(" ", "")
        around = np.concatenate([grey[y1 - 4 : y1 - 2, x1:x2].ravel(), grey[y2 + 2 : y2 + 4, x1:x2].ravel()])
        assert grey[y1:y2, x1:x2].min() < around.mean() - 80 and around.min() > around.mean() - 60


def test_pages_depend_on_seed_and_index_alone() -> None:
    assert Notes(3).sample(2).qas == PAGES[2].qas and np.array_equal(Notes(3).sample(2).image, PAGES[2].image)
    assert Notes(4).sample(2).qas != PAGES[2].qas
    assert not {form.supplier for form in HELD_OUT} & {form.supplier for form in TAUGHT}


def test_written_images_are_upright_again_where_their_boxes_say(tmp_path) -> None:
    """By Pillow's own EXIF rotation: a page stored sideways, a grey one and a color one show the same."""
    from PIL import ImageOps

    page, modes = PAGES[0], set()
    for number in (0, 7, 14):
        path = tmp_path / own_pages.save(page, tmp_path / str(number), number)
        with Image.open(path) as stored:
            modes.add((stored.mode, stored.size == page.image.size))
            shown = ImageOps.exif_transpose(stored).convert("L")
        assert shown.size == page.image.size
        differ = np.abs(np.asarray(shown).astype(int) - np.asarray(page.image.convert("L")))
        assert differ.mean() < 4
    assert modes == {("RGB", True), ("L", True), ("RGB", False)}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Six pages, their items for receipts-tiny."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["own_pages", str(folder), "--pages", "6", "--test", "1"])
        own_pages.main()
    assert len(items_of(folder)) == 6 * len(FIELDS)
    return folder


def items_of(folder):
    """What `relook data build` makes of the questions in a folder."""
    words = ["data", "build", f"{folder}/questions.jsonl", f"{folder}/items.json", "--for", "receipts-tiny"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return json.loads((folder / "items.json").read_text())


def an_objective(path, **options):
    _, processor = built = tiny.build("receipts-tiny", seed=0)
    items = SampledItems(Data.model_validate({"path": str(path)}), 1, 1, processor)
    stage = Stage(name="look", objective=OBJECTIVE, samples=8, batch=2, options=options)
    return objective_of(built, stage, items=items, examples=2), processor


def test_a_page_is_shown_otherwise_each_time_and_its_boxes_move_along(tmp_path, monkeypatch) -> None:
    """A black box on a white page: wherever the cut page says that it is, there is black, and white around it."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(2):
        image = Image.new("L", (700, 900), 255)
        ImageDraw.Draw(image).rectangle((200, 300, 399, 359), fill=0)
        image.save(f"{number}.png")
        line = {"image": f"{number}.png", "question": "Where is it?", "answer": "HERE", "bboxs": [[200, 300, 400, 360]]}
        lines.append(json.dumps(line))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    assert len(items_of(tmp_path)) == 2
    objective, processor = an_objective("items.json", mix={"locate": 1.0}, uses=1)
    assert len(objective.taught) == len(objective.kept) == 1 and objective.taught[0].path != objective.kept[0].path
    seen = set()
    for index in range(6):
        page = objective.page(index)
        ((x1, y1, x2, y2),) = page.qas[0].boxes
        dark = np.asarray(page.image.convert("L")) < 128
        assert dark[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean() > 0.99
        assert dark[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1].sum() == dark.sum()
        seen.add((page.image.size, page.qas[0].boxes))
        row = objective.example(index)
        (call,) = parse_calls(processor.tokenizer.decode(row["input_ids"]), 16)
        assert call.cells == box_to_cells((x1, y1, x2, y2), page.image.size, 16)
        assert row["ask"].shape[0] == 4  # the four numbers of the call look at the box
    assert len(seen) > 3
    held = objective.page(objective.stage.batch * (1 << 22))  # the first page of validation is shown as it is
    assert held.image.size == (700, 900) and held.qas[0].boxes == ((200, 300, 400, 360),)


def test_the_recipe_runs_on_own_pages_and_leaves_a_model_that_says_so(own, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(own)
    short = ["threads=1", "workers=0", "stages.look.samples=2", "stages.look.batch=1", "stages.look.options.uses=1"]
    short += ["stages.settle.samples=2", "stages.settle.batch=1", "stages.settle.options.uses=1"]
    short += ["validation.items=8", "validation.examples=2", "validation.questions=1", "evaluate_every=2"]
    recipe = str(ROOT / "zoo/recipes/own-pages.yaml")
    done = CliRunner().invoke(app, ["train", recipe, "data.path=items.json", "out=run", *short])
    assert done.exit_code == 0, done.output
    config = json.loads((own / "run/final/config.json").read_text())
    assert config["provenance"]["recipe"] == "own-pages" and config["domain"] != "receipts"
    log = [json.loads(line) for line in (own / "run/log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in entry for entry in log)


def test_without_items_it_says_what_it_needs() -> None:
    recipe = str(ROOT / "zoo/recipes/own-pages.yaml")
    done = CliRunner().invoke(app, ["train", recipe, "data={source: world, world: receipts}", "--dry-run"])
    assert done.exit_code == 2 and "needs items; set data.path" in done.stderr


def test_the_curve_in_the_docs_is_what_its_records_give() -> None:
    """docs/own-data.md: a row for each number of pages, its cells as `relook report zoo/own-pages/curve.yaml` says."""
    report = collect([ROOT / "zoo/own-pages/curve.yaml"])
    page = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    exact, recall = COLUMNS["exact %"], COLUMNS["recall %"]
    for pages in ("0", "50", "100", "200", "200 settled"):
        own, shown = report.row(pages).results, report.row(f"{pages} oracle").results["test"]
        cells = [cell(own["test"].measures["exact"], exact), cell(own["test"].measures["recall"], recall)]
        cells += [cell(shown.measures["exact"], exact), cell(own["new-form"].measures["exact"], exact)]
        assert "| ".join(["", f"{pages} ", *(f"{each} " for each in cells), ""]).strip() in page
