"""Files as hostile or careless people give them: what is read is what they hold, or one sentence says why not."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from support.source_files import picture, refused, write

from relook.data import build, check, read, read_items
from relook.data.forms import Source, recognize
from relook.data.items import LeftOut
from relook.data.reader import readable
from relook.errors import UserError

ASKED = {"image": "a.png", "question": "Total?", "answer": "9.30", "bboxs": [[10, 20, 100, 60]]}
BOX = (10, 20, 100, 60)


def dump(path: Path, value) -> Path:
    return table(path, json.dumps(value))


def table(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["objects", "qas", "regions", "form", "shapes", "names", "annotations", "label"])
def test_other_keys_of_a_question_do_not_make_another_form_of_it(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "q.jsonl", ASKED | {"text": "all of the page", key: [{"a": 1}]})
    (thing,) = read(path)
    assert recognize(path) == "questions" and (thing.text, thing.answer, thing.boxes) == ("Total?", "9.30", (BOX,))


def test_a_table_of_text_and_label_keeps_its_boxes(tmp_path: Path) -> None:
    (thing,) = read(table(tmp_path / "q.csv", "image,text,label,x1,y1,x2,y2\na.png,Total?,9.30,10,20,100,60\n"))
    assert (thing.text, thing.answer, thing.boxes) == ("Total?", "9.30", (BOX,))


def test_tables_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = "\n\nimage, question, answer, x_min, y_min, x_max, y_max\na.png, Total?, 9.30, 10, 20, 100, 60\n"
    (thing,) = read(table(tmp_path / "q.csv", text))
    assert (thing.text, thing.answer, thing.boxes) == ("Total?", "9.30", (BOX,)) and thing.where.endswith("q.csv:4")
    size = "image,question,answer,x1,y1,x2,y2,resized_width,resized_height\na.png,Total?,9.30,5,10,50,30,320,200\n"
    (thing,) = read(table(tmp_path / "r.csv", size), units="resized")
    assert thing.view == (320, 200)


@pytest.mark.parametrize(
    "text, why",
    [
        ('image,question,answer\na.png,"Who?,x\nb.png,When?,y\n', r"q.csv:2: .*quote"),
        ('image,question,answer\na.png,"Total" is?,x\n', r"q.csv:2: .*quote"),
        ("image,question,answer,x1,y1,x2,y2\na.png,Who?,x,1,2,,\n", "has x1, y1 and no x2, y2"),
        ("image,question,answer,x,y,w,h\na.png,Who?,x,1,2,3,4\n", "x, y, w, h.*--units"),
        ("image,question,answer,x,y,width,height\na.png,Who?,x,1,2,3,4\n", "x, y, width, height.*--units"),
        ("image,question,answer,answer\na.png,Who?,x,y\n", "two columns called 'answer'"),
    ],
)
def test_what_a_table_would_lose_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        list(read(table(tmp_path / "q.csv", text)))


def test_a_row_without_an_answer_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    rows = "a.png,Total?,9.30,10,20,100,60\na.png,When?,,,,,\na.png,Who?, ,,,,\na.png,What?,x,,,,\n"
    path = table(tmp_path / "q.csv", f"image,question,answer,x1,y1,x2,y2\n{rows}")
    found = list(Source(path).things())
    assert [(thing.text, thing.boxes) for thing in found] == [("Total?", (BOX,)), ("What?", ())]
    with pytest.raises(LeftOut, match=r"q.csv:3: 'answer' is None") as left:
        list(read(path))
    assert left.value.rule == "empty-answer"
    said = table(tmp_path / "r.csv", "image,question,reply\na.png,Total?,9.30\na.png,When?,\n")
    found = list(Source(said, columns={"answer": "reply"}).things())
    assert [thing.text for thing in found] == ["Total?"]
    with pytest.raises(UserError, match="no 'answer' among its keys"):  # no such column
        list(read(said))


def test_text_of_sixteen_bits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(ASKED).encode("utf-16"))
    assert "UTF-16" in refused("data", "check", path)


# -- annotation tools

SIDES = {"original_width": 640, "original_height": 400, "image_rotation": 0, "rotation": 0}


def percent(x: int, label: str) -> dict:
    return SIDES | {"x": x, "y": 10, "width": 10, "height": 10, "rectanglelabels": [label]}


def asked(path: Path, **reading) -> list[tuple]:
    things = [opened.thing(record) for opened in [Source(path, **reading)] for record in map(readable, opened.scan())]
    return [(thing.field, thing.answer, thing.boxes) for thing in things]


def test_json_min_loses_neither_regions_nor_texts(tmp_path: Path) -> None:
    line = {"image": "a.png", "dogs": [percent(10, "dog"), percent(50, "dog")], "cats": [percent(80, "cat")]}
    dogs = ("dog", "2", ((64, 40, 128, 80), (320, 40, 384, 80)))
    assert sorted(asked(dump(tmp_path / "two.json", [line]))) == [("cat", "1", ((512, 40, 576, 80),)), dogs]
    one = {"image": "a.png", "label": [percent(10, "total")], "tags": ["paid"]}
    path = dump(tmp_path / "one.json", [one | {"transcription": "9.30"}])  # unpacked, as Label Studio does
    assert asked(path) == [("total", "9.30", ((64, 40, 128, 80),))]
    assert asked(dump(tmp_path / "tags.json", [one])) == [("total", "1", ((64, 40, 128, 80),))]
    with pytest.raises(LeftOut, match="2 texts 'transcription' for 3 regions"):
        asked(dump(tmp_path / "few.json", [line | {"transcription": ["a", "b"]}]))


def test_every_label_of_a_region_of_label_studio(tmp_path: Path) -> None:
    picture(tmp_path / "my page.png", (640, 400))
    region = {"id": "r", "type": "rectanglelabels", "value": percent(10, "total") | {"rectanglelabels": ["a", "b"]}}
    data = {"image": "/data/local-files/?d=my%20page.png"}
    path = dump(tmp_path / "l.json", [{"data": data, "annotations": [{"result": [region | SIDES]}]}])
    assert [(name, answer) for name, answer, _ in asked(path)] == [("a", "1"), ("b", "1")]
    assert {thing.image for thing in read(path)} == {"my page.png"}


def test_coco_counts_no_label_of_which_some_have_a_text(tmp_path: Path) -> None:
    marks = [{"image_id": 1, "category_id": 1, "bbox": [x, 20, 90, 40]} for x in (10, 200, 300)]
    marks[0]["text"] = "A"
    page = {"id": 1, "file_name": "a.png", "width": 640, "height": 400}
    whole = {"images": [page], "annotations": marks, "categories": [{"id": 1, "name": "word"}]}
    with pytest.raises(LeftOut, match=r"3 regions of .* are called 'word' and not all have a text"):
        asked(dump(tmp_path / "c.json", whole))


def via(shape: dict, said: dict) -> dict:
    return {"a.png1": {"filename": "a.png", "regions": [{"shape_attributes": shape, "region_attributes": said}]}}


def test_a_text_alone_is_no_label_and_a_turned_circle_stays_one(tmp_path: Path) -> None:
    box = {"name": "rect", "x": 10, "y": 20, "width": 90, "height": 40}
    with pytest.raises(LeftOut, match="have no label"):
        asked(dump(tmp_path / "v.json", via(box, {"text": "9.30"})))
    circle = {"name": "ellipse", "cx": 100, "cy": 100, "rx": 50, "ry": 50, "theta": 0.7}
    assert asked(dump(tmp_path / "w.json", via(circle, {"name": "coin"}))) == [("coin", "1", ((50, 50, 150, 150),))]
    drawn = '<ellipse label="coin" cx="100" cy="100" rx="50" ry="20" rotation="90"/>'
    page = f'<annotations><image name="a.png" width="640" height="400">{drawn}</image></annotations>'
    assert asked(table(tmp_path / "c.xml", page)) == [("coin", "1", ((80, 50, 120, 150),))]


def test_a_label_keeps_its_dots_where_it_is_written_in_words(tmp_path: Path) -> None:
    entity = {"id": 0, "label": "question", "text": "U.S. Total No.:", "box": [1, 2, 3, 4], "linking": [[0, 1]]}
    other = {"id": 1, "label": "answer", "text": "9.30", "box": [10, 20, 100, 60], "linking": [[0, 1]]}
    (thing,) = read(dump(tmp_path / "f.json", {"form": [entity, other]}))
    assert thing.text == "What is the U.S. Total No.?"


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "NaN", "-Infinity"])
def test_numbers_beyond_any_image(tmp_path: Path, number: str) -> None:
    page = {"images": [], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 2, 3, 4]}], "categories": []}
    labelme = {"shapes": [{"label": "a", "points": [[0, 1], [2, 3]], "shape_type": "rectangle"}], "imagePath": "a.png"}
    for name, value in (
        ("q", ASKED | {"bboxs": [[0, 2, 3, 4]]}),
        ("c", page | {"categories": [{"id": 1}]}),
        ("l", labelme),
    ):
        text = json.dumps(value).replace("[0,", f"[{number},")
        assert number[:9] in text and f"{name}.json:1" in refused(
            "data", "build", table(tmp_path / f"{name}.json", text), tmp_path / "no.jsonl"
        )
    path = table(tmp_path / "answer.jsonl", json.dumps(ASKED).replace('"9.30"', "1" + "0" * 400))
    assert next(iter(read(path))).answer == "1" + "0" * 400


def yolo(folder: Path, line: str, sets: str = "train: images/train\nnames: [dog, cat]\n") -> Path:
    picture(folder / "images/train/a.png", (640, 400))
    picture(folder / "images/more/b.png", (640, 400))
    for name in ("train/a", "more/b"):
        (folder / f"labels/{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        table(folder / f"labels/{name}.txt", line)
    return table(folder / "data.yaml", sets)


def test_yolo_poses_lists_of_folders_and_lines_of_classes(tmp_path: Path) -> None:
    box = ((240, 150, 400, 250),)
    pose = yolo(
        tmp_path / "pose", "0 .5 .5 .25 .25 .9 .9 .1 .1", "train: images/train\nkpt_shape: [2, 2]\nnames: [dog]"
    )
    assert asked(pose) == [("dog", "1", box)]
    both = yolo(tmp_path / "both", "\ufeff1 .5 .5 .25 .25", "train: [images/train, images/more]\nnames: [dog, cat]\n")
    assert asked(both) == [("cat", "1", box)] * 2
    (blank := yolo(tmp_path / "blank", "2 .5 .5 .25 .25")).unlink()
    table(blank.with_name("classes.txt"), "dog\n\ncat\n")
    assert asked(blank.parent) == [("cat", "1", box)] * 2
    with pytest.raises(UserError, match=r"a.txt:1: class 1\.5 is not among"):
        asked(yolo(tmp_path / "half", "1.5 .5 .5 .25 .25"))


def test_encodings_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("gbk", "furlongs"):
        path = table(tmp_path / f"{name}.xml", f'<?xml version="1.0" encoding="{name}"?><annotation></annotation>')
        assert "UTF-8" in refused("data", "check", path) and f"{name}.xml:1" in refused("data", "check", path)
    path = yolo(tmp_path / "y", "0 .5 .5 .25 .25")
    (tmp_path / "y/labels/train/a.txt").write_bytes(b"0 .5 .5 .25 .25 \xe9")
    assert "a.txt: is not UTF-8" in refused("data", "check", path)


# -- conversations


def test_marks_of_ms_swift_need_objects(tmp_path: Path) -> None:
    def line(answer: str, **more: object) -> dict:
        said = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": answer}]
        return {"messages": said, "images": ["a.png"], **more}

    marked = line("the dog <bbox>", objects={"ref": [], "bbox": [[10, 20, 100, 60]]})
    with pytest.raises(LeftOut, match="has no 'objects'"):
        list(read(write(tmp_path / "s.jsonl", marked, line("the dog <bbox>"))))
    _, second = read(write(tmp_path / "t.jsonl", line("there"), marked))  # whichever comes first
    assert (second.answer, second.boxes) == ("the dog", (BOX,))


def tagged(asked: str, answer: str) -> dict:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "width": 640, "height": 400, "conversations": turns}


def test_marks_of_qwen_vl_are_words_and_thousandths(tmp_path: Path) -> None:
    path = write(
        tmp_path / "l.jsonl", tagged("Where is <ref>the dog</ref>?", "<ref>Here</ref><box>[[100,50,500,1000]]</box>")
    )
    (thing,) = read(path)
    assert (thing.text, thing.answer, thing.boxes) == ("Where is the dog?", "Here", ((64, 20, 320, 400),))
    for numbers in ("100,-200,300,400", "100,200,1300,400", "0.1,0.2,0.3,0.4", "300,400,100,200", "1,2,3"):
        with pytest.raises(LeftOut, match="is no box; expected x1, y1, x2, y2 in thousandths"):
            list(read(write(tmp_path / "n.jsonl", tagged("Where?", f"here <box>[[{numbers}]]</box>"))))
    with pytest.raises(UserError, match="it defines what they are in"):
        list(read(path, units="0-1000"))


def test_units_of_a_form_that_says_its_own_are_refused(tmp_path: Path) -> None:
    mark = {"image_id": 1, "category_id": 1, "bbox": [10, 20, 90, 40]}
    page = {"id": 1, "file_name": "a.png", "width": 640, "height": 400}
    coco = dump(tmp_path / "c.json", {"images": [page], "annotations": [mark], "categories": [{"id": 1, "name": "a"}]})
    task = dump(tmp_path / "l.json", [{"image": "a.png", "label": [percent(10, "total")]}])
    for path, units in ((coco, "xywh"), (task, "percent"), (task, "percent xywh")):
        assert "leave out --units" in refused("data", "build", path, tmp_path / "no.jsonl", "--units", units)
    assert asked(coco, units="pixels") == [("a", "1", (BOX,))]


# -- datasets


def parquet(path: Path, *rows: dict) -> Path:
    datasets = pytest.importorskip("datasets")
    held = BytesIO()
    Image.new("RGB", (640, 400)).save(held, "PNG")
    datasets.Dataset.from_list([{"image": {"bytes": held.getvalue(), "path": None}} | row for row in rows]).to_parquet(
        path
    )
    return path


CORNERS = {"x1": 10, "y1": 20, "x2": 100, "y2": 60}


@pytest.mark.parametrize(
    "box", [CORNERS, {"bbox": "[10, 20, 100, 60]"}, {"bbox": CORNERS}, {"boxes": [[10, 20, 100, 60]]}]
)
def test_rows_of_parquet_are_those_of_a_table(tmp_path: Path, box: dict) -> None:
    path = parquet(tmp_path / "q.parquet", {"question": "Total?", "answer": "9.30", "field": "total"} | box)
    assert asked(path) == [("total", "9.30", (BOX,))]
    report = build(path, tmp_path / "items.jsonl")
    (item,) = read_items(tmp_path / "items.jsonl")
    assert report.items == 1 and (item.extra["field"], item.extra["bboxs"]) == ("total", [[*BOX]])
    assert check(path).ok and check(tmp_path / "items.jsonl").ok  # its crop is in memory


def test_names_that_differ_are_asked_about_in_parquet_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "q.parquet", {"query": "Total?", "text": "all of the page", "answer": "9.30"})
    assert "--columns question=query" in refused("data", "build", path, tmp_path / "no.jsonl")


def test_columns_of_no_use_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", ASKED)
    assert "--columns foo=...: read as questions, which has image, question" in refused(
        "data", "build", path, tmp_path / "no.jsonl", "--columns", "foo=answer"
    )


def test_images_of_every_form_are_held_against_the_items(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (640, 400))
    build(write(tmp_path / "q.jsonl", ASKED), items := tmp_path / "items.jsonl")
    box = {"name": "rect", "x": 10, "y": 20, "width": 90, "height": 40}
    others = [
        dump(tmp_path / "v.json", via(box, {"name": "total"})),
        table(tmp_path / "q.csv", "image_path,query,answer\na.png,Total?,9.30\n"),
        write(tmp_path / "asked.jsonl", {"image": "a.png"}),
    ]
    for other in others:
        assert check(items, against=[other]).counts == {"evaluated": 1}, other


def test_lists_that_a_program_wrote_into_cells(tmp_path: Path) -> None:
    cells = {'["9.30", "9.3"]': ("9.30", "9.3"), "['9.30']": ("9.30",), "{'text': ['9.30'], 'at': [1]}": ("9.30",)}
    cells |= {"[9.30]": ("[9.30]",), "{x}": ("{x}",)}  # which are texts
    for cell, answers in cells.items():
        quoted = cell.replace('"', '""')
        (thing,) = read(table(tmp_path / "q.csv", f'image,question,answer\na.png,Total?,"{quoted}"\n'))
        assert thing.answers == answers
    for cell in ("['9.30' '9.3']", "{'text': array(['9.30'])}"):  # numpy's
        with pytest.raises(UserError, match=r"q.csv:2: a cell looks like a list"):
            list(read(table(tmp_path / "q.csv", f'image,question,answer\na.png,Total?,"{cell}"\n')))


def test_items_beside_annotations_do_not_stop_a_second_build(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (640, 400))
    shape = {"label": "total", "points": [[10, 20], [100, 60]], "shape_type": "rectangle", "description": "9.30"}
    dump(tmp_path / "a.json", {"shapes": [shape], "imagePath": "a.png"})
    for _ in range(2):
        assert build(tmp_path, tmp_path / "items.json").items == 1
