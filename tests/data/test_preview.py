"""`relook data preview` and `stats`: content of the page, no external requests, consistent counts."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.item_folder import WIDE, Page, call, changed, item, pictures_in, refused, with_images, write, x8

from relook.data import Item, write_items
from relook.data.stats import stats
from relook.errors import UserError
from relook.looks import write_call


@pytest.fixture
def folder(tmp_path) -> Path:
    return pictures_in(tmp_path)


def test_the_page_shows_items_and_fetches_nothing(folder):
    attack = "<script>alert(1)</script> & \udcff"
    good, bad, gone = item(margin=1), changed(t3=attack)(item()), with_images("gone.png")(item(look="none"))
    call("data", "preview", write(folder / "items.jsonl", good, bad, gone, {"messages": 3}), folder / "page.html")
    text = (folder / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "a"}
    assert not [value for _, attrs in page.elements for key, value in attrs.items() if "http" in (value or "")[:4]]
    assert "url(" not in text and "<script>alert(1)</script> & ?" in page.text
    images = [base64.b64decode(img["src"].removeprefix("data:image/jpeg;base64,")) for img in page.all("img")]
    sizes = [Image.open(io.BytesIO(data)).size for data in images]
    assert sizes[:2] == [WIDE, (300, 188)]  # the crop is widened by a cell: 400 x 250 in the page's own scale
    crop, cells = page.all("rect", "crop")[0], page.all("rect", "cells")[0]
    assert [crop[k] for k in ("x", "y", "width", "height")] == ["0", "50", "400", "250"]
    assert [cells[k] for k in ("x", "y", "width", "height")] == ["80", "100", "240", "150"]
    assert len(page.all("path", "grid")) == 2 and "ACME corp." in page.text and "x_1" in page.text
    assert "missing-image" in page.text and "no such file" in page.text and "'messages' is a int" in page.text
    assert page.text.count("item 1") == page.text.count("item 4") == 1


def test_a_sample_depends_on_its_seed_alone_and_is_spread_over_the_set(folder):
    items = write(folder / "items.jsonl", *(item(look="none", answer=f"answer-{n}.") for n in range(60)))

    def shown(seed):
        call("data", "preview", items, folder / "page.html", "--n", 10, "--seed", seed)
        text = (folder / "page.html").read_text()
        return [n for n in range(60) if f"answer-{n}." in text]

    first = shown(1)
    assert len(first) == 10 and first == shown(1) != shown(2) and max(first) > 30 > min(first)
    assert "holds no items" in refused("data", "preview", write(folder / "no.jsonl"), folder / "page2.html")
    assert "is the set itself" in refused("data", "preview", items, items)
    assert not (folder / "page2.html").exists()


# ---- stats


def test_stats_count_what_is_there(folder):
    many = [item(), item(answer="x" * 50), item(look="clip"), item(look="none"), x8(item())]
    items = write(folder / "items.jsonl", *many)
    told = json.loads(call("data", "stats", items, "--json"))
    assert told["looks"] == {"region": 3, "clip": 1, "none": 1}
    assert told["region_sizes"] == [[3, 3, 2]] and told["regions_not_on_the_grid"] == 1
    assert told["regions_per_item"] == {"0": 3, "1": 2}
    cells = [[2 if 1 <= x <= 3 and 2 <= y <= 4 else 0 for x in range(8)] for y in range(8)]
    assert told["cells"] == cells
    assert told["lengths"]["answer"] == {"least": 10, "median": 10, "p95": 50, "most": 50}
    assert told["lengths"]["turns"] == {"least": 2, "median": 4, "p95": 4, "most": 4}
    text = call("data", "stats", items)
    heat = text.splitlines()[-8:]
    assert [line.count("100") for line in heat] == [0, 0, 3, 3, 3, 0, 0, 0]


@given(st.lists(st.tuples(*[st.integers(0, 7)] * 4), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_cells_add_up_to_the_areas_of_regions(tmp_path_factory, corners):
    path = tmp_path_factory.mktemp("stats") / "items.jsonl"
    cells = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    turns = [{"role": "assistant", "content": write_call("region", each)} for each in cells]
    write_items(path, [Item.from_dict({"messages": [{"role": "user", "content": "?"}, turn]}) for turn in turns])
    found = stats(path)
    assert sum(map(sum, found.cells)) == sum((x1 - x0 + 1) * (y1 - y0 + 1) for x0, y0, x1, y1 in cells)
    assert sum(found.areas().values()) == len(cells)


def test_the_plot_is_a_picture_and_a_wrong_name_is_refused(folder):
    items = write(folder / "items.jsonl", item(), item(look="none"))
    call("data", "stats", items, "--plot", folder / "stats.png")
    assert Image.open(folder / "stats.png").size[0] > 1000
    assert "is no picture" in refused("data", "stats", items, "--plot", folder / "stats.docx")
    with pytest.raises(UserError, match="2: messages"):
        stats(write(folder / "bad.jsonl", item(), {"messages": [3]}))
