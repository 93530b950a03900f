"""Boxes in any dialect become the same items as in pixels, and a file of another dialect is refused with a guess.

The same 48 boxes on five images (one that EXIF turns) are written in each dialect.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from support.item_folder import call, refused
from support.item_sets import data

from relook.boxes import BOX_FORMS, ORDERS, write_box
from relook.data import build, check, preview, read, read_items, read_questions
from relook.data.build import BuildReport
from relook.data.dataset import open_items
from relook.errors import UserError

SIZES = {"a.png": (640, 480), "b.png": (300, 200), "c.jpg": (480, 640), "d.png": (900, 1200), "e.png": (64, 64)}
VIEW = (280, 196)
TURNED = "c.jpg"  # stored as 640 x 480
DIALECTS = [f"{units} {order}" for units in BOX_FORMS for order in ORDERS if (units, order) != ("pixels", "xyxy")]


def boxes(name: str, number: int) -> tuple[int, int, int, int]:
    """A box of at least 8 pixels a side anywhere on the image."""
    rng, (width, height) = random.Random(f"{name}{number}"), SIZES[name]
    x, y = rng.randrange(width - 8), rng.randrange(height - 8)
    return x, y, rng.randint(x + 8, width), rng.randint(y + 8, height)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        image = Image.new("RGB", size[::-1] if name == TURNED else size, "white")
        exif = Image.Exif()
        exif[0x0112] = 6 if name == TURNED else 1
        image.save(tmp_path / name, exif=exif)
    return tmp_path


def questions(folder: Path, dialect: str = "pixels", images: tuple[str, ...] = tuple(SIZES), n: int = 12) -> Path:
    units, _, order = dialect.partition(" ")
    path, lines = folder / f"{dialect.replace(' ', '-')}.jsonl", []
    for number in range(n):
        for name in images:
            box, size = boxes(name, number), SIZES[name]
            seen = write_box(box, size, units, order or "xyxy", view=VIEW, turn=6 if name == TURNED else 1, grid=8)
            lines.append(
                {"image": name, "question": f"What is {number}?", "answer": f"it is {number}", "bboxs": [seen]}
            )
            lines[-1] |= {"resized_width": VIEW[0], "resized_height": VIEW[1]} if units == "resized" else {}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def taught(path: Path, **options) -> list:
    """What the items of a build teach: turns and crops."""
    target = path.with_suffix(".items.jsonl")
    report = build(path, target, **options)
    assert not report.counts and not report.left_out, report
    return [(item.messages, item.images) for item in read_items(target)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_boxes_of_any_dialect_become_the_items_of_pixels(folder: Path, dialect: str) -> None:
    path = questions(folder, dialect)
    assert taught(path, units=dialect) == taught(questions(folder))
    (first, *_) = read_items(path.with_suffix(".items.jsonl"))
    assert first.extra["built"]["units"] == dialect
    assert check(path.with_suffix(".items.jsonl")).ok and check(path, units=dialect).ok
    assert "units" not in next(iter(read_items(folder / "pixels.items.jsonl"))).extra["built"]


def test_the_view_of_a_model_stands_for_a_size_that_no_record_states(folder: Path) -> None:
    from relook.data.settings import view_of

    seen = view_of("receipts-tiny")
    assert seen((640, 480)) != (640, 480)
    lines = [json.loads(line) for line in questions(folder, images=("a.png",)).read_text().splitlines()]
    for line in lines:
        line["bboxs"] = [write_box(tuple(line["bboxs"][0]), SIZES["a.png"], "resized", view=seen(SIZES["a.png"]))]
    path = folder / "model.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"model.jsonl:1: .*resized_width and resized_height, or --for MODEL"):
        build(path, folder / "no.jsonl", units="resized")
    wanted = taught(questions(folder, images=("a.png",)), model="receipts-tiny")
    assert taught(path, units="resized", model="receipts-tiny") == wanted


WRONG = [  # of a file, read as, images, the guess
    ("0-1", None, tuple(SIZES), '"0-1"'),
    ("0-1 xywh", None, tuple(SIZES), '"0-1 xywh"'),
    ("0-1 cxcywh", None, tuple(SIZES), '"0-1 cxcywh"'),
    ("pixels xywh", None, tuple(SIZES), '"pixels xywh"'),
    ("pixels cxcywh", None, tuple(SIZES), '"pixels cxcywh"'),
    ("0-1000", None, ("a.png", "b.png"), '"0-1000"'),
    ("0-1000 xywh", None, ("a.png", "b.png"), '"0-1000 xywh"'),
    ("0-999", None, ("b.png",), '"0-1000"'),
    ("percent", None, ("a.png", "d.png"), '"percent"'),  # which might be pixels of one corner
    ("percent xywh", None, ("a.png", "d.png"), '"percent xywh"'),
    ("stored", None, (TURNED,), '"stored"'),
    ("pixels", "0-1", tuple(SIZES), '"pixels"'),
    ("pixels", "percent xywh", tuple(SIZES), '"pixels"'),
    ("percent xywh", "0-1000", tuple(SIZES), '"percent xywh"'),
]


@pytest.mark.parametrize(("dialect", "said", "images", "guess"), WRONG)
def test_boxes_of_another_dialect_are_refused_with_a_guess(folder: Path, dialect, said, images, guess) -> None:
    path = questions(folder, dialect, images)
    before = sorted(folder.iterdir())
    words = rf"boxes look like .*--units {guess}"
    with pytest.raises(UserError, match=words):
        build(path, folder / "items.jsonl", units=said)
    with pytest.raises(UserError, match=words):
        preview(path, folder / "page.html", units=said)
    found = check(path, units=said)
    assert found.counts["box-units"] == 1 and f"--units {guess}" in found.findings[-1].detail
    assert sorted(folder.iterdir()) == before
    if said is None:
        with pytest.raises(UserError, match=words):
            list(read_questions(path))


@pytest.mark.parametrize("dialect", ["0-1", "pixels xywh"])
def test_training_on_questions_of_another_dialect_is_refused(folder: Path, monkeypatch, dialect: str) -> None:
    monkeypatch.chdir(folder)
    path = questions(folder, dialect).name
    with pytest.raises(UserError, match=f'--units "{dialect}"'):
        open_items(data(path=path), 0)
    stated = open_items(data(sources=[{"path": path, "units": dialect}]), 0)
    plain = open_items(data(path=questions(folder).name), 0)
    assert [stated.item(*stated.record(n)).messages for n in range(9)] == [
        plain.item(*plain.record(n)).messages for n in range(9)
    ]
    with pytest.raises(ValueError, match="expected one of 0-1000"):
        data(sources=[{"path": path, "units": "furlongs"}])


def test_commands_refuse_in_a_line(folder: Path) -> None:
    path = questions(folder, "pixels xywh")
    target = folder / "items.jsonl"
    out = refused("data", "build", path, target)
    assert "--units" in out and f"{path}:" in out and not target.exists()
    assert "box-units" in (seen := call("data", "check", path, code=1)) and '--units "pixels xywh"' in seen
    assert "of 24 boxes run backwards" in refused("data", "preview", path, folder / "page.html", "--n", 24)
    assert "60 items" in call("data", "build", path, target, "--units", "pixels xywh")
    assert "no fault" in call("data", "check", path, "--units", "pixels xywh")
    assert "written" in call("data", "preview", path, folder / "page.html", "--units", "pixels xywh")
    assert "units 'furlongs': expected one of" in refused("data", "build", path, target, "--units", "furlongs")


def test_a_slip_is_mended_and_counted(folder: Path) -> None:
    lines = [json.loads(line) for line in questions(folder).read_text().splitlines()]
    x1, y1, x2, y2 = lines[7]["bboxs"][0]
    lines[7]["bboxs"] = [[x2, y1, x1, y2]]
    lines[9]["bboxs"] = [[0, 0, 99999, 20]]
    path = folder / "slips.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report: BuildReport = build(path, folder / "items.jsonl")
    assert report.items == 60 and set(report.counts) == {
        "boxes with min and max swapped, put in order",
        "boxes cut at the image's border",
    }
    for line in lines[10:20]:
        x1, y1, x2, y2 = line["bboxs"][0]
        line["bboxs"] = [[x2, y2, x1, y1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"numbers of no dialect; read as pixels xyxy, 11 of 60 boxes run backwards"):
        build(path, folder / "items.jsonl")


def test_boxes_of_one_corner_are_taken_where_their_units_are_said(folder: Path) -> None:
    path = questions(folder, "percent", ("a.png", "d.png"))
    assert build(path, folder / "items.jsonl", units="pixels").items == 24


def test_coco_may_count_otherwise_and_forms_that_define_boxes_not(folder: Path) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 640, "height": 480}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": write_box(boxes("a.png", n), SIZES["a.png"], "0-1", "xywh")}
            for n in range(12)
        ],
    }
    path = folder / "coco.json"
    path.write_text(json.dumps(coco))
    with pytest.raises(UserError, match='--units "0-1"'):
        build(path, folder / "items.json")
    assert build(path, folder / "items.json", units="0-1").items == 1  # its x, y, width, height are corners by then
    item = json.loads((folder / "items.json").read_text())[0]
    assert item["bboxs"] == [list(boxes("a.png", n)) for n in range(12)]
    viscot = [{"image": ["a.png", "a.png###[10, 10, 50, 50]"], "conversations": [
        {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "[0.016, 0.141, 0.078, 0.203]"},
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "me"}]}]  # fmt: skip
    (folder / "viscot.json").write_text(json.dumps(viscot))
    with pytest.raises(UserError, match=r"viscot.json:1, entry 1: boxes of this form are not in 0-1"):
        build(folder / "viscot.json", folder / "items.json", units="0-1")


def test_questions_are_converted_there_and_back(folder: Path) -> None:
    path = questions(folder, "percent xywh")
    (folder / "out").mkdir()
    there, back = folder / "out/pixels.jsonl", folder / "out/back.json"
    assert "60 questions" in call("data", "convert", path, there, "--units", "percent xywh")
    plain = list(read(questions(folder)))
    assert [q.boxes for q in read(there)] == [q.boxes for q in plain]
    assert [q.image for q in read(there)] == [f"../{q.image}" for q in plain]
    call("data", "convert", there, back, "--to", "percent xywh")
    written = [json.loads(line)["bboxs"] for line in path.read_text().splitlines()]
    assert [line["bboxs"] for line in json.loads(back.read_text())] == written
    assert "depends on the file" in refused("data", "convert", there, back, "--to", "stored")
    assert "--units" in refused("data", "convert", path, folder / "wrong.jsonl")
    assert not (folder / "wrong.jsonl").exists()
