"""Recipes of the published models: their values, and two steps of each on scaled-down weights."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from support import ROOT
from support.own_items import write_items_of
from support.start_folders import parts, start
from support.tiny_model import conversation as row
from support.tiny_model import of_base, stack, tiny_model
from typer.testing import CliRunner

from relook.cli.app import app
from relook.data import EncodedDataset, open_items
from relook.errors import UserError
from relook.model.loading import load_model, load_processor
from relook.model.start import Start, open_start
from relook.train.optim import build_optimizer, set_trainable
from relook.train.recipe import Data, Stage, load_recipe, set_forward
from relook.train.runner import run

RECIPES = ROOT / "recipes"
# recipe -> its look; spec.md section 9: learning rate, batch x accumulation, steps or most samples; what rests
PUBLISHED = {
    "det-alignment": ("detection", 2e-3, 16, 4, 600_000),
    "seg-alignment": ("seg", 2e-3, 16, 4, 600_000),
    "2b-clip": ("clip", 2e-5, 4, 8, 6000 * 32),
    "2b-det": ("detection", 2e-5, 8, 4, 6000 * 32),
    "2b-seg": ("seg", 2e-5, 4, 8, 6000 * 32),
    "2b-det-noprompt": ("detection", 2e-5, 8, 4, 6000 * 32),
    "7b-clip-lora": ("clip", 2e-5, 4, 8, 6000 * 32),
}
BASES = {  # recipe -> base and look
    "qwen2.5-vl-3b": ("qwen2_5_vl_vpt", "clip"),
    "qwen2.5-vl-7b-lora": ("qwen2_5_vl_vpt", "clip"),
    "qwen3-vl-2b": ("qwen3_vl_vpt", "clip"),
    "qwen3-vl-4b": ("qwen3_vl_vpt", "detection"),
    "qwen3-vl-8b-lora": ("qwen3_vl_vpt", "clip"),
}
LOOKS = {name: row[0] for name, row in PUBLISHED.items()} | {"own-data": "clip"}
LOOKS |= {name: look for name, (_, look) in BASES.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("starts")
    found = parts(folder)
    for look in ("clip", "detection", "seg"):
        found[f"with {look}"] = start(folder / look, found, ("region", look))
    return found


def overrides(name: str, made: dict[str, str], folder: Path) -> list[str]:
    """What makes a shipped recipe small: tiny weights, six items, two steps of each stage."""
    look = LOOKS[name]
    items = write_items_of(folder / "items.json", [look] if "alignment" in name else [look, "region"], count=6)
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    given = [f"model.start={made['start' if recipe['model'].get('looks') else f'with {look}']}"]
    given += [f"model.{part}={made[part]}" for part in ("detection", "seg") if part in recipe["model"]]
    given += [f"data.path={items}", f"data.image_root={folder}", "validation.items=2", "evaluate_every=2"]
    for stage in recipe["stages"]:
        at = f"stages.{stage['name']}"
        given += [f"{at}.steps=2" if "steps" in stage else f"{at}.samples=4", f"{at}.batch=2", f"{at}.accumulate=1"]
        given += [f"{at}.data.path={items}", f"{at}.data.image_root={folder}"] if "data" in stage else []
    small = ["validation.questions=1", "validation.pictures=0", "threads=1", "workers=0", "save_dtype=float32"]
    return [*given, *small, f"out={folder / 'out'}"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_values_are_the_published_ones(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    (stage,) = recipe.stages
    assert (LOOKS[name], stage.lr, stage.batch, stage.accumulate, stage.samples) == PUBLISHED[name]
    assert (stage.schedule, stage.warmup, stage.precision, recipe.save_every) == ("cosine", 0.03, "bfloat16", 500)
    assert stage.options["max_length"] == 2048
    if "alignment" in name:
        assert (stage.passes, stage.mask, stage.epochs) == (1, 0, 1)
    else:
        assert (stage.passes, stage.mask, stage.mask_ratio) == (2, 1, 0.5)
        assert (recipe.data.streaming, recipe.data.buffer, recipe.data.mix) == (True, 16384, "interleave_under")
        assert (recipe.validation.items, recipe.evaluate_every) == (1000, 500)


@pytest.mark.parametrize("name", sorted(LOOKS))
def test_two_steps_of_each_recipe(name: str, made, tmp_path: Path) -> None:
    """From the shipped file with overrides alone; only what the recipe says moves, and the model asks and answers."""
    if name == "own-data":
        given = [*overrides(name, made, tmp_path), "stages.tune.epochs=1"]
    else:
        given = overrides(name, made, tmp_path)
    check_run(name, given, made, tmp_path)


@pytest.mark.parametrize("name", BASES)
def test_two_steps_of_the_recipes_of_each_base(name: str, tmp_path: Path) -> None:
    with of_base(BASES[name][0]):
        made = parts(tmp_path / "starts")
        model = check_run(name, overrides(name, made, tmp_path), made, tmp_path)
    assert model.config.model_type == BASES[name][0]


def check_run(name: str, given: list[str], made: dict[str, str], tmp_path: Path):
    """Run a recipe; returns the model."""
    final = run(RECIPES / f"{name}.yaml", given)
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model, processor = load_model(final, device="cpu"), load_processor(final)
    assert model.config.num_inner_forward_run == recipe.stages[-1].passes
    assert processor.free_choice == recipe.data.free_choice
    source = given[0].removeprefix("model.start=")
    before, after = load_model(source, device="cpu") if not recipe.model.looks else None, model.state_dict()
    if before is None:
        start = Start(start=source, looks=recipe.model.looks, detection=made["detection"], seg=made["seg"])
        before, _ = open_start(start, seed=recipe.seed)
    moved = {key for key, value in before.state_dict().items() if not torch.equal(value, after[key])}
    assert moved == {key for key in moved if expected(name, key)} and moved
    assert ("lm_head.weight" in moved) == ("alignment" not in name)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines) and all(line["step"] <= 2 for line in lines)
    return model


def expected(name: str, key: str) -> bool:
    """Whether the paper's recipe lets this weight learn."""
    if "alignment" in name:
        return key.startswith("projectors.") and "_condition" not in key
    return ".visual." not in key and not key.startswith("encoders.")


def test_free_choice_items_lose_the_sentences(made, tmp_path: Path) -> None:
    """What the model is taught, read back from the ids."""

    path = write_items_of(tmp_path / "items.json", ["region", "clip"], count=4)
    processor = load_processor(made["with clip"])
    for free_choice in (False, True):
        data = Data.model_validate({"path": os.path.relpath(path), "free_choice": free_choice})
        examples = [EncodedDataset(open_items(data, seed=1), processor)[i] for i in range(4)]
        texts = [processor.tokenizer.decode(example["input_ids"]) for example in examples]
        assert all("What is this?" in text for text in texts)
        assert all(("answer the question" in text) != free_choice for text in texts)


def test_epochs_bound_what_is_seen(made, tmp_path: Path) -> None:
    given = [*overrides("det-alignment", made, tmp_path), "stages.align.samples=600000", "validation.items=0"]
    run(RECIPES / "det-alignment.yaml", [*given, "evaluate_every=0"])
    done = json.loads((tmp_path / "out" / "stages" / "00-align" / "done.json").read_text())
    assert done["samples"] == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.instruct.freeze=[visula]", ["visula", "did you mean 'visual'"]),
        ("stages.instruct.freeze=[detection_model]", ["no part 'detection_model'", "clip_projector"]),
        ("stages.instruct.train=[lm_head]", ["freeze:", "not both"]),
        ("stages.instruct.lora={r: 8}", ["leave out freeze"]),
        ("stages.instruct.samples=7", ["steps says", "give one of them"]),
        ("stages.instruct.pases=2", ["unknown key", "'passes'"]),
        ("stages.instruct.mask=3", ["stages.instruct.mask", "seen: 3"]),
        ("model.looks=[region, seg]", ["not 'seg'"]),
    ],
)
def test_mistakes_are_named_before_training(made, tmp_path: Path, override: str, words: list[str]) -> None:
    start = f"model.start={made['with clip']}"
    given = [o for o in overrides("2b-clip", made, tmp_path) if not o.startswith("model.start")]
    with pytest.raises(UserError) as caught:
        run(RECIPES / "2b-clip.yaml", [start, *given, override])
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_plain_start_needs_its_looks_said(made, tmp_path: Path) -> None:
    given = [*overrides("own-data", made, tmp_path), f"model.start={made['start']}"]
    result = CliRunner().invoke(app, ["train", str(RECIPES / "own-data.yaml"), *given])
    assert result.exit_code == 2 and "looks: [region, clip]" in result.stderr


# -- what learns


def learning(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts_by_their_published_names() -> None:
    model = tiny_model()
    unused = ("clip.linear_feature", "clip.layernorm_feature", "seg.linear_feature")  # no forward pass touches them
    everything = {name for name, _ in model.named_parameters() if not any(part in name for part in unused)}
    set_trainable(model)
    assert learning(model) == everything
    set_trainable(model, freeze=["projectors", "detection_model", "seg_model", "visual"])
    assert learning(model) == {name for name in everything if name.startswith("model.language_model.")}
    set_trainable(model, train=["seg_projector"])
    assert learning(model) == {name for name in everything if name.startswith("projectors.seg.")}


def test_tied_weights_go_by_either_name() -> None:
    model = tiny_model()
    set_trainable(model, train=["lm_head"])
    assert learning(model) == {"model.language_model.embed_tokens.weight"}
    set_trainable(model, freeze=["lm_head"])
    assert "model.language_model.embed_tokens.weight" not in learning(model)
    set_trainable(model, train=["lm_head", "clip_projector"])
    stage = Stage(name="s", objective="instruct", samples=2, lr=1.0, lr_scale={"lm_head": 0.25, "projectors": 0.5})
    groups = build_optimizer(model, stage).param_groups
    embedding = model.get_input_embeddings().weight
    assert {g["lr"] for g in groups if any(p is embedding for p in g["params"])} == {0.25}
    assert {g["lr"] for g in groups if not any(p is embedding for p in g["params"])} == {0.5}


def test_published_input_gradients_reach_embeddings_through_a_tied_head_only() -> None:
    batch = stack([row(["clip"])])
    for tied, learns in ((True, True), (False, False)):
        model = tiny_model(tie_word_embeddings=tied)
        set_forward(model.config, Stage(name="s", objective="instruct", samples=2, input_grads="published"))
        model(**batch).loss.backward()
        grad = model.get_input_embeddings().weight.grad
        assert (grad is not None and bool(grad.any())) == learns
        assert all(p.grad is None for p in model.model.visual.parameters())
