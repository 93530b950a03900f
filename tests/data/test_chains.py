"""Items whose looks nest: built, checked and mended, shown, counted, written in other forms, and trained on.

The reference is the contract's words: crops by hand with Pillow, cells by hand with fractions.
"""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from itertools import pairwise
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.item_folder import WIDE, Page, call, pictures_in, refused, write

from relook.data import BuildOptions, Question, build_item, read_items, write_items
from relook.data.check import check
from relook.data.items import Item, item_question
from relook.data.remap import remap
from relook.data.variants import variant
from relook.looks import parse_calls, write_call
from relook.regions import split_crop_suffix
from relook.views import load_item_image

BOX = [100, 120, 110, 126]
# On cells of 80 x 50 px the box lies in (1, 2), which is 80,100,160,150; on cells of 10 x 6.25 px of that in (2, 3..4).
CELLS, CROPS = [(1, 2, 1, 2), (2, 3, 2, 4)], ["wide.png_80,100,160,150", "wide.png_100,118,110,131"]


def line(box=BOX, size=WIDE, **changes) -> dict:
    asked = {"image": "wide.png", "question": "Who?", "answer": "A", "bboxs": [list(box)]}
    return asked | {"width": size[0], "height": size[1]} | changes


def chained(box=BOX, size=WIDE, **options) -> dict:
    item = build_item(Question.from_dict(line(box, size)), BuildOptions(**{"max_looks": 3, **options})).to_dict()
    grid, margin = options.get("grid", 8), options.get("margin", 0)
    return item | {"built": {"grid": grid, "margin": margin, "max_looks": options.get("max_looks", 3)}}


def said(item: dict) -> list:
    return [[c.cells for c in parse_calls(t["content"], 32)] for t in item["messages"] if t["role"] == "assistant"][:-1]


@pytest.fixture
def folder(tmp_path) -> Path:
    return pictures_in(tmp_path)


def by_hand(cells, frame, grid, margin) -> tuple:
    """The box of cells of a grid over a frame, widened: edges of fractions of its sides, cut to whole pixels."""
    low, high = [], []
    for axis in (0, 1):
        side = frame[axis + 2] - frame[axis]
        first, last = max(cells[axis] - margin, 0), min(cells[axis + 2] + margin, grid - 1)
        near = floor(Fraction(first * side, grid))
        low.append(frame[axis] + near)
        high.append(frame[axis] + max(floor(Fraction((last + 1) * side, grid)), near + 1))
    return (*low, *high)


def test_two_turns_lead_to_a_small_box(folder):
    report = call("data", "build", write(folder / "q.jsonl", line()), folder / "items.jsonl", "--max-looks", 3)
    assert report.startswith("1 items")
    (item,) = [each.to_dict() for each in read_items(folder / "items.jsonl")]
    assert [turn["role"] for turn in item["messages"]] == ["user", "assistant"] * 3
    assert said(item) == [[CELLS[0]], [CELLS[1]]] and item["images"] == ["wide.png", *CROPS]
    assert [turn["content"] for turn in item["messages"][2:5:2]] == ["<image>"] * 2
    assert item["built"]["max_looks"] == 3 and item["messages"][5]["content"] == "A"

    plain = build_item(Question.from_dict(line())).to_dict()
    assert plain["images"] == ["wide.png", CROPS[0]] and "built" not in plain
    call("data", "build", folder / "q.jsonl", folder / "plain.jsonl")
    assert "max_looks" not in next(read_items(folder / "plain.jsonl")).extra["built"]  # as before looks nested
    assert "max_looks is 0" in refused("data", "build", folder / "q.jsonl", folder / "no.jsonl", "--max-looks", 0)


def test_several_boxes_are_named_together_in_the_last_turn():
    boxes = [[100, 120, 110, 126], [140, 120, 150, 126]]  # cells 2 and 6 of the ten-pixel columns of the first crop
    item = build_item(Question.from_dict(line() | {"bboxs": boxes}), BuildOptions(max_looks=2)).to_dict()
    assert said(item) == [[(1, 2, 1, 2)], [(2, 3, 2, 4), (6, 3, 6, 4)]]
    assert item["images"][2:] == ["wide.png_100,118,110,131", "wide.png_140,118,150,131"]
    assert item["messages"][4]["content"] == "Region 0: <image>\nRegion 1: <image>\n"


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.tuples(*[st.integers(8, 900)] * 2), margin=st.integers(0, 2), looks=st.integers(1, 4))
def test_every_chain_is_as_by_hand_and_without_a_fault(tmp_path_factory, data, size, margin, looks):
    grid = data.draw(st.sampled_from([4, 8, 16]))
    x, y = (data.draw(st.integers(0, side - 1)) for side in size)
    box = (x, y, data.draw(st.integers(x + 1, size[0])), data.draw(st.integers(y + 1, size[1])))
    item = chained(box, size, grid=grid, margin=margin, max_looks=looks)
    crops = [split_crop_suffix(ref)[1] for ref in item["images"][1:]]
    views = [(0, 0, *size), *crops]
    area = lambda b: (b[2] - b[0]) * (b[3] - b[1])  # noqa: E731
    assert 1 <= len(crops) <= looks
    for (cells,), (frame, crop) in zip(said(item), pairwise(views), strict=True):
        assert crop == by_hand(cells, frame, grid, margin)
        assert crop[0] <= box[0] and crop[1] <= box[1] and crop[2] >= box[2] and crop[3] >= box[3]
    assert all(2 * area(after) <= area(before) for before, after in pairwise(crops))
    path = tmp_path_factory.mktemp("chain") / "items.json"
    write_items(path, [Item.from_dict(item)])
    assert set(check(path, grid, images=False).counts) <= {"answer-room"}


def spoiled(at: int, ref: str) -> dict:
    item = chained()
    item["images"][at] = ref
    return item


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize(
    ("item", "words"),
    [
        (
            spoiled(2, "wide.png_100,118,110,140"),
            "wide.png_100,118,110,140 is not the region (2, 3, 2, 4) of the view 80,100,160,150 in turn 4; "
            "expected 100,118,110,131",
        ),
        # as if its cells counted in the whole image: (2, 3, 2, 4) are 160,150,240,250 there
        (spoiled(2, "wide.png_160,150,240,250"), "of the view 80,100,160,150 in turn 4; expected 100,118,110,131"),
        (spoiled(1, "wide.png_80,100,160,200"), "wide.png_80,100,160,200 is not the region (1, 2, 1, 2)"),
    ],
)
def test_a_wrong_crop_is_named_with_its_view_and_mended(folder, item, words, images):
    path = write(folder / "items.jsonl", chained([300, 300, 310, 306]), item)
    report = check(path, images=images, fix=folder / "fixed.jsonl")
    (finding,) = report.findings  # and nothing of the crop after a wrong one
    assert finding.rule == "crop-region" and finding.item == 2 and words in finding.detail
    if images or "turn" in words:
        assert report.ok and [each.to_dict() for each in read_items(folder / "fixed.jsonl")][1:] == [chained()]


@pytest.mark.parametrize("first", ["wide.png_160,150,80,100", "wide.png_80,100,80,150"])
def test_a_call_in_a_view_that_shows_nothing(folder, first):
    """It is drawn without its cells; a cell too far in it stops no file, and is mended after the view."""
    item = chained((150, 143, 160, 150))  # the last cell of the first crop
    good, item = item, json.loads(json.dumps(item).replace("Who?", "What?"))
    item["images"][1] = first
    call("data", "preview", write(folder / "items.jsonl", good, item), folder / "page.html")
    page = Page((folder / "page.html").read_text())
    assert (len(page.all("rect", "crop")), len(page.all("rect", "cells"))) == (4, 3)
    item["messages"][3]["content"] = item["messages"][3]["content"].replace("x_7", "x_8")
    path = write(folder / "items.jsonl", good, item)
    assert check(path, fix=folder / "fixed.jsonl").ok
    _, mended = (each.to_dict() for each in read_items(folder / "fixed.jsonl"))
    assert said(mended) == said(good) and mended["images"] == good["images"]


def test_other_faults_of_a_second_crop_are_mended(folder):
    for wrong in ("wide.png_110,131,100,118", "wide.png_100,118,110,999"):
        path = write(folder / "items.jsonl", spoiled(2, wrong))
        assert check(path, fix=folder / "fixed.jsonl").ok
        assert next(read_items(folder / "fixed.jsonl")).to_dict() == chained()
    item = chained((630, 390, 640, 400))  # the last cell, and the last one of it
    good = json.loads(json.dumps(item))
    item["messages"][3]["content"] = item["messages"][3]["content"].replace("x_7", "x_8")
    assert check(write(folder / "items.jsonl", item), fix=folder / "fixed.jsonl").ok
    assert next(read_items(folder / "fixed.jsonl")).to_dict() == good


def test_the_answer_is_to_fit_into_the_last_crop(folder):
    item = chained()  # 4,000 pixels, and 130 inside them, which hold five characters
    item["messages"][-1]["content"] = "123456"
    assert check(write(folder / "items.jsonl", item)).counts == {"answer-room": 1}
    item["messages"][-1]["content"] = "12345"
    assert not check(write(folder / "items.jsonl", item)).counts


def test_a_new_question_counts_in_the_whole_image_again(folder):
    item = chained()
    for box in (BOX, [300, 300, 310, 306]):
        more = chained(box)
        item["messages"] += [{"role": "user", "content": "And?"}, *more["messages"][1:]]
        item["images"] += more["images"][1:]
    assert check(write(folder / "items.jsonl", item)).ok
    flat = item | {"built": {"grid": 8, "margin": 0}}  # said to count in the whole image
    report = check(write(folder / "items.jsonl", flat))
    assert [f.detail.split(" is not")[0] for f in report.findings] == [CROPS[1], CROPS[1], item["images"][6]]


def test_what_the_model_says_decides_where_items_store_nothing(folder):
    item = {key: value for key, value in chained().items() if key != "built"}
    assert not check(write(folder / "items.jsonl", item)).ok
    write(folder / "items.jsonl", item | {"built": {"grid": 8, "margin": 0}}, item)
    assert {f.item for f in check(folder / "items.jsonl").findings if f.rule == "crop-region"} == {1, 2}
    other = json.loads(json.dumps(item).replace("Who?", "What?"))
    assert check(write(folder / "items.jsonl", chained(), other)).ok


@pytest.mark.parametrize("wrong", [{"max_looks": "3"}, {"max_looks": 0}, {"margin": "1"}, {"margin": -1}, {"grid": []}])
def test_settings_that_are_no_numbers_are_a_fault_of_their_item(folder, wrong):
    item, other = chained(), json.loads(json.dumps(chained()).replace("Who?", "What?"))
    item["built"] |= wrong
    for items in ([other, item], [item, other]):
        path = write(folder / "items.jsonl", *items)
        report = check(path)
        (name, value), *_ = wrong.items()
        found = {finding.item: (finding.rule, finding.detail) for finding in report.findings if finding.rule == "form"}
        assert found.keys() == {items.index(item) + 1} and f"has {name} {value!r}" in found[items.index(item) + 1][1]
        assert report.counts["form"] == 1


def test_null_settings_of_a_table_are_none(folder):
    flat = build_item(Question.from_dict(line()), BuildOptions()).to_dict()
    nulls = {"grid": 8, "margin": 0, "free_choice": None, "question_first": None, "max_looks": None}
    assert check(write(folder / "items.jsonl", chained(), flat | {"built": nulls})).counts == {"other-settings": 1}
    call("data", "preview", folder / "items.jsonl", folder / "page.html")
    assert json.loads(call("data", "stats", folder / "items.jsonl", "--json"))["regions_per_item"] == {"1": 1, "2": 1}


def test_the_page_draws_the_second_grid_over_the_first_crop(folder):
    call("data", "preview", write(folder / "items.jsonl", chained()), folder / "page.html")
    page = Page((folder / "page.html").read_text())
    rectangles = [
        [tuple(int(r[k]) for k in ("x", "y", "width", "height")) for r in page.all("rect", kind)]
        for kind in ("cells", "crop")
    ]
    assert rectangles == [[(80, 100, 80, 50), (100, 118, 10, 13)]] * 2
    first, second = page.all("path", "grid")
    assert first["d"].startswith("M80.0 0V400M0 50.0H640") and second["d"].startswith("M90.0 100V150M80 106.2H160")
    assert len(page.all("img")) == 3


def test_numbers_count_cells_of_the_whole_image_alone(folder):
    told = json.loads(call("data", "stats", write(folder / "items.jsonl", chained()), "--json"))
    assert told["region_sizes"] == [[1, 1, 1]] and told["regions_per_item"] == {"2": 1}
    assert told["regions_not_on_the_grid"] == 0 and sum(map(sum, told["cells"])) == 1


def test_numbers_count_the_first_look_of_every_question(folder):
    item, more = chained(), chained([300, 300, 310, 306])
    item["messages"] += [{"role": "user", "content": "And?"}, *more["messages"][1:]]
    item["images"] += more["images"][1:]
    told = json.loads(call("data", "stats", write(folder / "items.jsonl", item), "--json"))
    assert told["region_sizes"] == [[1, 1, 2]] and told["cells"][2][1] == told["cells"][6][3] == 1
    item["messages"][1]["content"] = item["messages"][1]["content"].replace("x_1", "x_8")  # which is not on the grid
    told = json.loads(call("data", "stats", write(folder / "items.jsonl", item), "--json"))
    assert sum(map(sum, told["cells"])) == 1 and told["regions_not_on_the_grid"] == 1


def test_other_forms_keep_the_chain(folder):
    (folder / "my").mkdir()
    shutil.copy(folder / "wide.png", folder / "my/wide.png")
    theirs = json.loads(json.dumps(chained()).replace("wide.png", "/root/gqa/wide.png"))
    remap(write(folder / "theirs.jsonl", theirs), folder / "mine.jsonl", {"gqa": folder / "my"})
    assert next(read_items(folder / "mine.jsonl")).images["images"][2] == "my/wide.png_100,118,110,131"
    call("data", "convert", folder / "mine.jsonl", folder / "parquet")
    assert "no fault found" in call("data", "check", folder / "parquet")
    direct = variant(Item.from_dict(chained()), "none")
    assert len(direct.messages) == 2 and direct.images["images"] == ("wide.png",)


def test_an_item_without_boxes_asks_about_what_its_last_calls_name(folder):
    item = {key: value for key, value in chained().items() if key != "bboxs"}
    asked = item_question(Item.from_dict(item).under(folder))
    assert asked is not None and asked.boxes == ((100, 118, 110, 131),)
    flat = item_question(Item.from_dict(item | {"built": {"grid": 8}}).under(folder))
    assert flat is not None and flat.boxes == ((80, 100, 160, 150), (160, 150, 240, 250))  # both, of the whole


# -- models


@pytest.fixture(scope="module")
def nesting(tmp_path_factory) -> Path:
    """receipts-tiny as if it had been taught two looks (its weights were not)."""
    from relook.model.loading import resolve

    folder = tmp_path_factory.mktemp("models") / "nesting"
    shutil.copytree(resolve("receipts-tiny"), folder)
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(config | {"region_of": "last", "max_looks": 2}))
    return folder


def test_the_model_says_how_many_looks_lead_to_a_box(folder, nesting):
    questions, items = write(folder / "q.jsonl", line(), line([0, 0, 640, 400])), folder / "items.jsonl"
    call("data", "build", questions, items, "--for", nesting)
    first, second = (each.to_dict() for each in read_items(items))
    assert first["built"]["max_looks"] == 2 and len(first["images"]) == 3 and len(second["images"]) == 2
    assert "no fault found" in call("data", "check", items, "--for", nesting)
    said = call("data", "check", items, "--for", "receipts-tiny", code=1)
    assert "max_looks 2 (the model: 1)" in said
    call("data", "build", questions, folder / "one.jsonl", "--for", "receipts-tiny")
    assert "max_looks 1 (the model: 2)" in call("data", "check", folder / "one.jsonl", "--for", nesting, code=1)
    more = ("--for", nesting, "--max-looks", 3)
    assert f"max_looks is 3, but {nesting} has 2" in refused("data", "build", questions, folder / "x.jsonl", *more)


@pytest.mark.parametrize("start", ["rp-yu/Qwen2-VL-2b-VPT-CLIP", "Qwen/Qwen2-VL-2B-Instruct, looks: [region]"])
def test_a_recipe_says_how_many_looks_it_teaches_where_its_start_is_not_here(folder, start):
    (folder / "mine.yaml").write_text(f"model: {{start: {start}, max_looks: 2}}\n")
    call("data", "build", write(folder / "q.jsonl", line()), folder / "items.jsonl", "--for", folder / "mine.yaml")
    (item,) = read_items(folder / "items.jsonl")
    assert item.extra["built"]["max_looks"] == 2 and len(item.images["images"]) == 3


def test_the_encoded_item_shows_the_pixels_of_each_step(folder, nesting):
    from relook.model.loading import load_processor

    processor = load_processor(nesting)
    item = chained(margin=1, grid=16, max_looks=2)
    found = processor.encode_item(item, image_root=folder)
    whole = Image.open(folder / "wide.png").convert("RGB")
    seen, box = [whole], (0, 0, *WIDE)
    for ref, (cells,) in zip(item["images"][1:], said(item), strict=True):
        box = by_hand(cells, box, 16, 1)
        assert split_crop_suffix(ref)[1] == box
        seen.append(whole.crop(box))
        assert np.array_equal(np.asarray(seen[-1]), np.asarray(load_item_image(ref, folder)))
    views = [processor.view(seen[0], "first"), *(processor.view(image, "crop") for image in seen[1:])]
    assert np.array_equal(found["pixel_values"], processor.encode_images(views)["pixel_values"])
    text = processor.tokenizer.decode([i for i in found["labels"] if i >= 0])
    assert text == "".join(f"{write_call('region', cells, 16)}<|im_end|>" for (cells,) in said(item)) + "A<|im_end|>"


def test_training_takes_them_and_asks_questions_of_those_held_out(folder, monkeypatch):
    from support.start_folders import parts, start

    from relook.io import read_lines

    monkeypatch.chdir(folder)
    start(folder / "plain", parts(folder), ("region", "clip"))  # which looks once
    boxes = [[100 + 40 * n, 120, 110 + 40 * n, 126] for n in range(4)]
    for n in range(4):
        shutil.copy("wide.png", f"{n}.png")
    rows = [line(box) | {"image": f"{n}.png"} for n, box in enumerate(boxes)]
    (folder / "mine.yaml").write_text(
        "name: mine\nmodel: {start: plain, max_looks: 2}\ndata: {path: items.jsonl}\n"
        "validation: {items: 1, questions: 1, pictures: 1}\n"
        "threads: 1\nevaluate_every: 1\nlog_every: 1\n"
        "stages: [{name: tune, objective: instruct, samples: 3, batch: 3}]\n"
    )
    call("data", "build", write(folder / "q.jsonl", *rows), "items.jsonl", "--for", "mine.yaml")
    assert all(len(item.images["images"]) == 3 for item in read_items("items.jsonl"))
    said = call("train", "mine.yaml", "--dry-run")
    assert "every image is there" in said
    call("train", "mine.yaml", "out=run")
    logged = read_lines(folder / "run/log.jsonl")
    assert logged and all(np.isfinite(each["loss"]) for each in logged if "loss" in each)
    assert any("eval_loss" in each and each["eval_failed"] == 0 for each in logged)
    model = json.loads((folder / "run/final/processor_config.json").read_text())
    assert (model["region_of"], model["max_looks"]) == ("last", 2)
    call("data", "build", "q.jsonl", "one.jsonl", "--for", "plain")
    assert "max_looks 1 (the model: 2)" in refused("train", "mine.yaml", "data.path=one.jsonl", "out=other")
