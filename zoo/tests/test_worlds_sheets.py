"""Pages on larger sheets: what a box said of the page it says of the sheet, judged on pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.objectives import objective_of

from relook.model import new as tiny
from relook.regions import box_to_cells, cells_to_box, widen
from relook.train.recipe import Stage
from zoo import sizes
from zoo.objectives import documents
from zoo.objectives.pages import page_offset
from zoo.scans import Scan
from zoo.worlds import QA, Area, Glyph, Page, make_world
from zoo.worlds.receipts import Line
from zoo.worlds.sheets import on_sheet

DEMO = 700_000_000, 0  # seed of examples/make_pages.py, and the page's number
MARK = (100, 300, 220, 340)


def page_with(box):
    """A white page of 400 x 1000 with one black box, which is a line, a letter, an area and an answer."""
    image = Image.new("RGB", (400, 1000), "white")
    image.paste("black", box)
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    line = Line("I", box, (box,), "total", (middle,), ("amount", 0))
    qa = QA("How much?", "I", (box,), "total")
    return Page(image, (qa,), (Glyph("I", box),), (Area("total", box),), {"lines": (line,), "other": 1})


@pytest.mark.parametrize("a4", [False, True])
def test_boxes_letters_and_lines_stand_where_the_print_is(a4):
    """Ink fills the box to its edges and ends there; scales from a third to one, anywhere on sheets up to A4."""
    scales, places, shapes = [], set(), set()
    for seed in range(40):
        page = on_sheet(page_with(MARK), np.random.default_rng(seed), a4)
        (box,) = page.qas[0].boxes
        (line,) = page.meta["lines"]
        assert page.image.mode == "RGB" and page.image.width <= 905 and page.image.height <= 1280
        assert box == page.glyphs[0].box == page.areas[0].box == line.box == line.boxes[0]
        assert (line.text, line.field, line.part, page.meta["other"]) == ("I", "total", ("amount", 0), 1)
        dark = np.asarray(page.image.convert("L")) < 128
        x1, y1, x2, y2 = box
        near = dark[y1 - 4 : y2 + 4, x1 - 4 : x2 + 4]
        rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
        edges = columns[0], rows[0], near.shape[1] - 1 - columns[-1], near.shape[0] - 1 - rows[-1]
        assert all(3 <= edge <= 6 for edge in edges), (seed, edges)
        assert abs(line.centres[0][0] - (x1 + x2) / 2) <= 1 and abs(line.centres[0][1] - (y1 + y2) / 2) <= 1
        scales.append((x2 - x1) / (MARK[2] - MARK[0]))
        places.add((x1, y1))
        shapes.add(page.image.size)
    assert min(scales) < 0.5 and (max(scales) > 0.85) == (not a4) and len(places) == 40
    assert shapes == {(905, 1280)} if a4 else len(shapes) > 10


def test_the_same_numbers_give_the_same_sheet():
    page = make_world("receipts", 5).sample(0)
    first, second = (on_sheet(page, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image)) and first.qas == second.qas
    assert make_world("receipts-a4", 5).sample(2).qas == make_world("receipts-a4", 5).sample(2).qas


def test_print_on_a4_is_as_small_as_on_real_ones():
    """Real A4 scans of the training set: 5 to 8.2 pixels from letter to letter, 5th to 95th percentile."""
    for index in range(12):
        page = make_world("receipts-a4", 9).sample(index)
        pitches = [(line.box[2] - line.box[0]) / len(line.text) for line in page.meta["lines"] if len(line.text) > 3]
        assert page.image.size == (905, 1280) and 4.5 <= np.median(pitches) <= 8.5
        for line in page.meta["lines"]:
            for box, centre in zip(line.boxes, line.centres, strict=True):
                if box is not None:
                    assert box[0] - 1 <= centre[0] <= box[2] + 1 and box[1] - 30 < centre[1] < box[3] + 30
                    assert 0 <= box[0] < box[2] <= 905 and 0 <= box[1] < box[3] <= 1280


def test_scans_go_on_sheets_too():
    image = Image.new("L", (500, 1200), 250)
    image.paste(0, MARK)
    scan = Scan(Path("none"), [(MARK, "TOTAL 12.00")], [QA("How much?", "12.00", (MARK,), "total")], image)
    for seed in range(8):
        random = np.random.default_rng(seed)
        page = on_sheet(documents.scan_page(scan, random, resize=0.1), random)
        (x1, y1, x2, y2) = page.qas[0].boxes[0]
        assert np.asarray(page.image.convert("L"))[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].max() < 128
        (line,) = page.meta["lines"]
        assert documents.answer_spans(page, page.qas[0]) and line.box == (x1, y1, x2, y2)


def test_a_stage_may_show_pages_on_sheets():
    built = tiny.build(sizes.RECEIPTS, 1)
    stage = {"name": "talk", "objective": "documents", "samples": 8, "batch": 1}
    plain, small = (
        objective_of(built, Stage(**stage, options={"sheets": share}), make_world("receipts", 5))
        for share in (0.0, 1.0)
    )
    for index in range(3):
        page, sheet = plain.page(index), small.page(index)
        assert [qa.answer for qa in page.qas] == [qa.answer for qa in sheet.qas]
        assert page.image.size != sheet.image.size
        assert plain.source.sample(page_offset("talk") + index).qas == page.qas  # without the option: as it was
        row = small.example(index)
        assert len(row["input_ids"]) == len(row["labels"])


@pytest.mark.parametrize("field", ["total", "date"])
def test_the_demo_page_needs_a_second_look(field):
    """A crop of the whole page's cells has the answer in small print among other rows; half of it would do."""
    size = sizes.RECEIPTS
    page = make_world("receipts-a4", DEMO[0]).sample(DEMO[1])
    (box,) = next(qa for qa in page.qas if qa.field == field).boxes
    views = [(0, 0, *page.image.size)]
    for _ in range(2):
        x1, y1, x2, y2 = views[-1]
        inner = (x2 - x1, y2 - y1)
        cells = box_to_cells((box[0] - x1, box[1] - y1, box[2] - x1, box[3] - y1), inner, size.grid)
        a, b, c, d = cells_to_box(widen(cells, size.region_margin, size.grid), inner, size.grid)
        views.append((a + x1, b + y1, c + x1, d + y1))
    first, second = ((v[2] - v[0]) * (v[3] - v[1]) for v in views[1:])
    assert second <= first / 2
    rows = [line for line in page.meta["lines"] if views[1][1] <= line.box[1] and line.box[3] <= views[1][3]]
    assert len({line.box[1] // 12 for line in rows}) >= 4 and box[3] - box[1] < 16
