"""What annotation tools export, written by hand from their documentation: every command reads it, boxes in pixels."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from support import ROOT
from support.source_files import call, picture, refused, write

from relook.data import Item, read, read_items, read_questions
from relook.data.dataset import open_items
from relook.data.forms import FORMATS, Source, recognize
from relook.data.items import LeftOut
from relook.data.reader import readable
from relook.data.rules import Data
from relook.errors import UserError

RECEIPTS = ROOT / "../shared/data/receipts"
ASK = ["--ask", "What is the {label}?"]
SIDES = {"original_width": 600, "original_height": 400, "image_rotation": 0}


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def dump(path: Path, value) -> Path:
    return text(path, json.dumps(value, indent=2))


def result(id: str, kind: str, value: dict, name: str = "label") -> dict:
    placed = SIDES if "x" in value or "points" in value else {}
    return {"id": id, "type": kind, "from_name": name, "to_name": "image", "value": value, **placed}


AT = {"x": 10, "y": 20, "width": 30, "height": 5, "rotation": 0}  # percent: 60, 80, 240, 100 of 600 x 400
TURNED = {"x": 50, "y": 50, "width": 10, "height": 10, "rotation": 90}  # about (300, 200): 260, 200, 300, 260


def label_studio(folder: Path) -> Path:
    """JSON (https://labelstud.io/guide/export#Label-Studio-JSON-format-of-annotated-tasks): an uploaded image, boxes
    with transcriptions of the same id, a turned box, an outline; the second task is not annotated."""
    picture(folder / "0a1b2c3d-page.png", (600, 400))
    results = [
        result("r1", "rectanglelabels", {**AT, "rectanglelabels": ["total"]}),
        result("r1", "textarea", {**AT, "text": ["9.30"]}, "transcription"),
        result("r2", "rectanglelabels", {**TURNED, "rectanglelabels": ["date"]}),
        result("r2", "textarea", {**TURNED, "text": ["25/12/2018"]}, "transcription"),
        result("r3", "polygonlabels", {"points": [[0, 0], [10, 0], [5, 10]], "polygonlabels": ["shop"]}),
        result("r3", "textarea", {"points": [[0, 0], [10, 0], [5, 10]], "text": ["ACME"]}, "transcription"),
    ]
    done = {"id": 1001, "was_cancelled": False, "ground_truth": False, "result": results}
    data = {"image": "/data/upload/1/0a1b2c3d-page.png"}
    tasks = [{"id": 1, "data": data, "annotations": [done]}, {"id": 2, "data": data, "annotations": []}]
    return dump(folder / "project-1.json", tasks)


def label_studio_min(folder: Path) -> Path:
    """JSON-MIN of the template for OCR: boxes, labels and transcriptions in lists that go together."""
    picture(folder / "page.png", (600, 400))
    box = AT | {"original_width": 600, "original_height": 400}
    other = TURNED | {"original_width": 600, "original_height": 400}
    outline = {"points": [[0, 0], [10, 0], [5, 10]], "original_width": 600, "original_height": 400}
    shapes = [box, other, outline]
    labels = [shape | {"labels": [name]} for shape, name in zip(shapes, ("total", "date", "shop"), strict=True)]
    line = {"image": "/data/local-files/?d=page.png", "id": 1, "bbox": shapes, "label": labels, "annotator": 1}
    return dump(folder / "min.json", [line | {"transcription": ["9.30", "25/12/2018", "ACME"], "lead_time": 3.5}])


def labelme(folder: Path) -> Path:
    """A file an image (https://github.com/wkentaro/labelme); a rectangle is two opposite corners, in any order."""
    picture(folder / "page.png", (600, 400))
    common = {"group_id": None, "flags": {}}
    shapes = [
        common | {"label": "total", "points": [[240, 100], [60, 80]], "shape_type": "rectangle", "description": "9.30"},
        common | {"label": "date", "points": [[260, 200], [300, 200], [300, 260], [260, 260]], "shape_type": "polygon",
                  "description": "25/12/2018"},
        common | {"label": "shop", "points": [[30, 20], [30, 40]], "shape_type": "circle", "description": "ACME"},
    ]  # fmt: skip
    head = {"version": "5.5.0", "flags": {}, "imagePath": "..\\ann\\page.png", "imageData": None}
    return dump(folder / "page.json", head | {"shapes": shapes, "imageHeight": 400, "imageWidth": 600}).parent


def via(folder: Path) -> Path:
    """A project of VIA 2 (https://www.robots.ox.ac.uk/~vgg/software/via/)."""
    picture(folder / "page.png", (600, 400))
    rect = {"name": "rect", "x": 60, "y": 80, "width": 180, "height": 20}
    outline = {"name": "polygon", "all_points_x": [260, 300, 300], "all_points_y": [200, 200, 260]}
    circle = {"name": "circle", "cx": 30, "cy": 20, "r": 20}
    names, texts = ("total", "date", "shop"), ("9.30", "25/12/2018", "ACME")
    regions = [
        {"shape_attributes": shape, "region_attributes": {"label": name, "text": said}}
        for shape, name, said in zip((rect, outline, circle), names, texts, strict=True)
    ]
    entry = {"filename": "page.png", "size": 1234, "regions": regions, "file_attributes": {}}
    project = {"_via_settings": {"ui": {}, "project": {"name": "p"}}, "_via_img_metadata": {"page.png1234": entry}}
    return dump(folder / "via.json", project | {"_via_attributes": {"region": {}, "file": {}}})


def cvat(folder: Path) -> Path:
    """CVAT for images 1.1 (https://docs.cvat.ai/docs/dataset_management/formats/format-cvat/): pixels; a turn is
    clockwise about the middle of the box."""
    picture(folder / "images/page.png", (600, 400))
    return text(
        folder / "annotations.xml",
        """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><name>receipts</name></task></meta>
  <image id="0" name="page.png" width="600" height="400">
    <box label="total" source="manual" occluded="0" xtl="60.00" ytl="80.00" xbr="240.00" ybr="100.00" z_order="0">
      <attribute name="text">9.30</attribute>
    </box>
    <box label="date" source="manual" occluded="0" xtl="250" ytl="210" xbr="310" ybr="250" rotation="90" z_order="0">
      <attribute name="text">25/12/2018</attribute>
    </box>
    <polygon label="shop" source="manual" occluded="0" points="0.00,0.00;60.00,0.00;30.00,40.00" z_order="0">
      <attribute name="text">ACME</attribute>
    </polygon>
  </image>
</annotations>
""",
    )


def coco_of_cvat(folder: Path) -> Path:
    """COCO as CVAT exports it, the attributes and turn of a box with it; one outline without a box."""
    picture(folder / "page.png", (600, 400))
    kinds = [{"id": n, "name": name, "supercategory": ""} for n, name in enumerate(("total", "date", "shop"), 1)]
    rows = [
        {"bbox": [60, 80, 180, 20], "attributes": {"text": "9.30", "occluded": False, "rotation": 0.0}},
        {"bbox": [250, 210, 60, 40], "attributes": {"text": "25/12/2018", "rotation": 90.0}},
        {"segmentation": [[0, 0, 60, 0, 30, 40]], "attributes": {"text": "ACME"}},
    ]
    notes = [{"id": n, "image_id": 1, "category_id": n, "iscrowd": 0, **row} for n, row in enumerate(rows, 1)]
    images = [{"id": 1, "width": 600, "height": 400, "file_name": "page.png", "license": 0}]
    return dump(folder / "instances_default.json", {"images": images, "categories": kinds, "annotations": notes})


def funsd(folder: Path) -> Path:
    """FUNSD (https://guillaumejaume.github.io/FUNSD/work/): a folder of annotations, beside that of the images."""
    picture(folder / "images/page.png", (600, 400))
    rows = [
        ("total:", "question", [0, 80, 50, 100], [[0, 1]]),
        ("9.30", "answer", [60, 80, 240, 100], [[0, 1]]),
        ("date", "question", [200, 200, 250, 260], [[2, 3], [2, 4]]),
        ("25/12", "answer", [260, 200, 280, 260], [[2, 3]]),
        ("/2018", "answer", [280, 200, 300, 260], [[2, 4]]),
        ("RECEIPT", "header", [0, 0, 60, 40], []),
    ]
    form = [
        {"id": n, "text": said, "label": label, "box": box, "linking": linking, "words": []}
        for n, (said, label, box, linking) in enumerate(rows)
    ]
    return dump(folder / "annotations/page.json", {"form": form}).parents[1]


def cord(folder: Path) -> Path:
    """CORD (https://github.com/clovaai/cord): a folder `json` beside `image`; two menu names are ambiguous."""
    picture(folder / "image/page.png", (600, 400))

    def line(category: str, box: list[int], *words: tuple[str, int]) -> dict:
        x1, y1, x2, y2 = box
        quad = {"x1": x1, "y1": y1, "x2": x2, "y2": y1, "x3": x2, "y3": y2, "x4": x1, "y4": y2}
        said = [{"quad": quad, "text": word, "is_key": key, "row_id": 1} for word, key in words]
        return {"category": category, "group_id": 1, "sub_group_id": 0, "words": said}

    lines = [
        line("total.total_price", [60, 80, 240, 100], ("TOTAL", 1), ("9.30", 0)),
        line("date", [260, 200, 300, 260], ("25/12", 0), ("/2018", 0)),
        line("menu.nm", [0, 0, 60, 40], ("TEA", 0)),
        line("menu.nm", [0, 40, 60, 80], ("BUN", 0)),
    ]
    meta = {"version": "0.1", "split": "train", "image_id": 0, "image_size": {"width": 600, "height": 400}}
    return dump(folder / "json/page.json", {"valid_line": lines, "meta": meta, "roi": {}}).parents[1]


TOTAL, DATE = (60, 80, 240, 100), (260, 200, 300, 260)
TEXTS = {  # form, file, boxes that are around others, the box of the shop
    "label-studio": (label_studio, 2, (0, 0, 60, 40)),
    "label-studio-min": (label_studio_min, 2, (0, 0, 60, 40)),
    "labelme": (labelme, 2, (10, 0, 50, 40)),
    "via": (via, 2, (10, 0, 50, 40)),
    "cvat": (cvat, 2, (0, 0, 60, 40)),
    "coco": (coco_of_cvat, 2, (0, 0, 60, 40)),
    "funsd": (funsd, 0, None),
    "cord": (cord, 0, None),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_tools_labels_and_texts_become_questions_for_every_command(tmp_path, monkeypatch, caplog, name) -> None:
    make, turned, shop = TEXTS[name]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "ann").relative_to(tmp_path)
    assert recognize(path) == name.removesuffix("-min")
    said = call("data", "build", path, "out/items.jsonl", *ASK).stdout
    items = list(read_items("out/items.jsonl"))
    kept = {item.messages[-1].content: tuple(item.extra["bboxs"][0]) for item in items}
    wanted = {"9.30": TOTAL, "25/12/2018" if name not in ("funsd", "cord") else "25/12 /2018": DATE}
    assert kept == wanted | ({"ACME": shop} if shop else {})
    asked = items[0].messages[0].content
    assert ("What is the total?" if name != "cord" else "What is the total total price?") in asked
    assert (f"{turned} rotated boxes or outlines" in said) is bool(turned)
    left = {"label-studio": "the task is not annotated", "cord": "are called 'menu.nm' and say different things"}
    assert left.get(name, "written:") in said
    # the others
    report = json.loads(call("data", "check", path, "--json", *ASK, code=int(name in left)).stdout)
    assert report["items"] == len(items) + (name in left) and report["counts"] == ({"form": 1} if name in left else {})
    assert sum(report["notes"].values()) == turned
    call("data", "preview", path, "page.html")
    assert "data:image/jpeg" in Path("page.html").read_text() and "9.30" in Path("page.html").read_text()
    assert {q.answer: q.boxes[0] for q in read_questions(path)} == kept
    assert (f"{path}: 1 records left out, the first: " in caplog.text) is (name in left)
    assert f"{len(items)} items" in call("data", "stats", path).stdout
    data = Data.model_validate({"path": str(path), "max_broken": 1})
    taught = open_items(data, 1)
    (record,) = [each for each in taught.records[0] if getattr(each.value["item"], "answer", "") == "9.30"]
    item = taught.item(0, record)
    assert item.messages[-1].content == "9.30" and Path(item.images["images"][0]).is_file()


def yolo(folder: Path) -> Path:
    """Ultralytics' layout (https://docs.ultralytics.com/datasets/detect/): fractions, middle first; an outline."""
    picture(folder / "images/train/a.jpg", (600, 400))
    picture(folder / "images/train/none.jpg", (600, 400))
    text(folder / "labels/train/a.txt", "0 0.25 0.225 0.3 0.05\n0 0.5 0.5 0.1 0.1\n1 0 0 0.1 0 0.05 0.1\n")
    text(folder / "data.yaml", "path: /home/me/set\ntrain: images/train\nval: images/val\nnames:\n  0: dog\n  1: cat\n")
    return folder


def voc(folder: Path) -> Path:
    """Pascal VOC: annotations beside JPEGImages, coordinates from 1, the last pixel included."""
    picture(folder / "JPEGImages/a.jpg", (600, 400))
    boxes = [("dog", (61, 81, 240, 100)), ("dog", (271, 181, 330, 220)), ("cat", (1, 1, 60, 40))]
    objects = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult><bndbox>"
        f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>\n"
        for name, (x1, y1, x2, y2) in boxes
    )
    size = "<size><width>600</width><height>400</height><depth>3</depth></size>"
    head = f"<annotation><folder>VOC2012</folder><filename>a.jpg</filename>{size}\n"
    return text(folder / "Annotations/a.xml", f"{head}{objects}</annotation>").parents[1]


@pytest.mark.parametrize("make", [yolo, voc])
def test_boxes_without_text_are_counted(tmp_path, make) -> None:
    """The boxes are those that supervision 0.31.2 reads from the two folders (in YOLO, given as boxes)."""
    path = make(tmp_path / "set")
    assert recognize(path) == make.__name__
    dogs, cats = read(path)
    assert dogs.answer == "2" and '"dog"' in dogs.text and dogs.boxes == ((60, 80, 240, 100), (270, 180, 330, 220))
    assert cats.answer == "1" and cats.boxes == ((0, 0, 60, 40),) and cats.size == (600, 400)
    assert len(cats.notes) == (1 if make is yolo else 0)
    call("data", "build", path, tmp_path / "items.json")
    call("data", "check", path)
    assert "left out" in refused("data", "build", path, tmp_path / "x.json", *ASK)  # they have no text


@pytest.mark.skipif(not RECEIPTS.is_dir(), reason="../shared/data/receipts is not there")
def test_real_receipts_come_back_from_percent_fractions_and_corners(tmp_path) -> None:
    """The boxes of 60 receipts, written as Label Studio, YOLO and Pascal VOC do, are the same pixels again."""
    tasks, kept = [], []
    for number, question in enumerate(islice(read(RECEIPTS / "val_qa.jsonl"), 60)):
        (width, height), (x1, y1, x2, y2) = question.size, question.boxes[0]
        kept.append((x1, y1, x2, y2))
        value = {"x": 100 * x1 / width, "y": 100 * y1 / height, "rotation": 0, "rectanglelabels": ["box"]}
        value |= {"width": 100 * (x2 - x1) / width, "height": 100 * (y2 - y1) / height}
        sides = {"original_width": width, "original_height": height}
        placed = {"id": "r", "type": "rectanglelabels", "from_name": "l", "to_name": "image", "value": value}
        tasks.append({"data": {"image": f"{number}.png"}, "annotations": [{"result": [placed | sides]}]})
        Image.new("L", question.size).save(tmp_path / f"{number:02d}.png")
        fractions = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
        text(tmp_path / f"labels/{number:02d}.txt", "0 " + " ".join(f"{value:.6f}" for value in fractions))
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / f"{number:02d}.png").rename(tmp_path / f"images/{number:02d}.png")
    text(tmp_path / "classes.txt", "box\n")
    assert [q.boxes[0] for q in read(dump(tmp_path / "ls.json", tasks))] == kept
    near = [
        max(abs(a - b) for a, b in zip(q.boxes[0], box, strict=True))
        for q, box in zip(read(tmp_path), kept, strict=True)
    ]
    assert max(near) <= 1  # six decimals are what YOLO writes


def test_questions_in_label_studio_keep_their_answers_and_several_images_are_told_apart(tmp_path) -> None:
    """The template for visual question answering: the question comes with the task, a choice answers it."""
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, (600, 400))
    results = [
        result("r1", "rectangle", AT, "box") | {"to_name": "first"},
        {"id": "c", "type": "choices", "from_name": "answer", "to_name": "first", "value": {"choices": ["paid"]}},
    ]
    task = {"data": {"image": "a.png", "question": "Is it paid?"}, "annotations": [{"result": results}]}
    pages = [result("p1", "rectanglelabels", {**AT, "rectanglelabels": ["logo"]}) | {"to_name": "first"},
             result("p2", "rectanglelabels", {**AT, "rectanglelabels": ["logo"]}) | {"to_name": "second"}]  # fmt: skip
    both = {"data": {"first": "a.png", "second": "b.png"}, "annotations": [{"result": pages}]}
    paid, first, second = read(dump(tmp_path / "ls.json", [task, both]))
    assert (paid.image, paid.text, paid.answers, paid.boxes) == ("a.png", "Is it paid?", ("paid",), (TOTAL,))
    assert (first.image, second.image) == ("a.png", "b.png") and first.answer == second.answer == "1"


def test_docvqa_is_read_and_its_test_set_left_out(tmp_path) -> None:
    """https://rrc.cvc.uab.es/?ch=17&com=tasks: one object with the questions under `data`."""
    picture(tmp_path / "documents/x_1.png", (600, 400))
    row = {"questionId": 337, "question": "What is the date?", "image": "documents/x_1.png", "docId": 279}
    head = {"dataset_name": "docvqa", "dataset_split": "train", "dataset_version": "0.1"}
    path = dump(tmp_path / "train_v1.0.json", head | {"data": [row | {"answers": ["1/8/93", "1/8/93"]}]})
    (question,) = read(path)
    assert (question.image, question.answers) == ("documents/x_1.png", ("1/8/93",))
    assert recognize(path) == "docvqa"
    (tmp_path / "test.json").write_text(json.dumps(head | {"data": [row]}))
    with pytest.raises(LeftOut, match="has no 'answers'"):
        next(read(tmp_path / "test.json"))


def places(value, place=()):
    """The places of all values in nested lists and objects."""
    if place:
        yield place
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*place, key))


JUNK = (None, "x", "", [], {}, [None], -1, 1.5, True, {"a": 1}, float("nan"))
SWIFT = {
    "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "<ref-object><bbox>"}],
    "images": ["a.png"],
    "objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]},
}
BOXED_TALK = {
    "image": "a.png", "width": 600, "height": 400,
    "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<box>[[1, 2, 3, 4]]</box> x"}],
}  # fmt: skip
ROW = {"images": ["a.png"], "question": "?", "answers": [{"text": "x"}], "bbox": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}}


@pytest.mark.parametrize("name", [*TEXTS, "swift", "llava", "questions"])
def test_whatever_is_wrong_in_a_file_is_one_sentence_that_names_it(tmp_path, name) -> None:
    """Files with one value at a random place taken out or replaced are read, or refused with their place."""
    rows = {"swift": SWIFT, "llava": BOXED_TALK, "questions": ROW}
    source = dump(tmp_path / "a.json", [rows[name]]) if name in rows else TEXTS[name][0](tmp_path / "ann")
    if name == "cvat":
        good = source.read_text()
        spoiled = [
            good.replace(f'"{value}"', '"x"') for value in ("60.00", "600", "90", "0.00,0.00;60.00,0.00;30.00,40.00")
        ]
    else:
        file, draw = source if source.is_file() else next(source.rglob("*.json")), Random(name)
        good, spoiled = file.read_text(), []
        for _ in range(80):
            value = json.loads(good)
            *path, last = draw.choice(list(places(value)))
            parent = value
            for key in path:
                parent = parent[key]
            parent[last] = draw.choice(JUNK)
            if draw.random() < 0.3:
                del parent[last]
            spoiled.append(json.dumps(value))
    for content in spoiled:
        (file if name != "cvat" else source).write_text(content)
        try:
            opened = Source(source, name.removesuffix("-min"))
            for record in map(readable, opened.scan()):
                with suppress(LeftOut):
                    opened.thing(record)
        except UserError as error:
            assert str(error).startswith(str(tmp_path)) and len(str(error).splitlines()) == 1, error


# -- tables and near misses


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.csv", "image,question,answer,x1,y1,x2,y2\na.png,What?,9.30,60,80,240,100\n"),
        ("q.tsv", "image_path\tprompt\tanswer\tbbox\na.png\tWhat?\t9.30\t[60, 80, 240, 100]\n"),
        ("semicolon.csv", "\ufefffilename;question;answer;xmin;ymin;xmax;ymax\na.png;What?;9.30;60;80;240;100\n"),
        ("q.jsonl", '{"img": "a.png", "question": "What?", "answer": "9.30", "box": [60, 80, 240, 100]}\n'),
        ("r.jsonl", json.dumps({"image": ["a.png"], "query": "What?", "answers": [{"text": "9.30"}],
                                "boxes": [[60, 80, 240, 100]]})),
        ("s.jsonl", json.dumps({"image": "a.png", "question": "What?", "answer": "9.30",
                                "bbox": {"x1": 60, "y1": 80, "x2": 240, "y2": 100}})),
    ],
)  # fmt: skip
def test_near_misses_are_read_where_they_are_unambiguous_by_every_command(tmp_path, name, content) -> None:
    picture(tmp_path / "a.png", (600, 400))
    path = text(tmp_path / name, content)
    (question,) = read(path)
    assert (question.image, question.text, question.answers, question.boxes) == ("a.png", "What?", ("9.30",), (TOTAL,))
    (again,) = read_questions(path)
    assert again.boxes == (TOTAL,) and Path(again.image).is_file()
    call("data", "build", path, tmp_path / "out.json")
    assert "no fault found" in call("data", "check", path).stdout
    call("data", "preview", path, tmp_path / "page.html")
    call("data", "stats", path)


def test_columns_name_what_has_another_name_in_every_form(tmp_path) -> None:
    picture(tmp_path / "a.png", (600, 400))
    names = ["--columns", "image=scan", "question=frage", "answer=antwort"]
    line = {"scan": "a.png", "frage": "What?", "antwort": 5, "bbox": [60, 80, 240, 100]}
    for path in (
        write(tmp_path / "q.jsonl", line),
        text(tmp_path / "q.csv", "scan,frage,antwort,x1,y1,x2,y2\na.png,What?,5,60,80,240,100\n"),
    ):
        call("data", "build", path, tmp_path / "out.json", *names)
        (item,) = read_items(tmp_path / "out.json")
        assert item.messages[-1].content == "5" and item.extra["bboxs"] == [list(TOTAL)]
        call("data", "check", path, *names)
        call("data", "preview", path, tmp_path / "page.html", *names)
        call("data", "stats", path, *names)
        assert "name its columns with --columns" in refused("data", "build", path, tmp_path / "x.json")
    project = json.loads(via(tmp_path / "via").read_text())
    (entry,) = project["_via_img_metadata"].values()
    for region in entry["regions"]:
        region["region_attributes"] = {"kind": region["region_attributes"]["label"], "words": "so", "note": "x"}
    dump(tmp_path / "via/via.json", project)
    found = list(read(tmp_path / "via/via.json", columns={"label": "kind", "answer": "words"}))
    assert [q.field for q in found] == ["total", "date", "shop"] and {q.answer for q in found} == {"so"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"scan": "a.png", "question": "?", "answer": "a"}, "no 'image' among its keys (scan, question, answer)"),
        ({"image": "a.png", "question": "?", "reply": "a"}, "no 'answer' among its keys (image, question, reply)"),
        ({"img": "a.png", "image_path": "b.png", "question": "?", "answer": "a"}, "may be img or image_path; say"),
        ({"image": "a.png", "question": "?", "answer": None}, "'answer' is None; expected text, a number"),
        ({"image": "a.png", "question": "?", "answer": [["a"]]}, "'answer' is [['a']]; expected text"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_missing_names_the_keys(tmp_path, line, words) -> None:
    assert words in refused("data", "build", write(tmp_path / "q.jsonl", line), tmp_path / "o.json")


@pytest.mark.parametrize(
    ("answer", "texts"),
    [(5, ("5",)), (9.5, ("9.5",)), (True, ("yes",)), ([1, 2], ("1", "2")),
     ({"text": ["a", "a", "b"], "answer_start": [1, 1, 7]}, ("a", "b")),
     ([{"answer": "net", "answer_confidence": "yes"}, {"answer": "net"}], ("net",))],
)  # fmt: skip
def test_numbers_booleans_and_structs_are_answers(tmp_path, answer, texts) -> None:
    (question,) = read(write(tmp_path / "q.jsonl", {"image": "a.png", "question": "?", "answer": answer}))
    assert question.answers == texts


def test_several_images_make_one_item_and_boxes_on_them_are_left_out(tmp_path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    line = {"images": ["a.png", "b.png"], "question": "Same?", "answer": "no"}
    path = write(tmp_path / "q.jsonl", line, line | {"bbox": [1, 2, 30, 40]})
    said = call("data", "build", path, tmp_path / "out.jsonl").stdout
    (item,) = read_items(tmp_path / "out.jsonl")
    assert isinstance(item, Item) and item.images["images"] == ("a.png", "b.png")
    assert item.placeholder_counts()["images"] == 2 and "which one its boxes are of is not said" in said


def test_a_dataset_is_read_by_every_command(tmp_path) -> None:
    """A folder that `save_to_disk` wrote and Parquet, with an Image column and a class label."""
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"),
                               "label": datasets.ClassLabel(names=["no", "yes"])})  # fmt: skip
    rows = {"image": [Image.new("RGB", (60, 40), "red")], "question": ["Is it?"], "label": [1]}
    made = datasets.Dataset.from_dict(rows, features=kinds)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "set.parquet"))
    for path in (tmp_path / "saved", tmp_path / "set.parquet"):
        (question,) = read_questions(path)
        assert question.answer == "yes" and question.image.size == (60, 40)
        assert "no fault found" in call("data", "check", path).stdout
        call("data", "preview", path, tmp_path / "page.html")
        assert "data:image/jpeg" in (tmp_path / "page.html").read_text()
        call("data", "stats", path)
        call("data", "build", path, tmp_path / "out.jsonl", "--no-box", "direct")
        (item,) = read_items(tmp_path / "out.jsonl")
        assert item.messages[-1].content == "yes"


def test_a_training_set_of_parquet_has_the_names_of_its_classes(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    kinds = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"),
                               "label": datasets.ClassLabel(names=["no", "yes"])})  # fmt: skip
    rows = {"image": [Image.new("RGB", (60, 40), "red")], "question": ["Is it?"], "label": [1]}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet("set.parquet")
    taught = open_items(Data.model_validate({"path": "set.parquet"}), 1)
    assert taught.item(*taught.record(0)).messages[-1].content == "yes"


# -- marks of other tools


def test_marks_of_other_tools_are_resolved_where_their_form_defines_them(tmp_path) -> None:
    """ms-swift's objects, and <ref> and <box> of InternVL and Qwen-VL, in thousandths of the image."""
    picture(tmp_path / "a.png", (600, 400))
    turns = [("user", "<image>What do you see?"), ("assistant", "<ref-object><bbox> and <ref-object><bbox>.")]
    swift = {"messages": [{"role": role, "content": said} for role, said in turns], "images": ["a.png"]}
    swift["objects"] = {"ref": ["a dog", "a cat"], "bbox": [list(TOTAL), list(DATE)]}
    (found,) = read(write(tmp_path / "swift.jsonl", swift))
    assert (found.text, found.answer, found.boxes) == ("What do you see?", "a dog and a cat.", (TOTAL, DATE))
    boxed = "<ref>the total</ref><box>[[100, 200, 400, 250]]</box> is 9.30"
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": boxed}]
    line = {"image": "a.png", "width": 600, "height": 400, "conversations": talk}
    (found,) = read(write(tmp_path / "internvl.jsonl", line))
    assert (found.answer, found.boxes) == ("the total is 9.30", (TOTAL,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": None}, "<box> counts in thousandths of the image; add its width and height"),
        ({"conversations": [{"from": "human", "value": "<image>What is at <box>[[1, 2, 3, 4]]</box>?"},
                            {"from": "gpt", "value": "x"}]}, "<box> in a question points at a place"),
        ({"conversations": [{"from": "human", "value": "<image><video>What?"}, {"from": "gpt", "value": "x"}]},
         "<video> in a text"),
        ({"conversations": [{"from": "human", "value": "<image>Where?"},
                            {"from": "gpt", "value": "<box>[[1, 2, 3, 4]]</box>"}]}, "nothing but boxes"),
    ],
)  # fmt: skip
def test_marks_that_nothing_resolves_are_left_out_with_file_and_line(tmp_path, change, words) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "<box>[[1, 2, 3, 4]]</box> x"}]
    line = {"image": "a.png", "width": 600, "height": 400, "conversations": talk}
    with pytest.raises(LeftOut, match=rf"q.jsonl:1: .*{words}"):
        list(read(write(tmp_path / "q.jsonl", line | change)))


# -- files of no known form


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"%PDF-1.7\n", "looks like a PDF"),
        ("a.csv", b"PK\x03\x04rest", "a ZIP archive or a spreadsheet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.json", b"<!DOCTYPE html><html>", "a web page"),
        ("a.txt", b"image,question,answer\n", "looks like a table; let its name end in .csv"),
        ("a.json", b'{\n "info": {},\n "entries": [{"a": 1}]\n}', "its first record has info, entries)"),
        ("a.json", b'{\n "image": "a.png",\n "question": "?"\n}', "one JSON object over several lines"),
        ("a.xml", b"<osm><node/></osm>", "not of a known form (its first record has <osm>)"),
        ("a.xml", b"<annotation>\n<object>", "a.xml:2: broken XML"),
    ],
)  # fmt: skip
def test_a_file_of_no_known_form_is_named_by_what_it_looks_like(tmp_path, name, content, words) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for command in (["build", path, tmp_path / "o.json"], ["check", path], ["preview", path, tmp_path / "p.html"]):
        said = refused("data", *command)
        assert words in said and ("broken" not in said or "broken" in words)


def test_a_table_is_no_dataset_and_a_template_needs_its_label(tmp_path) -> None:
    path = text(tmp_path / "q.csv", "image,question,answer\na.png,?,x\n")
    assert "leave out --format hub" in refused("data", "build", path, tmp_path / "o.json", "--format", "hub")
    assert "whose questions are its own" in refused("data", "build", path, tmp_path / "o.json", *ASK)
    words = refused("data", "build", voc(tmp_path / "voc"), tmp_path / "o.json", "--ask", "What is it?")
    assert "expected a question with {label} in it" in words


def test_the_table_names_every_form_of_the_tests() -> None:
    assert {name.removesuffix("-min") for name in TEXTS} | {"yolo", "voc", "docvqa", "swift", "hub"} <= {*FORMATS}


def test_a_region_of_an_image_in_a_data_url_is_left_out_and_other_looks_are_built(tmp_path) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture(tmp_path / "a.png").read_bytes()).decode()
    line = {"image": url, "question": "What?", "answer": "a"}
    path = write(tmp_path / "q.jsonl", line | {"bbox": [1, 2, 30, 40]}, line)
    said = call("data", "build", path, tmp_path / "out/o.jsonl", "--no-box", "clip").stdout
    (item,) = read_items(tmp_path / "out/o.jsonl")
    assert item.images["clip_images"] == (url,) and "save it as a file" in said
