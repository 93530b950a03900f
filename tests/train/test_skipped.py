"""Skipped samples are counted and named; a run that cannot start leaves no files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.item_sets import LOOKS, data, relative
from support.objectives import loss_of, objective_of
from support.own_items import write_items_of
from support.synthetic import SIZE, TINY
from typer.testing import CliRunner

from relook.cli.app import app
from relook.data import dataset as sampling
from relook.data.collate import EncodedDataset, SkippedSample, pack_up
from relook.data.dataset import SampledItems, open_items
from relook.data.records import records
from relook.errors import RelookError
from relook.model import new as tiny
from relook.train.metrics import SkippedReport
from relook.train.objective import run_batch
from relook.train.recipe import Recipe, Stage
from relook.train.runner import run


@pytest.fixture(scope="module")
def built():
    return tiny.build(TINY, seed=0)


def faulty_set(folder: Path) -> Path:
    """Ten items: the fourth's image is cut short, the sixth is a page too long, the eighth is no JSON."""
    path = write_items_of(folder / "items.json", LOOKS[:2], 10)
    items = json.loads(path.read_text())
    bad = folder / items[3]["images"][0]
    bad.write_bytes(bad.read_bytes()[:200])
    items[5]["messages"][-1]["content"] = "7" * 500
    lines = [json.dumps(item) for item in items]
    lines[7] = lines[7][:40]
    target = folder / "items.jsonl"
    target.write_text("\n".join(lines) + "\n")
    return target


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_broken_and_long_items_are_left_out_named_and_never_cut(tmp_path, built, streaming) -> None:
    plan = data(path=relative(faulty_set(tmp_path)), streaming=streaming, buffer=1)
    source = open_items(plan, 1)
    dataset = EncodedDataset(source, built[1], max_length=400)
    examples = [dataset[i] for i in range(9)]  # a line that is no JSON has no number
    left = [one for one in examples if isinstance(one, SkippedSample)]
    names = {(one.reason, Path(one.where).name) for one in left}
    assert names == {("broken", "items.jsonl:4"), ("too long", "items.jsonl:6")}
    assert [Path(one.where).name for one in source.unreadable] == ["items.jsonl:8"]
    whole = [one for one in examples if not isinstance(one, SkippedSample)]
    for row in whole:  # as many pads as the pictures make: nothing was cut
        pads = row["input_ids"].count(built[0].config.image_token_id)
        assert pads == int(row["image_grid_thw"].prod(-1).sum()) // 4


def test_a_batch_of_what_is_left_learns_as_without_the_rest_and_an_empty_one_learns_nothing(tmp_path, built) -> None:
    source = SampledItems(data(path=relative(faulty_set(tmp_path)), max_broken=1), 1)
    stage = Stage(name="s", objective="instruct", samples=8, batch=3, options={"max_length": 400})
    learner, model = objective_of(built, stage, None, 1, source), built[0]
    examples = [learner.example(i) for i in range(9)]
    good = [one for one in examples if not isinstance(one, SkippedSample)]
    bad = [one for one in examples if isinstance(one, SkippedSample)]
    batch, report = learner.collate([good[0], bad[0], good[1]]), SkippedReport(1.0)
    assert torch.equal(run_batch(learner, model, batch)[0], loss_of(learner, model, good[:2]))
    report.add(batch["info"]["taught"], batch["info"]["left_out"])
    report.settle()
    assert report.taught == 2 and sum(report.left_out.values()) == 1
    empty = loss_of(learner, model, bad)
    model.zero_grad()
    empty.backward()
    assert empty == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_more_than_a_set_share_of_broken_examples_stops_the_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(sampling, "EARLY", 20)
    broken = pack_up([SkippedSample(0, "broken", "items.json:4", "cats.jpg: the file is empty")])
    long = pack_up([SkippedSample(0, "too long", "items.json:5", "3000 tokens, over the cutoff of 2048")])
    books = SkippedReport(most_broken=0.1)
    books.open(tmp_path / "left_out.jsonl", 0)
    for _ in range(4):
        books.add(3, long)  # too long is nobody's fault
    books.add(3, broken)
    books.add(3, broken)
    books.settle()
    books.add(0, broken)
    with pytest.raises(RelookError, match=r"3 of 25 .*max_broken allows \(0.1\); the first: items.json:4: cats.jpg"):
        books.settle()
    assert len((tmp_path / "left_out.jsonl").read_text().splitlines()) == 7
    with pytest.raises(RelookError, match=r"1 of 1 examples could not be read"):
        report = SkippedReport(most_broken=0.9)
        report.add(0, broken)
        report.settle(last=True)


def test_a_run_with_a_broken_image_names_it_and_one_with_too_many_stops(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    faulty_set(tmp_path)
    monkeypatch.setattr(sampling, "EARLY", 4)
    stage = {"name": "tune", "objective": "instruct", "samples": 18, "batch": 3, "options": {"max_length": 400}}
    base = {"name": "own", "model": {"size": SIZE}, "stages": [stage]}
    run(Recipe.model_validate(base | {"data": {"path": "items.jsonl", "max_broken": 0.5}}), out="loose")
    named = [json.loads(line) for line in Path("loose/stages/00-tune/left_out.jsonl").read_text().splitlines()]
    assert sorted((one["reason"], one["where"]) for one in named) == [
        ("broken", "items.jsonl:4"), ("broken", "items.jsonl:4"),
        ("too long", "items.jsonl:6"), ("too long", "items.jsonl:6"), ("unread", "items.jsonl:8"),
    ]  # fmt: skip
    with pytest.raises(RelookError, match=r"1 of 10 records could not be read.*first: items.jsonl:8: "):
        run(Recipe.model_validate(base | {"data": {"path": "items.jsonl"}}), out="refused")
    strict: dict = {"path": "items.jsonl", "streaming": True, "buffer": 1}
    told = capsys.readouterr().err
    assert "4 of 18 examples were left out (2 broken, 2 too long); 1 record could not be read; named in" in told
    (tmp_path / "items.jsonl").write_text(
        "".join(line for n, line in enumerate((tmp_path / "items.jsonl").open(), 1) if n != 8)
    )
    with pytest.raises(RelookError, match=r"of .* examples could not be read"):
        run(Recipe.model_validate(base | {"data": strict, "save_every": 1}), out="strict")
    # allowed more, the same command goes on from the checkpoint
    run(Recipe.model_validate(base | {"data": strict | {"max_broken": 0.5}, "save_every": 1}), out="strict")
    assert "tune: goes on from step" in capsys.readouterr().err


def test_a_run_whose_data_is_refused_trains_nothing_and_leaves_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = write_items_of(tmp_path / "items.json", LOOKS[:1], 4).name
    gone = "nothing.json"
    for shared, first, second in ((there, None, gone), (gone, None, there), (gone, there, None)):
        raw: dict = {"name": "refused", "model": {"size": SIZE}, "data": {"path": shared}, "workers": 0}
        raw["stages"] = [
            {"name": name, "objective": "instruct", "samples": 2, "batch": 2} | ({"data": {"path": own}} if own else {})
            for name, own in (("one", first), ("two", second))
        ]
        (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
        done = CliRunner().invoke(app, ["train", "recipe.yaml"])
        assert done.exit_code == 2 and "nothing.json: no such file or folder" in done.output
        assert not (tmp_path / "runs").exists()


def test_unreadable_records_have_their_place_in_a_file(tmp_path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"messages": []}\nnot json\n{"messages": []}\n{"messages": [')
    kinds = [type(row).__name__ for row in records(path)]
    assert kinds == ["Record", "Unreadable", "Record", "Unreadable"]
