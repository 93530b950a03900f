"""Recipes: every recipe in the repository loads, and every mistake is reported with the nearest valid key."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from support import ROOT
from transformers import TrainingArguments

from relook.errors import UserError
from relook.train.objective import OBJECTIVES, find_objective
from relook.train.recipe import RENAMED, _notice, cores, load_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = {
    "name": "r",
    "model": {"size": "cards-tiny"},
    "data": {"world": "cards"},
    "stages": [{"name": "first", "objective": "dense", "samples": 16}],
}


def written(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_open_with_their_command(path: Path) -> None:
    recipe = load_recipe(path)
    assert path.read_text().splitlines()[0].startswith(f"# relook train recipes/{path.name}")
    assert all(stage.objective in OBJECTIVES for stage in recipe.stages)
    assert str(Path.home()) not in path.read_text() and "/work/" not in path.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sede": 3}, ["sede", "did you mean 'seed'"]),
        ({"model": {"sise": "cards-tiny"}}, ["model.sise", "'size'"]),
        ({"stages": [{**MINIMAL["stages"][0], "batchsize": 4}]}, ["stages.first.batchsize", "'batch'"]),
        ({"data": {"world": "cards", "image_rot": "x"}}, ["data.image_rot", "'image_root'"]),
        ({"data": {"source": "json", "path": "/somewhere/items.json"}}, ["absolute path", "/somewhere/items.json"]),
        ({"data": {"source": "json"}}, ["exactly one of path"]),
        ({"model": {"size": "cards-tiny", "start": "cards-tiny"}}, ["exactly one"]),
        ({"stages": [{"name": "a", "objective": "dense", "samples": 0}]}, ["stages.a.samples", "seen: 0"]),
        ({"stages": MINIMAL["stages"] * 2}, ["first", "differ"]),
        ({"stages": []}, ["stages"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(written(tmp_path, **changes))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(UserError, match="holds list"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: {")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_overrides_reach_stages_by_name(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path), ["seed=7", "stages.first.lr=2.0e-4", "stages.first.freeze=[visual]"])
    assert recipe.seed == 7
    assert recipe.stages[0].lr == 2e-4
    assert recipe.stages[0].freeze == ["visual"]


@pytest.mark.parametrize(
    "override",
    [
        *("stages.first.lr=-1", "stages.first.lr=.nan", "stages.first.lr=.inf", "stages.first.lr_rest=-1"),
        *("stages.first.lr_scale={projectors: -1}", "stages.first.weight_decay=-1", "stages.first.clip=-1"),
        *("stages.first.betas=[1.5, 0.9]", "stages.first.betas=[0.9, 1.0]", "stages.first.betas=[0.9]"),
        *("seed=-1", "seed=1.5", "stages.first.seed=-3", "stages.first.warmup=1", "stages.first.mask_ratio=1.5"),
        *("stages.first.epochs=-1", "stages.first.average=mean", "name=../../x", "stages.first.name=a/b"),
        *("stages.first.weight_decay=.inf", "stages.first.batch=0", "threads=0", "workers=-1", "max_grad_norm=0"),
        *("stages.first.epochs=.inf", "threads=100000", "workers=100000", f"name={'x' * 300}", 'name="x\\ny"'),
    ],
)
def test_numbers_out_of_bounds_are_one_sentence(tmp_path: Path, override: str) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    key, _, value = override.partition("=")
    where = key.replace("first.name", "a/b.name")  # by the name that it would have
    assert where in str(caught.value) and "seen: " in str(caught.value) and "\n" not in str(caught.value), value


@pytest.mark.parametrize("option", ["max_length: -1", "max_length: 0", "pack: -5", "group: -2", "mx: 3"])
def test_options_out_of_bounds_are_one_sentence(tmp_path: Path, option: str) -> None:
    stage = {"name": "first", "objective": "instruct", "samples": 16, "options": yaml.safe_load(f"{{{option}}}")}
    made = load_recipe(written(tmp_path, data={"path": "items.json"}, stages=[stage])).stages[0]
    with pytest.raises(UserError, match=rf"stage first: options: .*{option.partition(':')[0]}"):
        find_objective(made).check(made, from_items=True)


def test_a_synthetic_dataset_beside_items_is_refused(tmp_path: Path) -> None:
    for key in ("path=own.json", "image_root=own", "streaming=true"):
        with pytest.raises(
            UserError, match=rf"data.world \(cards\) and data.{key.partition('=')[0]} .*exclude each other"
        ):
            load_recipe(written(tmp_path), [f"data.{key}"])
    data = load_recipe(written(tmp_path), ["data.world=null", "data.path=own.json"]).data
    assert (data.source, data.path) == ("json", "own.json")


def test_keys_of_earlier_versions_are_accepted_with_a_notice(tmp_path: Path, capsys) -> None:
    _notice.cache_clear()
    old = {**MINIMAL["stages"][0], "optimiser": "muon"}
    recipe = load_recipe(written(tmp_path, max_grad=3.0, stages=[old]))
    assert (recipe.max_grad_norm, recipe.stages[0].optimizer) == (3.0, "muon")
    said = capsys.readouterr().err
    assert "max_grad is called max_grad_norm" in said and "optimiser is called optimizer" in said
    for name in ("optimiser", "optimizer"):
        recipe = load_recipe(written(tmp_path, stages=[old]), [f"stages.first.{name}=adamw"])
        assert recipe.stages[0].optimizer == "adamw"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key=value"),
        ("sede=1", "'seed'"),
        ("stages.second.lr=1", "no stage called 'second'"),
        ("stages=3", "stages"),
        ("seed.x=1", "does not name a single value"),
        ("seed=[1", "is not YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe(written(tmp_path, seed=1), [override])


def test_auto_is_what_fits_this_machine_and_is_kept_as_a_value(tmp_path: Path, monkeypatch) -> None:
    stage = {**MINIMAL["stages"][0], "precision": "auto"}
    monkeypatch.setattr("relook.train.recipe.cores", lambda: 12)
    assert load_recipe(written(tmp_path, threads="auto")).threads == 12
    made = load_recipe(written(tmp_path, threads="auto", workers="auto", stages=[stage]))
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    assert (made.threads, made.workers) == (12, 3)
    assert made.stages[0].precision == ("bfloat16" if on_gpu else "float32")
    monkeypatch.setattr("relook.train.recipe.cores", lambda: 2)
    assert load_recipe(written(tmp_path, workers="auto")).workers == 0  # one that trains, and none to spare
    with pytest.raises(UserError, match="threads"):
        load_recipe(written(tmp_path, threads="all"))


def test_threads_are_those_that_this_process_may_use(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= cores() <= (os.cpu_count() or 1)


def test_names_of_transformers_are_understood_with_a_notice(tmp_path: Path, capsys) -> None:
    """Each against a real TrainingArguments: these are its names."""
    theirs = {"learning_rate": 2e-5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    theirs |= {"max_steps": 3, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "gradient_checkpointing": True}
    fields = TrainingArguments.__dataclass_fields__
    assert {*RENAMED} - {"optimiser", "max_grad", "warmup_ratio"} <= {*fields}  # the last: until transformers 5
    _notice.cache_clear()
    (stage,) = load_recipe(
        written(tmp_path, logging_steps=7, stages=[{"name": "s", "objective": "instruct", **theirs}])
    ).stages
    assert (stage.lr, stage.batch, stage.accumulate, stage.steps, stage.samples) == (2e-5, 2, 4, 3, 24)
    assert (stage.warmup, stage.schedule, stage.checkpointing) == (0.1, "cosine", True)
    said = capsys.readouterr().err
    assert "per_device_train_batch_size is called batch here (of all devices together)" in said
    made = load_recipe(written(tmp_path), ["stages.first.learning_rate=3.0e-5"])
    assert made.stages[0].lr == 3e-5


def test_a_stages_key_at_the_top_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lr belongs to a stage: stages\.first\.lr=3e-05"):
        load_recipe(written(tmp_path), ["learning_rate=3.0e-5"])
