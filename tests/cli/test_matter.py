"""`relook matter`: a model that needs its look is acquitted, one that ignores it is found out."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
from PIL import Image
from support.hand_made_records import call
from support.openai_server import Said, openai_server

import relook
from relook.evaluate import matter, read_folder
from relook.evaluate.effect import OUTCOMES
from relook.evaluate.matter import rows_of

ROWS = ["auto", "none", "oracle", "random", "auto-blank", "other", "blurred", "moved", "image-only", "text-only"]
ASKED = ["cards-tiny", "--tasks", "cards", "--n", "6"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """cards-tiny on six cards, by the command."""
    out = tmp_path_factory.mktemp("matter") / "out"
    shown = call("matter", *ASKED, "--out", out, "--prices", "1", "2", "--pictures", "1")
    return out, shown.stdout


def test_a_model_that_needs_its_look_is_acquitted(asked):
    out, shown = asked
    told = json.loads((out / "matter.json").read_text())
    (effect,) = told["effects"]
    assert effect["verdict"] == "needed" and effect["said"] in shown
    assert {name: effect["outcomes"][name]["mean"] for name in OUTCOMES} == {
        "needed": 1, "idle": 0, "harmful": 0, "useless": 0, "no look": 0}  # fmt: skip
    assert {row["look"] for row in effect["rows"]} == {*ROWS, "clip", "clip-unconditioned"}
    assert {record["look"] for record in read_folder(out).records} == {*ROWS, "clip", "clip-unconditioned"}
    assert "'once' leaves out further looks" in told["not_run"][0] and "not run: 'once'" in shown
    written = ["matter.md", "matter.json", "matter.png", "sizes.png", "report.html", "records.jsonl", "results.json"]
    assert {path.name for path in out.iterdir()} >= set(written)
    assert "Zooming gap" in shown and "money / right" in shown and f"written: {out / 'matter.md'}" in shown


def test_the_same_command_reads_what_is_finished(asked):
    out, _ = asked
    before, records = (out / "matter.json").read_text(), (out / "records.jsonl").stat().st_mtime_ns
    (out / "matter.json").unlink()
    again = call("matter", *ASKED, "--out", out, "--prices", "1", "2", "--json")
    assert (out / "matter.json").read_text() == before and (out / "records.jsonl").stat().st_mtime_ns == records
    assert json.loads(again.stdout)["effects"] == json.loads(before)["effects"]
    other = call("matter", "cards-tiny", "--tasks", "cards", "--n", "2", "--out", out, code=2)
    assert "which differs in n (6, now 2)" in other.stderr and other.stderr.count("\n") == 1


class Unseeing:
    """A processor under which every crop is one grey, whatever lies there: what a model is shown changes no answer."""

    def __init__(self, processor):
        self.view_of_it = processor.view

    def __call__(self, image, stage, look="image"):
        seen = self.view_of_it(image, stage, look)
        return Image.new("RGB", seen.size, (90, 90, 90)) if stage == "crop" else seen


def test_a_model_that_ignores_its_look_is_found_out(tmp_path):
    vlm = copy.copy(relook.load("cards-tiny"))
    vlm.processor = copy.copy(vlm.processor)
    vlm.processor.view = Unseeing(vlm.processor)
    found = matter(vlm, ["cards"], tmp_path / "out", images=None, n=4)
    (effect,) = found.effects
    assert effect.verdict == "ignored" and "not one of 4 answers changed" in effect.said
    for look in ("auto-blank", "other", "blurred"):
        assert effect.row(look).changed.mean == 0 and effect.row(look).accuracy == effect.row("auto").accuracy
    assert effect.outcomes["needed"].mean == 0


def test_a_model_that_answers_as_well_without_is_found_out(tmp_path):
    """Behind an endpoint: it zooms, is shown the region, and says what it would have said at once."""
    questions = [
        {"image": f"{i}.png", "question": f"Is it {i}?", "answer": str(i), "bboxs": [[9, 9, 40, 40]]} for i in range(5)
    ]
    for i in range(5):
        Image.new("RGB", (200, 100), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))

    def zooms(body):
        first = next(message for message in body["messages"] if message["role"] == "user")
        number = next(part["text"] for part in first["content"] if part["type"] == "text")[-2]
        looked = any(message["role"] != "user" for message in body["messages"])
        calls = [("c1", "image_zoom_in_tool", '{"bbox_2d": [0, 0, 500, 500]}')]
        return Said([number]) if looked or body["tool_choice"] == "none" else Said(calls=calls)

    with openai_server(zooms, [{"id": "Qwen3-VL"}]) as server:
        out = tmp_path / "out"
        shown = call(
            "matter", "--base-url", server.url, "--tasks", tmp_path / "q.jsonl", "--out", out, "--pictures", "0"
        )
    (effect,) = json.loads((out / "matter.json").read_text())["effects"]
    assert effect["verdict"] == "ignored" and effect["outcomes"]["idle"]["mean"] == 1
    assert {row["look"] for row in effect["rows"]} == set(ROWS)
    assert next(row for row in effect["rows"] if row["look"] == "auto")["looked"]["mean"] == 1
    assert effect["pays_to"] is None and effect["bins"][0]["low"] == 16 and "of no size" in shown.stdout


def test_rows_of_other_models(tiny_vlm):
    names, left = rows_of(tiny_vlm(("clip",)))
    assert names == ["auto", "none", "clip", "clip-unconditioned"] and all(
        "needs a region look" in each for each in left
    )
    taught = {"stages": [{"looks": ["region"]}]}
    untaught = copy.copy(tiny_vlm(("region", "clip")))
    untaught.model = SimpleNamespace(config=SimpleNamespace(looks=["region", "clip"], provenance=taught))
    names, left = rows_of(untaught)
    assert names == ROWS and "the clip look of tiny is untrained" in left[-1]
    names, left = rows_of(tiny_vlm(("region",), region_of="last", max_looks=2))
    assert names == [*ROWS[:4], "once", *ROWS[4:]] and not left


def test_what_is_wrong_is_one_line(tmp_path):
    assert "no task was named" in call("matter", "cards-tiny", "--out", tmp_path / "a", code=2).stderr
    assert "model" in call("matter", tmp_path / "gone", "--tasks", "cards", "--out", tmp_path / "a", code=2).stderr
    assert not (tmp_path / "a").exists()
