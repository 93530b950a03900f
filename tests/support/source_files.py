"""Sample records and files of every input format, and a runner of the command line, for the tests of sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from relook.cli import app
from relook.data import Question, build_item
from support import ROOT

BENCHMARK = ROOT / "../shared/data/viscot_benchmark"
needs_benchmark = pytest.mark.skipif(not BENCHMARK.is_dir(), reason="../shared/data/viscot_benchmark is not there")

QUESTION = {"image": "cot/gqa/7.jpg", "width": 640, "height": 400, "question": "Who?", "answer": "ACME"}
BOXED = QUESTION | {"bboxs": [[100, 120, 300, 240]]}
ASKS = " Please provide the bounding box coordinate of the region that can help you answer the question better."
VISCOT = {
    "dataset": "gqa",
    "image": ["cot/gqa/7.jpg", "cot/gqa/7.jpg###[217, 343, 242, 393]"],
    "conversations": [
        {"from": "human", "value": f"<image>\nWhat is it?{ASKS}"},
        {"from": "gpt", "value": "[0.542, 0.686, 0.592, 0.786]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "window"},
    ],
}
LLAVA = {
    "id": "1",
    "image": "coco/train2017/1.jpg",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
}
LONG = LLAVA | {
    "conversations": [*LLAVA["conversations"], {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]
}
COCO = {
    "info": {"year": 2017, "list": [1, [2]]},
    "images": [
        {"id": 1, "file_name": "1.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "2.jpg", "width": 50, "height": 50},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 2, "category_id": 5, "bbox": [0, 0, 10, 10], "iscrowd": 0},
        {"image_id": 1, "category_id": 5, "bbox": [10.5, 20, 30, 40], "iscrowd": 0},
        {"image_id": 2, "category_id": 9, "bbox": [5, 5, 10, 10], "iscrowd": 1},
        {"image_id": 1, "category_id": 5, "bbox": [60, 0, 20, 20], "iscrowd": 0},
        {"image_id": 2, "question": "What colour?", "answer": "red", "bbox": [1, 2, 3, 4]},
    ],
    "categories": [{"id": 5, "name": "dog"}, {"id": 9, "name": "person"}],
}
VG = {"id": 3, "regions": [{"image_id": 3, "phrase": "a red bus", "x": 0, "y": 60, "width": 30, "height": 30}]}
VG_QA = {
    "id": 3,
    "qas": [
        {"image_id": 3, "question": "What?", "answer": "A bus.", "a_objects": [{"x": 1, "y": 2, "w": 3, "h": 4}]},
        {"image_id": 3, "question": "Why?", "answer": "So.", "a_objects": [], "q_objects": []},
    ],
}
POPE = {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a dog?", "label": "yes"}
ITEM = build_item(Question.from_dict(BOXED)).to_dict()

RECORDS = {"items": ITEM, "viscot": VISCOT, "llava": LLAVA, "vg": VG_QA, "pope": POPE, "questions": BOXED}


def write(path: Path, *rows: dict, indent: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(list(rows), indent=indent), encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = (640, 400)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)
    return path


def call(*argv: object, code: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in argv])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


def refused(*argv: object) -> str:
    lines = call(*argv, code=2).stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("relook: ")
    return lines[0]
