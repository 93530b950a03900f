"""A run's folder holds one run: another one is refused by name, and what is in it says what it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.own_items import write_items_of
from support.start_folders import parts, start
from typer.testing import CliRunner

import relook
from relook.cli.app import app
from relook.errors import UserError
from relook.io import read_lines
from relook.train.recipe import Recipe
from relook.train.runner import run
from relook.train.trainer import StageTrainer


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    start(folder / "clip", parts(folder), ("region", "clip"))
    return folder / "clip"


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch) -> Path:
    """A folder with a start and items to work in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "start")
    write_items_of(tmp_path / "items.json", ["clip"], count=8)
    return tmp_path


def recipe(*changes: dict[str, Any], **whole: Any) -> Recipe:
    """Stages of four steps, one for each of `changes`."""
    stage = {"objective": "instruct", "steps": 4, "batch": 2}
    stages = [stage | {"name": name} | one for name, one in zip("abc", changes or ({},), strict=False)]
    raw = {"name": "r", "model": {"start": "start"}, "data": {"path": "items.json"}, "save_every": 1, "keep_last": 9}
    return Recipe.model_validate({**raw, "stages": stages, "log_every": 1, "threads": 1, **whole})


def cut(monkeypatch, whole: Recipe, step: int, stage: str = "a") -> None:
    """Run a recipe in `run` and kill it before a step."""
    inner = StageTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.stage.name == stage and self.state.global_step == step:
            raise Killed
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            run(whole, out="run")


def files() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path("run").rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda: recipe({"lr": 5e-4}), r"stages\.a\.lr \(not given, now 0\.0005\)"),
        (lambda: recipe({"steps": 6}), r"stages\.a\.samples \(8, now 12\)"),
        (lambda: recipe({}, seed=4), r"seed \(1, now 4\)"),
        (lambda: recipe({}, validation={"items": 2}), r"validation\.items \(0, now 2\)"),
        (lambda: write_items_of(Path("items.json"), ["clip"], 5) and recipe({}), r"data\.digests\.items\.json"),
        (lambda: rewritten(Path("start/model.safetensors")) and recipe({}), r"model\.digests\.start"),
        (lambda: rewritten(Path("start/processor_config.json"), b" ") and recipe({}), r"model\.digests\.start"),
    ],
)
@pytest.mark.parametrize("finished", [False, True], ids=["cut", "finished"])
def test_another_run_in_the_folder_is_refused_and_nothing_is_lost(place, monkeypatch, edit, words, finished) -> None:
    if finished:
        run(recipe({"steps": 4}), out="run")
    else:
        cut(monkeypatch, recipe({"steps": 4}), 2)
    before = files()
    with pytest.raises(UserError, match=rf"run holds a run that differs: .*{words}.*out=.*--overwrite"):
        run(edit(), out="run")
    assert files() == before


def rewritten(path: Path, more: bytes = b"") -> Path:
    data = path.read_bytes()
    path.write_bytes(data + more if more else data[:-1] + bytes([data[-1] ^ 1]))
    return path


def test_what_is_not_begun_may_change_and_what_is_not_asked_for_is_refused(place) -> None:
    run(recipe({}), out="run")
    first = files()["run/stages/00-a/model.safetensors"]
    run(recipe({}, {"lr": 5e-4}, save_every=0, log_every=2, keep_last=1), out="run")
    assert files()["run/stages/00-a/model.safetensors"] == first
    with pytest.raises(UserError, match="the stage 01-b, which the recipe lacks"):
        run(recipe({}), out="run")
    with pytest.raises(UserError, match=r"stages\.b\.lr \(0\.0005, now not given\)"):
        run(recipe({}, {}), out="run")


def test_overwrite_starts_over(place) -> None:
    Path("recipe.yaml").write_text(json.dumps(recipe({}).model_dump(exclude_defaults=True)))
    assert CliRunner().invoke(app, ["train", "recipe.yaml", "out=run"]).exit_code == 0
    again = ["train", "recipe.yaml", "out=run", "stages.a.steps=2", "stages.a.samples=4"]
    refused = CliRunner().invoke(app, again)
    assert refused.exit_code == 2 and "stages.a" in refused.stderr
    assert CliRunner().invoke(app, [*again, "--overwrite"]).exit_code == 0
    assert [entry["step"] for entry in read_lines("run/log.jsonl")] == [1, 2]


def test_overwrite_removes_no_model_that_is_needed_and_nothing_but_a_run(place) -> None:
    run(recipe({"steps": 2}), out="run")
    before = files()
    for changes in ({"model": {"start": "run/final"}}, {"model": {"start": str(Path("run/stages/00-a").resolve())}}):
        with pytest.raises(UserError, match=r"this recipe needs .*run"):
            run(recipe({"steps": 2}, **changes), out="run", overwrite=True)
    assert files() == before
    with pytest.raises(UserError, match=r"validation\.items"):  # refused when its data are opened
        run(recipe({"steps": 2}, validation={"items": 7}), out="run", overwrite=True)
    assert files() == before and not Path("run/.overwritten").exists()
    mine = Path("thesis/final/thesis.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("all of it")
    with pytest.raises(UserError, match="no run that could be overwritten"):
        run(recipe({"steps": 2}), out="thesis", overwrite=True)
    assert mine.read_text() == "all of it"


def test_a_second_run_in_a_folder_that_is_written_is_refused(place) -> None:
    """The first of two processes trains on; the second ends with one sentence and exit code 2."""
    Path("recipe.yaml").write_text(json.dumps(recipe({"steps": 400}).model_dump(exclude_defaults=True)))
    command = [sys.executable, "-m", "relook", "train", "recipe.yaml", "out=run"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not Path("run/log.jsonl").is_file():
            assert first.poll() is None
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2 and "another run is writing here" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    steps = [entry["step"] for entry in read_lines("run/log.jsonl")]
    assert steps == sorted(set(steps))


def test_checkpoints_say_what_they_are(place, monkeypatch) -> None:
    """In the midst of a stage, the best one, an ended stage, and the end: domain, samples, origin, settings."""
    trained = {"mask": 1, "mask_ratio": 0.5, "position_mode": "sequential", "input_grads": "published"}
    once = recipe(trained, trained, domain="my pages", evaluate_every=4, validation={"items": 2, "questions": 0})
    config = json.loads(Path("start/config.json").read_text())
    Path("start/config.json").write_text(json.dumps(config | {"domain": "others", "provenance": {"recipe": "theirs"}}))
    cut(monkeypatch, once, 2, stage="b")
    said = {
        name: described(f"run/stages/{name}") for name in ("00-a", "01-b/checkpoints/step-2", "00-a/checkpoints/step-4")
    }
    run(once, out="run")
    said["final"] = described("run/final")
    assert {name: one["samples"] for name, one in said.items()} == {
        "00-a": 8, "01-b/checkpoints/step-2": 12, "00-a/checkpoints/step-4": 8, "final": 16
    }  # fmt: skip
    for one in said.values():
        assert one["recipe"] == "r" and one["start"] == {"from": "start", "recipe": "theirs"}
    assert [stage["stage"] for stage in said["final"]["stages"]] == ["a", "b"]
    assert said["01-b/checkpoints/step-2"]["stages"][1]["step"] == 2


def described(folder: str) -> dict[str, Any]:
    """The provenance of a model, whose settings must be those it is asked with."""
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["domain"] == "my pages"
    assert config.get("para_mask_id", 0) == 0 and config.get("para_mask_ratio", 0.0) == 0.0
    assert config.get("position_mode", "mrope") == "mrope" and config.get("input_grads", "full") == "full"
    assert relook.load(folder).model.config.num_inner_forward_run == 2
    return config["provenance"]
