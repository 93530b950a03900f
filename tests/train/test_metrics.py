"""Metrics logging: logged numbers are correct, validation items are held out, and logging changes no weight."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.objectives import objective_of
from support.synthetic import OBJECTIVE, SIZE, SOURCE, TINY, Pages

from relook.data.dataset import open_items
from relook.data.items import Question, item_question
from relook.errors import UserError
from relook.io import read_lines
from relook.looks import LOOKS, write_call
from relook.model import new as tiny
from relook.trace import Answer, Look
from relook.train import metrics
from relook.train.checkpoints import Checkpoints, StageModel
from relook.train.instruct import CLASSES, TokenClasses
from relook.train.recipe import Recipe, Stage, Validation
from relook.train.runner import run
from relook.train.validation import ANNOTATED, Validator, picture, region_iou


def plan(**changes) -> Recipe:
    stage = {"name": "talk", "objective": OBJECTIVE, "samples": 2, "batch": 1, "options": {"place": 1.0}}
    base = {"name": "r", "model": {"size": SIZE}, "data": {"world": SOURCE}, "stages": [stage]}
    return Recipe.model_validate(base | {"save_dtype": "float32", "log_every": 1} | changes)


# -- classes of tokens


@pytest.fixture(scope="module")
def tokens() -> dict[str, int]:
    spec = LOOKS["clip"]
    names = [f"<|{axis}_{i}|>" for axis in "xy" for i in range(8)]
    names += [LOOKS["region"].start, LOOKS["region"].end, spec.start, spec.action, spec.end]
    return {name: 100 + i for i, name in enumerate(names)}


def spelt(text: str, tokens: dict[str, int]) -> list[int]:
    return [tokens.get(f"<|{name}|>", 7) for name in text.removeprefix("<|").removesuffix("|>").split("|><|")]


def test_every_token_has_its_class(tokens) -> None:
    region = spelt(write_call("region", (1, 2, 1, 2)), tokens)  # the same columns and rows: told apart by place
    clip = spelt(write_call("clip"), tokens)
    found = TokenClasses(tokens, 8).of(torch.tensor([[-100, *region, 7, *clip, *region]]))[0].tolist()
    call = ["start", "x0", "y0", "x1", "y1", "end"]
    assert found[0] == -1
    assert [CLASSES[i] for i in found[1:]] == [*call, "text", "start", "action", "end", *call]


def test_shares_are_counted_by_class(tokens) -> None:
    labels = torch.tensor([[-100, *spelt(write_call("region", (1, 2, 3, 4)), tokens), 7, 7]])
    right = torch.tensor([[False, True, False, True, True, True, True, True, False]])
    shares = TokenClasses(tokens, 8).shares(right, labels)
    assert {k: v for k, v in shares.items() if v == v} == {
        "token_start": 1, "token_x0": 0, "token_y0": 1, "token_x1": 1, "token_y1": 1, "token_end": 1, "token_text": 0.5
    }  # fmt: skip
    assert np.isnan(shares["token_action"])  # there was none


# -- what is held out


def items_file(folder: Path, count: int) -> Path:
    for i in range(count):
        Image.new("RGB", (80, 80), "white").save(folder / f"{i}.png")
    call = write_call("region", (1, 2, 3, 4))
    turns = [("user", "<image>\nWhat?"), ("assistant", call), ("user", "<image>"), ("assistant", "42")]
    item = {"messages": [{"role": r, "content": c} for r, c in turns]}
    shown = [{"images": [f"{i}.png", f"{i}.png_10,20,40,50"], "number": i} for i in range(count)]
    (folder / "items.json").write_text(json.dumps([item | each for each in shown]))
    return folder / "items.json"


def test_items_are_held_out_of_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    items_file(tmp_path, 10)
    data = plan(data={"source": "json", "path": "items.json"}).data
    taught = open_items(data, 1, 3)
    held = taught.validation
    numbers = [[item.extra["number"] for item in part] for part in (taught, held)]
    assert len(numbers[1]) == 3 and sorted(numbers[0] + numbers[1]) == list(range(10))
    assert [item.extra["number"] for item in open_items(data, 1, 3).validation] == numbers[1]
    with pytest.raises(UserError, match="would hold out most of the 10 items"):
        open_items(data, 1, 10)
    question = item_question(held[0], grid=8)
    assert question is not None and question.text == "What?" and question.answer == "42"
    assert question.boxes == ((10, 20, 40, 50),)
    stage = Stage(name="s", objective="instruct", samples=2)
    learner = objective_of(tiny.build(TINY, 0), stage, None, 1, taught, questions=9)
    assert learner.eval[2]["input_ids"] == learner.processor.encode_item(held[2].to_dict())["input_ids"]
    assert len(list(learner.questions())) == 3


def test_evaluating_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no items of stage 'talk' are held out"):
        plan(data={"source": "json", "path": "items.json"}, evaluate_every=5)


# -- a run that is watched


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    tried = {"examples": 2, "questions": 2, "pictures": 1}
    run(plan(evaluate_every=1, save_every=1, keep_last=1, validation=tried), out=folder)
    return folder


def test_watching_changes_no_weight(watched: Path, tmp_path: Path) -> None:
    run(plan(), out=tmp_path)
    ours, theirs = (folder / "final" / "model.safetensors" for folder in (watched, tmp_path))
    assert ours.read_bytes() == theirs.read_bytes()


def test_all_that_is_logged(watched: Path) -> None:
    entries = read_lines(watched / metrics.LOG)
    assert [(e["step"], "eval_loss" in e) for e in entries] == [(1, False), (1, True), (2, False), (2, True)]
    learnt, tried = entries[:2]
    rates = {"samples_per_s", "tokens_per_s", "memory_mb"}
    assert {"loss", "grad_norm", "learning_rate", "token_x0", "token_y1", "token_text", *rates} <= learnt.keys()
    assert {"eval_token_start", "eval_look_rate", "eval_failed"} <= tried.keys()
    assert 0 <= tried["eval_look_rate"] <= 1 and tried["eval_failed"] == 0
    (board,) = (watched / metrics.BOARD / "00-talk").iterdir()
    written = board.read_bytes()
    assert all(tag in written for tag in (b"train/loss", b"train/token_x0", b"eval/look_rate"))
    stage = watched / "stages" / "00-talk"
    assert {p.name for p in (stage / "pictures").iterdir()} == {"step-1-1.png", "step-2-1.png"}
    with Image.open(watched / metrics.CURVES) as curves:
        assert curves.format == "PNG"
    done = json.loads((stage / "done.json").read_text())
    least = min((e["eval_loss"], e["step"]) for e in entries if "eval_loss" in e)
    assert done["best"]["step"] == least[1] and done["best"]["eval_loss"] == pytest.approx(least[0], rel=1e-3)
    assert [p.name for p in (stage / "checkpoints").iterdir()] == [f"step-{least[1]}"]


def test_trying_out_leaves_no_trace_in_the_objective() -> None:
    stage = plan().stages[0]
    model, processor = tiny.build(TINY, 0)
    learner = objective_of((model, processor), stage, Pages(1), 1, examples=3)
    trained = StageModel(model, processor, outer=learner.wrap(model).train())
    tried = Validator(learner, trained, Validation(examples=3, questions=0), Checkpoints(Path("nowhere"), 1))
    first, again = tried(1, lambda batch: batch), tried(2, lambda batch: batch)
    assert first == again and "eval_loss" in first
    assert trained.module.training and model.training


# -- regions and pictures


def answered(cells) -> tuple[Answer, Question]:
    looks = [Look("region", cells=cells, box=(0, 0, 40, 40))] if cells else []
    page = Image.new("RGB", (80, 80), "white")
    answer = Answer("42", looks=looks, image=page, question="What?", grid=8)
    return answer, Question(page, "What?", ("42",), ((20, 20, 30, 30), (30, 30, 40, 40)))


def test_iou_is_of_what_was_named() -> None:
    answer, question = answered((2, 2, 3, 4))
    assert region_iou(answer, question.boxes, 8) == pytest.approx(400 / 600)
    assert np.isnan(region_iou(answer, (), 8))
    assert np.isnan(region_iou(answered(None)[0], question.boxes, 8))


def test_a_picture_shows_the_annotated_boxes() -> None:
    answer, question = answered(None)
    assert ANNOTATED in set(picture(answer, question).getdata())
    assert answer.image.getpixel((19, 19)) == (255, 255, 255)  # the answer's own image is left alone


# -- the log


def test_a_log_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    log = tmp_path / metrics.LOG
    entries = [{"stage": s, "step": n} for s in ("a", "b") for n in (1, 2, 3)]
    log.write_text("\n".join(json.dumps(e) for e in entries) + '\n{"stage": "b", "st')
    metrics.cut_log(log, "b", 2)
    assert read_lines(log) == entries[:5]
    metrics.cut_log(log, "b", 0)
    assert read_lines(log) == entries[:3]


def test_a_tally_goes_on_from_a_record() -> None:
    tally = metrics.Metrics(4, {"samples": 8, "seconds": 5.0, "loss_sum": 2.0})
    tally.add(0.5, {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    tally.add(0.25, {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])})
    assert tally.record()["samples"] == 16 and tally.record()["loss_sum"] == 2.75 and tally.seconds >= 5
    tally.figures = [{"right": 1.0, "none": float("nan")}, {"right": 0.5}]
    rates = tally.take()
    assert rates["right"] == 0.75 and "none" not in rates and tally.take() == {}
    assert rates["samples_per_s"] / rates["tokens_per_s"] == pytest.approx(8 / (5 + 7))


def test_reporters_are_known_and_installed(monkeypatch) -> None:
    with pytest.raises(UserError, match="wandbb is not supported"):
        metrics.check_reporters(["wandbb"])
    monkeypatch.setattr(metrics, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match="wandb is not installed"):
        metrics.check_reporters(["tensorboard", "wandb"])
