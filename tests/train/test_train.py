"""Training: reproducible and resumable runs, and only trainable parameters change."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from support.objectives import objective_of
from support.synthetic import OBJECTIVE, SIZE, SOURCE, TINY, Pages

import relook.train
from relook.errors import UserError
from relook.model import new as tiny
from relook.model.loading import load_model
from relook.model.writing import merge
from relook.train.optim import schedule
from relook.train.recipe import Recipe, Stage
from relook.train.runner import run


def recipe(stages: list[dict], **changes) -> Recipe:
    base = {"name": "r", "model": {"size": SIZE}, "data": {"world": SOURCE}, "stages": stages}
    return Recipe.model_validate(base | changes)


def test_unknown_objective_and_option() -> None:
    built = tiny.build(TINY, seed=0)
    with pytest.raises(UserError, match="did you mean 'instruct'"):
        objective_of(built, Stage(name="s", objective="instrukt", samples=8), Pages(5))
    with pytest.raises(UserError, match="'looks'"):
        objective_of(built, Stage(name="s", objective=OBJECTIVE, samples=8, options={"lookz": {}}), Pages(5))


def test_a_run_resumes_and_repeats(tmp_path: Path) -> None:
    stages = [
        {"name": "a", "objective": OBJECTIVE, "samples": 4, "batch": 2, "options": {"place": 1.0}},
        {"name": "b", "objective": OBJECTIVE, "samples": 4, "batch": 2, "freeze": ["visual"]},
    ]
    whole = run(recipe(stages), out=tmp_path / "whole")
    run(recipe(stages[:1]), out=tmp_path / "parts")
    first = tmp_path / "parts" / "stages" / "00-a" / "model.safetensors"
    before = first.stat().st_mtime_ns
    resumed = run(recipe(stages), out=tmp_path / "parts")
    assert first.stat().st_mtime_ns == before  # the finished stage was not run again
    from safetensors.torch import load_file

    ours, theirs = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours) and ours.keys() == theirs.keys()
    assert next(iter(ours.values())).dtype == torch.float16
    config = json.loads((whole / "config.json").read_text())
    assert [s["stage"] for s in config["provenance"]["stages"]] == ["a", "b"]
    assert str(tmp_path) not in (whole / "config.json").read_text()
    logged = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in logged] == ["a", "a", "b", "b"]  # every step of a short stage


def test_frozen_parts_do_not_move(tmp_path: Path) -> None:
    before = tiny.build(TINY, seed=1)[0].state_dict()
    stage = {"name": "x", "objective": OBJECTIVE, "samples": 4, "batch": 2, "warmup": 0}
    plan = recipe([stage | {"freeze": ["visual", "layers.0"]}], save_dtype="float32")
    after = load_model(run(plan, out=tmp_path), dtype=torch.float32, device="cpu").state_dict()
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert moved and not [k for k in moved if ".visual." in k or ".layers.0." in k]


def test_plain_instruction_tuning_on_a_file_of_items(tmp_path: Path, monkeypatch) -> None:
    """A recipe with one stage and data.source=json: published items, weights to start from, a freeze list."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny.build(TINY, seed=0, domain="receipts", provenance={"recipe": "before", "samples": 7})
    model.save_pretrained("start")
    processor.save_pretrained("start")
    page = Pages(1).sample(0)
    page.image.save("page.png")
    call = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"
    turns = [("user", "<image>\nWhat?"), ("assistant", call), ("user", "<image>"), ("assistant", "42")]
    item = {
        "messages": [{"role": r, "content": c} for r, c in turns],
        "images": ["page.png", "page.png_64,128,256,320"],
        "clip_images": [],
        "detection_images": [],
        "seg_images": [],
    }
    Path("items.json").write_text(json.dumps([item, item]))
    plan = {
        "name": "own",
        "model": {"start": "start"},
        "data": {"source": "json", "path": "items.json"},
        "stages": [{"name": "tune", "objective": "instruct", "samples": 4, "batch": 2, "lora": {"r": 2}}],
    }
    Path("own.yaml").write_text(yaml.safe_dump(plan))
    final = relook.train.run("own.yaml", ["out=tuned"])
    assert final == Path("tuned/final") and (final / "model.safetensors").is_file()
    told = json.loads((final / "config.json").read_text())["provenance"]
    assert told["samples"] == 4 and told["start"] == {"from": "start", "recipe": "before", "samples": 7}
    assert [stage["looks"] for stage in told["stages"]] == [["region"]]
    merge("tuned/stages/00-tune/adapter", "merged")
    for place in (final, "merged"):  # what it was for is not what it has learnt since
        assert relook.load(place).warnings == []


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    plan = recipe([{"name": "x", "objective": OBJECTIVE, "samples": 2, "freeze": ["vision_tower"]}])
    with pytest.raises(UserError, match="vision_tower"):
        run(plan, out=tmp_path)


def test_schedules() -> None:
    stage = Stage(name="s", objective=OBJECTIVE, samples=1, warmup=0)
    tail = schedule(stage, 100)
    assert [tail(s) for s in (0, 50, 75, 100)] == [1, 1, 1, 0]
    assert tail(90) == pytest.approx(0.4)
    cosine = schedule(stage.model_copy(update={"schedule": "cosine"}), 100)
    assert cosine(50) == pytest.approx(0.5)
    warm = schedule(stage.model_copy(update={"warmup": 0.1}), 100)
    assert 0 < warm(0) < warm(5) < warm(10) == 1


def test_a_run_of_an_older_version_is_neither_continued_nor_replaced(tmp_path: Path) -> None:
    """Its finished stages hold weights alone."""
    (tmp_path / "stages" / "00-a").mkdir(parents=True)
    (tmp_path / "stages" / "00-a" / "weights.safetensors").touch()
    with pytest.raises(UserError, match="older version of relook"):
        run(recipe([{"name": "a", "objective": OBJECTIVE, "samples": 1}]), out=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["stages", ".lock", "00-a", "weights.safetensors"]
