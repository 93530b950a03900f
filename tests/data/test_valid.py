"""One idea of a valid record: what training leaves out, `data check` and the dry run find, and text stays text.

Each case spoils the third of six items. The judge of what training stumbles over is the processor: whatever is not left
out must encode, and must show as many pads as its pictures make.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image
from support import ROOT
from support.item_sets import data, relative
from support.own_items import picture
from support.synthetic import SIZE, TINY

from relook.data import build, read, read_items
from relook.data.build import BuildReport
from relook.data.check import check
from relook.data.collate import EncodedDataset, SkippedSample
from relook.data.dataset import open_items
from relook.errors import UserError
from relook.model import new as tiny
from relook.train.dry_run import read_items as dry_read
from relook.train.recipe import Recipe
from relook.train.runner import run

CASES, RECEIPT = ROOT / "tests/fixtures/cases", ROOT / "examples/receipt-1.jpg"


@pytest.fixture(scope="module")
def processor():
    return tiny.build(TINY, seed=0)[1]


def said(text: str, turn: int = -1):
    return lambda item: item["messages"][turn].__setitem__("content", text)


def shown(*refs):
    return lambda item: item.__setitem__("images", list(refs))


def seg(item) -> None:
    item["messages"][0]["content"], item["images"] = "<seg_image>\nx", []
    item["seg_images"] = ["items-2.png"]


def answer_with_image(item) -> None:
    item["messages"][-1]["content"] = "![a](<image>)"
    item["images"].append("items-2.png")


LEFT_OUT = {
    "surrogate": said("<image>\nbad \ud83d", 0),
    "empty answer": said(" "),
    "user last": lambda item: item["messages"].append({"role": "user", "content": "more?"}),
    "image in an answer": answer_with_image,
    "clip in an answer": lambda item: (said("<clip_image>")(item), item["clip_images"].append("items-2.png")),
    "content list": lambda item: item["messages"][0].__setitem__("content", [{"type": "text", "text": "x"}]),
    "no list": lambda item: item.__setitem__("images", "items-2.png"),
    "numbers": shown(3),
    "null": shown(None),
    "dict": shown({"foo": 1}),
    "bytes that are text": shown({"bytes": "x"}),
    "a number of bytes": shown({"bytes": 99999999999}),
    "empty path": shown(""),
    "folder": shown("."),
    "zero byte": shown("a\0.png"),
    "missing": shown("gone.png"),
    "backwards": shown("items-2.png_50,50,10,10"),
    "outside": shown("items-2.png_500,500,600,600"),
    "too few": shown(),
    "half a call": said("<|clip_action_start|>"),
    "a look that the model lacks": seg,
    "its call": said("<|seg_action_start|><|seg_action|><|seg_action_end|>"),
    "cell beyond the last": said("<|region_token_start|><|x_8|><|y_1|><|x_2|><|y_3|><|region_token_end|>"),
    "no turns": lambda item: item.pop("messages"),
    "system in the middle": lambda item: item["messages"].insert(2, {"role": "system", "content": "x"}),
    "video": lambda item: item.__setitem__("videos", ["a.mp4"]),
}
MARKS = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|endoftext|>",
    "<video>",
    "<|im_end|>\n<|im_start|>user",
)
TEXT = {name: said(f"<image>\nWhat is {name}?", 0) for name in MARKS}
TEXT |= {f"{name} answered": said(f"the token {name} here") for name in ("<|im_end|>", "<|image_pad|>", "<bbox>")}


def spoiled(folder: Path, spoil) -> Path:
    path, items = folder / "items.json", []
    for n in range(6):
        picture(n).save(folder / f"items-{n}.png")
        turns = [("user", "<image>\nWhat is this?"), ("assistant", "a cat")]
        item = {"messages": [{"role": role, "content": text} for role, text in turns], "images": [f"items-{n}.png"]}
        items.append(item | {"clip_images": [], "detection_images": [], "seg_images": [], "number": n})
    spoil(items[2])
    path.write_text(json.dumps(items, indent=1))
    return path


def encoded(path: Path, processor, streaming: bool = False) -> list:
    plan = data(path=relative(path), streaming=streaming, buffer=2, max_broken=0.9)
    rows = EncodedDataset(open_items(plan, 1, processor=processor), processor)
    return [rows[i] for i in range(6)]


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_training_leaves_out_check_and_dry_run_find(tmp_path, processor, name) -> None:
    path = spoiled(tmp_path, LEFT_OUT[name])
    report = check(relative(path), looks=processor.looks)
    assert {finding.item for finding in report.findings} == {3}
    info = SimpleNamespace(processor=processor, config=SimpleNamespace(looks=processor.looks))
    plan = data(path=relative(path), max_broken=0.9)
    dry = dry_read(open_items(plan, 1, processor=processor), info)  # type: ignore[arg-type]
    assert sum(dry.problems.values()) == 1 or name in ("backwards", "outside", "folder")  # seen when they are opened
    for streaming in (False, True):
        open_items(data(path=relative(path), streaming=streaming, buffer=2, max_broken=0.9), 1, validation=1)
        (left,) = [row for row in encoded(path, processor, streaming) if isinstance(row, SkippedSample)]
        assert left.reason == "broken" and left.where == report.findings[0].where and "items.json:" in left.where


@pytest.mark.parametrize("name", TEXT)
def test_text_that_looks_like_structure_is_taught_as_text(tmp_path, processor, name) -> None:
    path = spoiled(tmp_path, TEXT[name])
    assert check(path, looks=processor.looks).ok
    pad = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for row in encoded(path, processor):
        assert row["input_ids"].count(pad) == int(row["image_grid_thw"].prod(-1).sum()) // 4
        assert pad not in row["labels"]


def test_questions_are_checked_as_training_takes_them(tmp_path, processor) -> None:
    spoiled(tmp_path, lambda item: None)
    lines = [
        {"image": f"items-{n}.png", "question": "What?", "answer": "x", "bboxs": [[4, 4, 20, 20]]} for n in range(6)
    ]
    lines[1] |= {"width": 999, "height": 999}
    lines[2]["image"] = "gone.png"
    lines[4]["answer"] = "half \ud83d"
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    report = check(relative(path), looks=processor.looks)
    assert {finding.item for finding in report.findings} == {2, 3, 5}
    plan = data(path=relative(path), max_broken=0.9)
    items = open_items(plan, 1, processor=processor)
    rows = EncodedDataset(items, processor)
    left = [row.where for i in range(6) if isinstance(row := rows[i], SkippedSample)]
    assert sorted(left) == sorted({finding.where for finding in report.findings})
    with pytest.raises(UserError, match="a question, of which `relook data build` makes an item"):
        check(path, fix=tmp_path / "mended.jsonl")


@pytest.mark.parametrize("value", [1e9, float("nan")])
def test_floats_that_are_no_pixels_are_no_image(tmp_path, processor, value) -> None:
    path = spoiled(tmp_path, shown("float.tif"))
    Image.fromarray(np.full((40, 40), value, np.float32)).save(tmp_path / "float.tif")
    assert [finding.item for finding in check(relative(path), looks=processor.looks).findings] == [3]
    assert [row.reason for row in encoded(path, processor) if isinstance(row, SkippedSample)] == ["broken"]


def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path, processor) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    path = spoiled(tmp_path, shown("pipe.png"))
    assert [finding.item for finding in check(relative(path), looks=processor.looks).findings] == [3]
    assert [row.reason for row in encoded(path, processor) if isinstance(row, SkippedSample)] == ["broken"]


def test_a_bomb_and_a_broken_image_are_left_out_and_named_through_every_door(tmp_path, processor, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    path = spoiled(tmp_path, lambda item: None)
    questions = [{"image": f"items-{n}.png", "question": "What?", "answer": "a cat"} for n in range(6)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    picture(2, (100, 90)).save(tmp_path / "items-2.png")
    (tmp_path / "items-4.png").write_bytes(b"no picture")
    assert check(path).counts == {"unreadable-image": 2}
    left = [row for row in encoded(path, processor) if isinstance(row, SkippedSample)]
    assert len(left) == 2 and any("decompression bomb" in one.what for one in left)
    report = build(tmp_path / "questions.jsonl", tmp_path / "built.json", look="clip")
    assert report.items == 4 and [line.split(": ")[0] for line in report.left_out] == [
        f"{tmp_path}/questions.jsonl:3", f"{tmp_path}/questions.jsonl:5",
    ]  # fmt: skip
    assert "2 records left out:" in str(report) and "decompression bomb" in str(report)


# -- the cases of issue 24


def case(folder: Path, name: str) -> Path:
    shutil.copytree(CASES, folder, dirs_exist_ok=True)
    for image in ("a.jpg", "receipt-1.jpg"):
        shutil.copy(RECEIPT, folder / image)
    return folder / name


def built(path: Path, **options) -> tuple[list, BuildReport]:
    report = build(path, path.with_name("out.json"), no_box="direct", **options)
    return list(read_items(path.with_name("out.json"))), report


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("markers.jsonl", "<image> in a text would stand for an image"),
        ("llava-image-in-answer.json", "<image> in what the assistant says shows nothing"),
        ("video.json", "its 'video' cannot be shown"),
        ("swift.jsonl", "the answer is nothing but boxes"),
    ],
)
def test_placeholders_that_a_form_defines_and_nothing_resolves_are_left_out(tmp_path, name, why) -> None:
    path = case(tmp_path, name)
    with pytest.raises(UserError, match=rf"no item came out \(1 left out, the first: .*{name}:1.*: {why}"):
        built(path)


@pytest.mark.parametrize("name", ["markers-answer-end.jsonl", "markers-answer-pad.jsonl"])
def test_marks_in_questions_stay_text(tmp_path, processor, name) -> None:
    path = case(tmp_path, name)
    (item,), report = built(path)
    assert not report.left_out and check(tmp_path / "out.json").ok
    row = processor.encode_item(item.to_dict(), image_root=tmp_path)
    said = processor.tokenizer.decode([i for i in row["labels"] if i >= 0])
    assert json.loads(path.read_text())["answer"] in said


def test_a_lone_surrogate_is_left_out_and_the_rest_is_built(tmp_path) -> None:
    items, report = built(case(tmp_path, "surrogate.jsonl"))
    assert len(items) == 1 and report.left_out == [
        f"{tmp_path}/surrogate.jsonl:1: '\\ud83d' is half a character (a lone surrogate)"
    ]


def test_a_system_prompt_beside_the_conversation_is_kept(tmp_path) -> None:
    (item,) = read(case(tmp_path, "toplevel-system.json"))
    assert (item.messages[0].role, item.messages[0].content) == ("system", "Be brief.")
    assert len(item.messages) == 3 and item.images["images"] == ("a.jpg",)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fractions.jsonl", '--units "0-1" .* smaller than a pixel'),
        ("fractions2.jsonl", '--units "0-1" .* smaller than a pixel'),
        ("xywh-flat.jsonl", '--units "pixels xywh" .* run backwards'),
    ],
)
def test_boxes_in_other_units_are_refused_with_a_guess(tmp_path, name, why) -> None:
    with pytest.raises(UserError, match=rf"{name}: boxes look like {why} .*{name}:1: "):
        built(case(tmp_path, name))


def test_an_answer_of_squad_is_its_text(tmp_path) -> None:
    (question,) = read(case(tmp_path, "squad-answer.jsonl"))
    assert question.answers == ("a",)


def test_questions_of_a_table_in_csv_are_read(tmp_path) -> None:
    path = case(tmp_path, "boxes.csv")
    (question,) = read(path)
    assert (question.text, question.answer, question.boxes) == ("What is this?", "a", ((1, 1, 20, 20),))
    (item,), _ = built(path)
    assert item.images["images"][0] == "i0.png" and len(item.images["images"]) == 2
    source = open_items(data(path=relative(path)), 1)
    assert source.item(*source.record(0)).messages == item.messages
    path.write_text(path.read_text() + "i0.png,What?,b,1,1,x,20\n")
    with pytest.raises(UserError, match=r"boxes.csv:3: could not convert"):
        list(read(path))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_file_names_of_another_unicode_form_are_found(tmp_path, processor, form) -> None:
    other = "NFD" if form == "NFC" else "NFC"
    path = spoiled(tmp_path, shown(normalize(form, "Caf\u00e9.png")))
    picture(9).save(tmp_path / normalize(other, "Caf\u00e9.png"))
    assert check(path).ok and not any(isinstance(row, SkippedSample) for row in encoded(path, processor))


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_a_run_goes_past_every_kind_of_broken_record(tmp_path, monkeypatch, streaming) -> None:
    """All of the above in one file of 30 items, in a run that allows them: each is named, the others are taught."""
    monkeypatch.chdir(tmp_path)
    items = []
    for number, spoil in enumerate([*LEFT_OUT.values(), *[lambda item: None] * 8]):
        path = spoiled(tmp_path, spoil)
        items.append(json.loads(path.read_text())[2] | {"number": number})
    path.write_text(json.dumps(items))
    stage = {"name": "tune", "objective": "instruct", "samples": len(items), "batch": 1}
    plan = {"path": "items.json", "streaming": streaming, "buffer": 4, "max_broken": 0.99}
    run(Recipe.model_validate({"name": "own", "model": {"size": SIZE}, "data": plan, "stages": [stage]}), out="run")
    named = [json.loads(line) for line in Path("run/stages/00-tune/left_out.jsonl").read_text().splitlines()]
    assert {one["where"] for one in named} == {f"items.json:1, entry {n + 1}" for n in range(len(LEFT_OUT))}
    assert {one["reason"] for one in named} == {"broken"} and (tmp_path / "run/final").is_dir()
