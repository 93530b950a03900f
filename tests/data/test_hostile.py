"""Files as hostile or careless people give them: what is read is what they hold, or one sentence says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.source_files import refused, write

from relook.data import read
from relook.data.forms import recognize
from relook.errors import UserError

ASKED = {"image": "a.png", "question": "Total?", "answer": "9.30", "bboxs": [[10, 20, 100, 60]]}
BOX = (10, 20, 100, 60)


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


def test_text_of_sixteen_bits_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(ASKED).encode("utf-16"))
    assert "UTF-16" in refused("data", "check", path)
