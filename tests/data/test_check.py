"""`relook data check`: every kind of fault is detected alone and corrected by --fix."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import SHARED
from support.item_folder import (
    SIDEWAYS,
    WIDE,
    Page,
    as_stored,
    call,
    changed,
    item,
    picture,
    pictures_in,
    refused,
    with_images,
    write,
    x8,
)

from relook.data.check import check
from relook.data.faults import RULES
from relook.data.images import near, read_facts, turned_cells
from relook.looks import parse_calls, write_call
from relook.views import load_item_image

RECEIPTS = SHARED / "data/receipts"
needs_receipts = pytest.mark.skipif(not RECEIPTS.is_dir(), reason="../shared/data/receipts is not there")


@pytest.fixture
def folder(tmp_path) -> Path:
    return pictures_in(tmp_path)


def one_more_turn(good: dict) -> dict:
    good["messages"].append({"role": "user", "content": "thanks"})
    return good


def another_look(good: dict) -> dict:
    good["messages"][1]["content"], good["messages"][2]["content"] = write_call("seg"), "<seg_image>"
    good["images"], good["seg_images"] = good["images"][:1], good["images"][:1]
    return good


# row of the table -> how to spoil a good item, and what --fix makes of it: the images and turns, or None (left out)
SPOILED = {
    "form": (lambda good: {"messages": [{"role": "bot", "content": ""}]}, None),
    "role-order": (one_more_turn, "as before"),
    "empty-answer": (changed(t3=" \n"), None),
    "off-edge": (x8, ["wide.png", "wide.png_400,100,640,250"]),
    "half-character": (changed(t0="<image>\nWho is \ud83d?"), None),
    "unresolved": (lambda good: good | {"videos": ["a.mp4"]}, None),
    "foreign-look": (another_look, None),
    "other-settings": (lambda good: good | {"built": {"grid": 16}}, "kept"),
    "malformed-call": (changed(t1="<|region_token_start|><|x_1|>"), None),
    "placeholder-count": (changed(t0="Who?", t2="look"), ["wide.png", "wide.png_80,100,320,250"]),
    "crop-swapped": (with_images("wide.png", "wide.png_320,250,80,100"), "as before"),
    "exif-rotation": (as_stored, ["turned.jpg", "turned.jpg_200,0,400,320"]),
    "crop-outside": (with_images("wide.png", "wide.png_80,100,720,250"), "as before"),
    "crop-region": (with_images("wide.png", "wide.png_80,100,320,300"), "as before"),
    "answer-room": (changed(t3="word " * 400), "kept"),
    "path-outside": (with_images("../../etc/a b.png", "../../etc/a b.png_80,100,320,250"), None),
    "missing-image": (with_images("gone.png", "gone.png_80,100,320,250"), None),
    "unreadable-image": (with_images("cut.png", "cut.png_80,100,320,250"), None),
    "duplicate": (lambda good: good, None),
    "evaluated": (with_images("copy.png", "copy.png_80,100,320,250"), None),
    "nearly-evaluated": (with_images("small.jpg", "small.jpg_20,25,80,62"), "kept"),
}


def test_every_row_has_a_spoiled_item():
    assert {*SPOILED, "box-units"} == {*RULES}  # which is a fault of a file of questions (test_dialect.py)


@pytest.mark.parametrize("rule", SPOILED)
def test_each_fault_is_found_alone_and_mended(folder, rule):
    """Spoiled in one way, an item shows that row of the table (and an x_8's crop also leaves the image)."""
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:1000])
    picture(WIDE, 5).save(folder / "eval.png")
    (folder / "copy.png").write_bytes((folder / "eval.png").read_bytes())
    picture(WIDE, 5).resize((160, 100)).save(folder / "small.jpg")
    evaluated = write(folder / "eval.jsonl", item("eval.png"))
    spoil, mended = SPOILED[rule]
    first, second = item(), spoil(item(answer="ACME corp." if rule == "duplicate" else "ACME Ltd."))
    items = write(folder / "items.jsonl", first, second)

    options = ["--image-root", folder, "--against", evaluated, "--looks", "region", "clip", "--json"]
    report = json.loads(call("data", "check", items, *options, "--fix", code=int(mended == "kept")))
    found = {finding["rule"] for finding in report["findings"]}
    assert found - {"crop-outside"} == {rule} - {"crop-outside"} and rule in found
    assert {(finding["where"], finding["item"]) for finding in report["findings"]} == {(f"{items}:2", 2)}
    assert json.loads(items.read_text().splitlines()[1]) == second  # the file itself stays

    fixed = [json.loads(line) for line in (folder / "items.fixed.jsonl").read_text().splitlines()]
    assert fixed[0] == first
    if mended is None:
        assert len(fixed) == 1 and report["fixed"]["left_out"] == {rule: 1}
        return
    if mended == "kept":
        assert fixed[1] == second and report["fixed"]["remaining"] == {rule: 1}
        return
    assert report["fixed"]["mended"][rule] == 1
    if mended == "as before":
        assert fixed[1] == item(answer="ACME Ltd.")
    else:
        assert fixed[1]["images"] == mended
    with contextlib.chdir(folder):  # a short path, so that the line is not cut
        assert "no fault" in call("data", "check", "items.fixed.jsonl", *options[:-1])


def test_a_mended_turn_shows_the_same_pixels(folder):
    """The red quarter of the stored picture stays what is looked at: crop and cells turned with the image."""
    items = write(folder / "items.jsonl", as_stored(item()))
    call("data", "check", items, "--fix", "--out", folder / "sub/fixed.json")
    (fixed,) = json.loads((folder / "sub/fixed.json").read_text())
    assert fixed["images"][1] == "../turned.jpg_200,0,400,320"  # paths hold from the new folder
    red, green, _ = load_item_image(fixed["images"][1], folder / "sub").resize((1, 1)).getpixel((0, 0))
    assert red > 200 and green < 50
    assert parse_calls(fixed["messages"][1]["content"])[0].cells == (4, 0, 7, 3)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_cells_turn_as_pillow_turns_pixels(orientation, tmp_path):
    stored = Image.new("RGB", (80, 40))
    stored.paste("red", (10, 5, 30, 20))  # cells 1..2, 1..3 of 8
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    facts = read_facts(str(tmp_path / "a.png"))
    assert (facts.size, facts.stored, facts.orientation) == ((40, 80), (80, 40), orientation)
    x0, y0, x1, y1 = turned_cells((1, 1, 2, 3), orientation, 8)
    upright = load_item_image(str(tmp_path / "a.png")).getchannel("R")
    assert upright.getbbox() == (x0 * 5, y0 * 10, (x1 + 1) * 5, (y1 + 1) * 10)


@settings(max_examples=150, deadline=None)
@given(st.integers(40, 2000), st.integers(40, 2000), st.integers(0, 7), st.integers(0, 8), st.integers(0, 8))
def test_a_published_x8_is_mended_without_its_image(tmp_path_factory, width, height, low, top, bottom):
    """The crop that leaves the image gives its sides away, unless it may as well end on the border of a larger one."""
    top, bottom = sorted((top, bottom))
    text = f"<|region_token_start|><|x_{low}|><|y_{top}|><|x_8|><|y_{bottom}|><|region_token_end|>"
    edges = (low * width // 8, top * height // 8, 9 * width // 8, (bottom + 1) * height // 8)
    spoiled = item("far.png", answer="5")
    spoiled["messages"][1]["content"] = text
    spoiled["images"][1] = "far.png_" + ",".join(map(str, edges))
    folder = tmp_path_factory.mktemp("x8")
    path = write(folder / "items.jsonl", item(), spoiled)
    report = check(path, images=False, fix=folder / "fixed.jsonl")
    assert set(report.counts) == {"off-edge"} and report.ok
    far = [(low, 9 * width // 8)] + [(top, 9 * height // 8)] * (bottom == 8)
    if any(edges[side] == cell * reach // 8 for side, (cell, reach) in enumerate(far)):
        assert report.left_out == {"off-edge": 1}
        return
    fixed = json.loads((folder / "fixed.jsonl").read_text().splitlines()[1])
    y0, y1 = min(top, 7), min(bottom, 7)
    right = (low * width // 8, y0 * height // 8, width, (y1 + 1) * height // 8)
    assert fixed["images"][1] == "far.png_" + ",".join(map(str, right))
    assert parse_calls(fixed["messages"][1]["content"])[0].cells == (low, y0, 7, y1)


def test_a_box_before_its_turn_is_not_mistaken(folder):
    """A crop of the upright picture is right although EXIF turns it, and one image is read once for many items."""
    good = [item("turned.jpg", SIDEWAYS, answer=f"{n}") for n in range(5)]
    report = check(write(folder / "items.jsonl", *good))
    assert report.ok and report.images == 1


def test_evaluation_sets_of_every_form_and_place_are_held_against(folder):
    """Visual-CoT's records, in a folder of their own although --image-root is given; what cannot be read is said."""
    (folder / "eval/cot").mkdir(parents=True)
    (folder / "eval/cot/7.png").write_bytes((folder / "wide.png").read_bytes())
    records = [{"image": [f"cot/{n}.png", f"cot/{n}.png###[1, 2, 3, 4]"], "conversations": []} for n in (7, 8, 9)]
    (folder / "eval/gqa.json").write_text(json.dumps(records))
    items = write(folder / "items.jsonl", item())
    arguments = ["data", "check", items, "--against", folder / "eval/gqa.json", "--image-root", folder]
    shown = call(*arguments, code=1)
    assert "1 evaluated" in shown and "cot/7.png" in shown
    assert "held against 1 evaluation images; 2 could not be read (first: cot/8.png)" in shown
    report = json.loads(call(*arguments, "--json", code=1))
    assert report["against"] == {"images": 1, "unreadable": ["cot/8.png", "cot/9.png"]}


def test_a_broken_line_is_a_fault_and_the_rest_is_read(folder):
    items = write(folder / "items.jsonl", item(), item(answer="b"))
    lines = items.read_bytes().splitlines(keepends=True)
    items.write_bytes(lines[0] + b'{"messages": [\n' + b'{"messages": "caf\xe9"}\n' + b"7\n" + lines[1])
    shown = call("data", "check", items, "--fix", "--report", folder / "report.json", code=0)
    report = json.loads((folder / "report.json").read_text())
    places = [(finding["where"], finding["detail"]) for finding in report["findings"]]
    assert [where for where, _ in places] == [f"{items}:{n}" for n in (2, 3, 4)]
    assert "broken JSON" in places[0][1] and "0xe9" in places[1][1] and "a int" in places[2][1]
    assert report["counts"] == {"form": 3} and report["items"] == 5 and report["fixed"]["items"] == 2
    assert "left out: 3 form" in shown


def test_the_summary_fits_a_screen_and_a_terminal(folder):
    """However many faults there are, a line for each row, none too long, no control characters of a path."""
    bad = [with_images("\x1b[2J" + "x" * 200 + ".png", "a.png_1,1,2,2")(item(answer=f"{n}")) for n in range(300)]
    shown = call("data", "check", write(folder / "items.jsonl", *bad), code=1)
    assert len(shown.splitlines()) <= 6 and max(map(len, shown.splitlines())) <= 120 and "\x1b" not in shown
    assert "600 missing-image" in shown
    report = json.loads(call("data", "check", folder / "items.jsonl", "--json", code=1))
    assert len([f for f in report["findings"] if f["rule"] == "missing-image"]) == 100


def test_check_refuses_what_cannot_be_done(folder):
    items = write(folder / "items.jsonl", with_images("gone.png", "gone.png_80,100,320,250")(item()))
    before = sorted(folder.iterdir())
    assert "no item would be left" in refused("data", "check", items, "--fix")
    assert "is the file itself" in refused("data", "check", items, "--fix", "--out", items)
    assert "add --fix" in refused("data", "check", items, "--out", folder / "x.json")
    assert "none of its images" in refused("data", "check", items, "--against", items)
    assert "folder" in refused("data", "check", items, "--fix", "--out", folder)
    assert sorted(folder.iterdir()) == before
    call("data", "check", items, "--no-images")  # as it says of itself, nothing is wrong


def test_pictures_that_look_alike_are_told_from_others(tmp_path):
    looks = {}
    for seed in range(12):
        picture(WIDE, seed).save(tmp_path / f"{seed}.png")
        looks[seed] = read_facts(str(tmp_path / f"{seed}.png"), look=True).look
    import numpy as np

    known = np.stack([np.frombuffer(looks[seed], np.uint8) for seed in range(12)])
    for seed in range(12):
        picture(WIDE, seed).resize((256, 160)).save(tmp_path / "again.jpg", quality=60)
        assert near(read_facts(str(tmp_path / "again.jpg"), look=True).look, known) == seed
        assert near(looks[seed], np.delete(known, seed, axis=0)) is None
    Image.new("RGB", WIDE, "white").save(tmp_path / "blank.png")
    assert read_facts(str(tmp_path / "blank.png"), look=True).look is None


# ---- the real receipts


@needs_receipts
def test_a_receipt_of_both_parts_is_found_and_left_out(tmp_path):
    """Which files are the same, byte for byte, is counted here by another hash."""
    digests: dict[str, dict[str, bytes]] = {}
    for part in ("train", "val"):
        names = {json.loads(line)["image"] for line in (RECEIPTS / f"{part}.jsonl").read_text().splitlines()}
        digests[part] = {name: hashlib.md5((RECEIPTS / name).read_bytes()).digest() for name in names}
    shared = {name for name, digest in digests["train"].items() if digest in digests["val"].values()}
    assert len(shared) == 1
    lines = (RECEIPTS / "train_qa.jsonl").read_text().splitlines()
    picked = [line for number, line in enumerate(lines) if number % 20 == 0 or json.loads(line)["image"] in shared]
    questions = tmp_path / "train.jsonl"
    questions.write_text("\n".join(picked))
    call("data", "build", questions, tmp_path / "items.json", "--image-root", RECEIPTS)
    options = ["--image-root", RECEIPTS, "--against", RECEIPTS / "val_qa.jsonl", "--json"]
    call("data", "check", tmp_path / "items.json", *options, "--fix", code=0)
    found = json.loads(call("data", "check", tmp_path / "items.json", *options, code=1))
    wanted = sum(json.loads(line)["image"] in shared for line in picked)
    assert found["counts"] == {"evaluated": wanted} and found["against"] == {"images": 60, "unreadable": []}
    assert json.loads(call("data", "check", tmp_path / "items.fixed.json", *options))["items"] == len(picked) - wanted


@needs_receipts
def test_receipts_the_whole_way_from_somebody_elses_paths(tmp_path):
    """build, remap, check, stats, preview, convert: every item comes through, and no other file is left behind."""
    rows = [json.loads(line) for line in (RECEIPTS / "val_qa.jsonl").read_text().splitlines()]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(r | {"image": f"/root/x/receipts/{r['image'][7:]}"}) + "\n" for r in rows))
    call("data", "build", theirs, tmp_path / "published.json")
    assert "missing-image" in call("data", "check", tmp_path / "published.json", code=1)
    call("data", "remap", tmp_path / "published.json", tmp_path / "mine.json", "--images", f"receipts={RECEIPTS}")
    report = json.loads(call("data", "check", tmp_path / "mine.json", "--json"))
    assert (report["items"], report["images"], report["ok"]) == (len(rows), len({row["image"] for row in rows}), True)
    told = json.loads(call("data", "stats", tmp_path / "mine.json", "--json"))
    assert told["looks"] == {"region": len(rows)} and sum(map(sum, told["cells"])) >= len(rows)
    call("data", "preview", tmp_path / "mine.json", tmp_path / "page.html", "--n", 3)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.all("article")) == 3 and len(page.all("img")) >= 6 and not page.all("ul", "faults")
    call("data", "convert", tmp_path / "mine.json", tmp_path / "parquet")
    assert json.loads(call("data", "check", tmp_path / "parquet", "--json"))["items"] == len(rows)
    names = {"theirs.jsonl", "published.json", "mine.json", "page.html", "parquet"}
    assert {path.name for path in tmp_path.iterdir()} == names
