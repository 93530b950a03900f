"""The paper's tasks and protocol: benchmark files, image lookup, views and sampling."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from support import SHARED
from support.synthetic import PAGES, TINY
from typer.testing import CliRunner

from relook.cli import app
from relook.errors import UserError
from relook.evaluate import BENCHMARKS, PROTOCOLS, TASKS, Places, evaluate, find_task
from relook.evaluate.results import PAPER, beside
from relook.model import new as tiny
from relook.perceive import VLM
from relook.trace import Answer, Usage
from relook.views import View

BENCHMARK = SHARED / "data/viscot_benchmark"
SPEC = SHARED / "spec.md"
SPOKEN = {"CUB": "cub", "OpenImage": "openimages", "Flickr": "flickr30k"}


def record(number: int) -> dict:
    path = f"cot/docvqa/page{number}.png"
    turns = ["<image>\nWhat is it? Please provide the bounding box coordinate of the region that can help you answer "
             "the question better.", "[0.1, 0.4, 0.5, 0.6]", "<image>", f"answer {number}"]  # fmt: skip
    talk = [{"from": "gpt" if i % 2 else "human", "value": turn} for i, turn in enumerate(turns)]
    return {"dataset": "docvqa", "question_id": number, "image": [path, f"{path}###[10, 10, 50, 30]"],
            "conversations": talk}  # fmt: skip


@pytest.fixture
def places(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "pages/deep").mkdir(parents=True)
    (tmp_path / "data/docvqa.json").write_text(json.dumps([record(i) for i in range(3)]))
    for number in range(2):  # the third page is not here
        Image.new("RGB", (100, 50)).save(tmp_path / f"pages/deep/page{number}.png")
    return Places(tmp_path / "data", {"docvqa": tmp_path / "pages"})


class Listener:
    """Remembers what it was asked, and how."""

    name, looks = "listener", ["region"]

    def __init__(self):
        view = View(100)
        self.processor = SimpleNamespace(
            grid_size=8,
            region_margin=0,
            region_of="whole",
            max_looks=1,
            first_look=view,
            second_look=view,
            reencode_look=view,
        )
        self.heard: list = []

    def with_settings(self, **settings):
        other = copy.copy(self)
        other.processor = SimpleNamespace(**vars(self.processor) | settings)
        return other

    def ask_many(self, requests, **options):
        self.heard.append((options, vars(self.processor).copy(), requests))
        return [Answer("answer 1", [], Usage(), question="?") for _ in requests]


def test_questions_of_a_benchmark_with_the_users_images(places):
    model = Listener()
    run = evaluate(model, ["docvqa"], ["none"], places=places)
    result = run.result("docvqa", "none")
    assert (result.answered, result.failed) == (2, 1) and "page2.png" in result.errors[0]
    assert result.measures["exact"].mean == 0.5
    asked = model.heard[0][2]
    assert {r["question"] for r in asked} == {"What is it?"}
    assert [Path(r["image"]).name for r in asked] == ["page0.png", "page1.png"]


@pytest.mark.parametrize(
    ("data", "words"), [(None, "--data"), (Path("nowhere"), r"no DocVQA_region_test\*.json or docvqa.json in nowhere")]
)
def test_a_missing_benchmark_states_its_source(data, words):
    with pytest.raises(UserError, match=words) as error:
        evaluate(Listener(), ["docvqa"], ["none"], places=Places(data))
    assert "Visual-CoT" in str(error.value)


def test_the_papers_protocol(places):
    model = Listener()
    before = vars(model.processor).copy()
    run = evaluate(model, ["docvqa"], ["none"], places=places, protocol="paper-224", seed=7)
    options, seen, _ = model.heard[0]
    assert (options["do_sample"], options["top_p"], options["top_k"], options["temperature"]) == (True, 0.1, 10, 0.95)
    assert options["seed"] == 7
    assert seen["first_look"] == seen["second_look"] == View(224, "nearest") and seen["reencode_look"] is None
    assert seen["region_margin"] == 1 and run.run["n"] == 1000 and run.run["protocol"] == "paper-224"
    assert vars(model.processor) == before


def test_the_default_is_greedy_with_the_checkpoints_own_views(places):
    model = Listener()
    evaluate(model, ["docvqa"], ["none"], places=places)
    options, seen, _ = model.heard[0]
    assert set(options) == {"batch_size", "max_new_tokens"} and seen["first_look"] == View(100)
    assert options["max_new_tokens"] == 64


def test_how_long_an_answer_may_be(places):
    """The task says, the paper's protocol as its generation did, and the user before both."""
    (places.data / "LLaVA_COCO_free_action_test.json").write_text(json.dumps([{
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A dog."}],
        "images": ["cot/docvqa/page0.png"]}]))  # fmt: skip
    lengths = []
    for settings in ({}, {"protocol": "paper"}, {"protocol": "paper", "max_new_tokens": 7}):
        model = Listener()
        evaluate(model, ["llava-free"], ["none"], places=places, **settings)
        lengths.append(model.heard[0][0]["max_new_tokens"])
    assert lengths == [512, 1024, 7]


def test_a_real_model_sees_pages_at_the_size_of_the_protocol():
    vlm = VLM(*tiny.build(TINY, 0))
    before = vars(vlm.processor).copy()
    patches = [
        evaluate(vlm, [PAGES], ["none"], n=1, max_new_tokens=1, protocol=name)
        .result("pages", "none")
        .measures["vision_patches"]
        .mean
        for name in ("default", "paper-224")
    ]
    assert vars(vlm.processor) == before
    assert patches[1] > patches[0]  # 64 pixels, and up to 224


def test_unknown_protocols_raise():
    with pytest.raises(UserError, match="default, paper, paper-224"):
        evaluate(Listener(), [PAGES], ["none"], protocol="papers")


def test_from_the_command_line_with_the_published_table_beside(places):
    images = f"docvqa={places.images['docvqa']}"
    command = ["evaluate", "-m", "cards-tiny", "--tasks", "docvqa", "--looks", "none", "--data", str(places.data)]
    done = CliRunner().invoke(app, [*command, "--images", images, "--n", "2"])
    assert done.exit_code == 0, done.output
    rows = {line.split("  ")[0]: line.split()[-1] for line in done.stdout.splitlines() if line}
    assert rows["2B-VPT (CLIP)"] == "56.7" and rows["7B-VPT (CLIP)"] == "65.8"


def test_without_a_task_the_command_asks_for_one():
    done = CliRunner().invoke(app, ["evaluate", "-m", "cards-tiny"])
    assert done.exit_code == 2 and "no task was named; give --tasks with some of gqa" in done.stderr


def test_judgements_are_listed_with_the_published_ones_and_the_difference():
    own = {("llava-free", "auto"): 80.0, ("llava-single", "auto"): 70.0, ("gqa", "auto"): None, ("gqa", "none"): 50.0}
    table = beside(own)
    assert table.heading[2:] == ("gqa", "llava") and table.lines[0] == ("yours, auto", "", "-", "75.0")
    (row,) = (row for row in table.lines if row[0] == "2B-VPT (CLIP)")
    assert row == ("2B-VPT (CLIP)", "512", "62.1", "79.1 (-4.1)")
    assert beside({("cards", "auto"): 90.0}) is None


@pytest.mark.skipif(not BENCHMARK.is_dir(), reason="the benchmark's files are not here")
@pytest.mark.parametrize("name", [n for n, t in BENCHMARKS.items() if (BENCHMARK / t.questions.files[-1][0]).is_file()])
def test_every_benchmark_opens(name):
    question = next(iter(TASKS[name].items(1, 0, Places(BENCHMARK))))
    assert question.text and question.answer and question.boxes and "###" not in question.image


@pytest.mark.skipif(not SPEC.is_file(), reason="the specification is not here")
def test_the_published_table_is_the_specifications():
    lines = [line.strip().strip("|").split("|") for line in SPEC.read_text().splitlines() if line.startswith("|")]
    start = next(i for i, cells in enumerate(lines) if "GQA" in (c.strip() for c in cells))
    names = [SPOKEN.get(c.strip().rstrip("*"), c.strip().rstrip("*").lower()) for c in lines[start][2:-1]]
    assert names == PAPER["columns"]
    told = {}
    for cells in lines[start + 2 :]:
        if len(cells) == len(lines[start]):
            told[cells[0].strip(), int(cells[1])] = tuple(round(100 * float(c), 1) for c in cells[2:-1])
    assert told == {(row["model"], row["side"]): tuple(row["scores"]) for row in PAPER["rows"]}


def test_a_table_row_for_every_protocol_and_task():
    assert all(name == row.name for name, row in PROTOCOLS.items())
    assert all(find_task(name) is TASKS[name] for name in BENCHMARKS)


def test_a_question_that_cannot_be_asked_is_counted_with_its_place_and_stops_nothing(tmp_path, monkeypatch):
    """A lone surrogate, a picture over Pillow's limit, no picture: failed, the rest is asked (issue 24)."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    for name, size in (("a", (100, 50)), ("bomb", (200, 100))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    texts = (("a", "Half \ud83d?"), ("bomb", "What?"), ("no", "What?"), ("a", "What?"))
    lines = [json.dumps({"image": f"{name}.png", "question": text, "answer": "answer 1"}) for name, text in texts]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    result = evaluate(Listener(), [tmp_path / "own.jsonl"], ["none"], out=tmp_path / "run").result("own", "none")
    assert (result.answered, result.failed) == (1, 3) and result.measures["exact"].mean == 1
    assert "own.jsonl:1: " in result.errors[0] and "half a character" in result.errors[0]
