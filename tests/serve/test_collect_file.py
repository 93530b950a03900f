"""The file of `relook serve --collect`, beside other writers of it: links, editors, pages of files."""

from __future__ import annotations

import base64
import io
import json

import pytest
from fastapi.testclient import TestClient
from support.canned_engine import CannedEngine
from support.item_folder import call
from support.scripted_model import picture

from relook.errors import UserError
from relook.serve.app import create_app
from relook.serve.collect import Collection
from relook.serve.settings import ServeSettings


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_of_other_writers_are_known_again(tmp_path):
    own = tmp_path / "own.jsonl"
    there = [
        {"image": ["a.png"], "question": " q ", "answer": "a"},
        {"image": {"path": "b.png"}, "question": ["r"], "answer": "a"},
    ]
    own.write_text("".join(json.dumps(line) + "\n" for line in there))
    line = {"image": "./a.png", "question": "q", "answer": "b", "bboxs": []}
    assert Collection(own).save(line) == (1, "corrected")
    assert lines(own) == [line, there[1]]


def test_a_link_stays_and_its_file_is_corrected(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "own.jsonl").symlink_to("real/own.jsonl")
    line = {"image": "a.png", "question": "q", "answer": "b", "bboxs": []}
    collection = Collection(tmp_path / "own.jsonl")
    assert collection.save(line) == (1, "new")
    assert collection.save(line | {"answer": "c"}) == (1, "corrected")
    assert collection.save(line | {"question": "r"}) == (2, "new")
    assert (tmp_path / "own.jsonl").is_symlink()
    assert [each["answer"] for each in lines(tmp_path / "real/own.jsonl")] == ["c", "b"]


@pytest.mark.parametrize(("name", "said"), [("own.csv", "ends in .jsonl"), ("own.parquet", "ends in .jsonl")])
def test_lines_of_json_are_not_written_under_the_name_of_a_table(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        Collection(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_device_is_no_file():
    with pytest.raises(UserError, match="/dev/null: not a file"):
        Collection("/dev/null")


def test_a_page_of_a_file_is_kept_as_that_page(tmp_path):
    file, own = io.BytesIO(), Collection(tmp_path / "own.jsonl")
    client = TestClient(create_app(CannedEngine(), ServeSettings(), own))
    picture(size=(160, 120)).save(file, "TIFF", save_all=True, append_images=[picture(1, (80, 40))])
    url = "data:image/tiff;base64," + base64.b64encode(file.getvalue()).decode() + "#page=2"
    line = {"image": url, "question": "q", "answer": "a", "bboxs": [[0, 0, 100, 40]]}  # page 2 has 80 x 40 pixels
    assert client.post("/v1/collect", json=line).json()["error"]["param"] == "bboxs"
    assert client.post("/v1/collect", json=line | {"bboxs": [[1, 2, 30, 40]]}).json()["saved"] == "new"
    (line,) = lines(tmp_path / "own.jsonl")
    assert line["image"].endswith(".tiff#page=2")
    call("data", "build", tmp_path / "own.jsonl", tmp_path / "items.json")
