"""What a stage says holds for that stage: every stage is checked before any trains, and its settings end with it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from support.own_items import write_items_of
from support.start_folders import parts, start

from relook.errors import UserError
from relook.model.loading import load_processor, read_config
from relook.train.dry_run import dry_run
from relook.train.recipe import FORWARD, Recipe, Stage
from relook.train.runner import run
from relook.train.trainer import StageTrainer
from relook.train.validation import Validator

# a value of each setting that is not its default
SET = {
    "passes": 1,
    "mask": 1,
    "mask_ratio": 0.5,
    "mask_draw": "sample",
    "input_grads": "published",
    "position_mode": "sequential",
}
DEFAULTS = {name: Stage.model_fields[key].default for key, name in FORWARD.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("starts")
    return start(folder / "clip", parts(folder), ("region", "clip"))


@pytest.fixture
def items(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_items_of(tmp_path / "items.json", ["clip"], count=4).name


def two_stages(model: str, items: str, one: dict | None = None, two: dict | None = None) -> Recipe:
    stage: dict[str, Any] = {"objective": "instruct", "steps": 1, "batch": 2}
    stages = [stage | {"name": "one"} | (one or {}), stage | {"name": "two"} | (two or {})]
    raw = {"name": "r", "model": {"start": model}, "data": {"path": items}, "stages": stages, "save_every": 0}
    return Recipe.model_validate(raw)


def settings(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FORWARD.values()}


@pytest.fixture
def seen(monkeypatch) -> dict[str, Any]:
    """Settings and free choice of the model while each stage trained."""
    found, step = {}, StageTrainer.training_step

    def watched(self, *args, **kwargs):
        trained = self.trained
        found[self.stage.name] = settings(trained.model.config), trained.processor.free_choice
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", watched)
    return found


@pytest.mark.parametrize("key", SET)
def test_a_setting_ends_with_its_stage_and_never_ships(key: str, model: str, items: str, seen) -> None:
    final = run(two_stages(model, items, one={key: SET[key]}), out="run")
    assert seen["one"][0] == DEFAULTS | {FORWARD[key]: SET[key]}
    assert seen["two"][0] == DEFAULTS
    assert settings(read_config(final)) == DEFAULTS and not read_config(final).alignment


def test_free_choice_of_a_stages_data_ends_with_the_stage(model: str, items: str, seen) -> None:
    final = run(two_stages(model, items, one={"data": {"path": items, "free_choice": True}}), out="run")
    assert (seen["one"][1], seen["two"][1]) == (True, False)
    assert not load_processor(final).free_choice


def test_settings_of_an_earlier_training_do_not_train_the_next(model: str, items: str, seen) -> None:
    """A start whose config holds the settings of the run that made it, as runs before this version left them."""
    config = Path(model) / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before) | {"para_mask_id": 1, "para_mask_ratio": 1.0}))
        run(two_stages(model, items), out="run")
    finally:
        config.write_text(before)
    assert seen["one"][0] == seen["two"][0] == DEFAULTS


def test_a_stage_ends_as_a_model_folder(model: str, items: str) -> None:
    import relook

    run(two_stages(model, items), out="run")
    assert relook.load("run/stages/00-one").ask("items-0.png", "What is this?", max_new_tokens=2)


@pytest.mark.parametrize("carry_out", [run, dry_run], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("two", "words"),
    [
        ({"objective": "instructt"}, ["stage two", "did you mean 'instruct'"]),
        ({"options": {"max_lenght": 3}}, ["stage two", "'max_length'"]),
        ({"freeze": ["visula"]}, ["'two'", "did you mean 'visual'"]),
        ({"lora": {"targets": ["q_prj"]}}, ["did you mean 'q_proj'"]),
        ({"lora": {"bits": 4}}, ["relook[qlora]"]),
    ],
    ids=str,
)
def test_a_mistake_in_a_later_stage_is_told_before_any_trains(carry_out, two, words, model, items, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError) as caught:
        carry_out(two_stages(model, items, two=two))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not Path("runs").exists()


def test_what_is_held_out_is_the_same_for_all_stages_and_never_taught(model: str, items: str, monkeypatch) -> None:
    """By image, and as many items as asked for, whatever the seeds of the stages and however they read."""
    held = json.loads(Path(items).read_text())
    Path(items).write_text(json.dumps([*held, *held]))  # each image has two questions
    taught, validated = {}, {}
    step, figures = StageTrainer.training_step, Validator.__call__

    def learning(self, model, inputs, *args):
        taught.setdefault(self.stage.name, set()).update(_images(inputs))
        return step(self, model, inputs, *args)

    def validating(self, *args):
        validated[self.objective.stage.name] = {one for _, batch in self.batches for one in _images(batch)}
        return figures(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", learning)
    monkeypatch.setattr(Validator, "__call__", validating)
    streamed = {"data": {"path": items, "streaming": True, "buffer": 2}}
    whole = two_stages(model, items, one={"steps": 6}, two={"steps": 6, "seed": 9, **streamed})
    changes = {"evaluate_every": 6, "validation": {"items": 2, "questions": 0}}
    run(Recipe.model_validate({**whole.model_dump(exclude_defaults=True), **changes}), out="run")
    assert len(validated["one"]) == 1 and validated["one"] == validated["two"]
    assert all(len(seen) == 3 and not seen & validated["one"] for seen in taught.values())


def _images(batch: dict[str, Any]) -> set[float]:
    """What tells the (alike large) images of a batch apart: their sums."""
    return {
        round(float(part.sum()), 3) for part in batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())
    }
