"""`relook train --dry-run`: its data, parameters, tokens, steps and memory are correct, and it writes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support import ROOT
from support.hub_totals import HUB_TOTALS
from support.own_items import conversation, write_items_of
from support.start_folders import parts, start
from typer.testing import CliRunner

from relook.cli.app import app
from relook.data.collate import Collator
from relook.model.loading import load_model, load_processor
from relook.train.dry_run import dry_run, standing_memory
from relook.train.instruct import Conversations
from relook.train.optim import by_part, set_trainable
from relook.train.recipe import Stage

RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("starts")
    found = parts(folder)
    return found | {"with clip": start(folder / "clip", found, ("region", "clip"))}


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items_of(tmp_path / "items.json", ["clip", "region"], count=7)


def small(items: Path, *more: str) -> list[str]:
    return [f"data.path={items}", "validation.items=2", "threads=1", *more]


def invoke(name: str, *given: str):
    return CliRunner().invoke(app, ["train", str(RECIPES / f"{name}.yaml"), *given, "--dry-run"])


def test_what_it_says_is_so(made, items, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = small(items, f"model.start={made['with clip']}", "stages.tune.batch=2", "stages.tune.accumulate=1")
    found = dry_run(RECIPES / "own-data.yaml", given)
    assert sorted(tmp_path.rglob("*")) == before
    (stage,) = found.stages
    model, processor = load_model(made["with clip"], device="cpu"), load_processor(made["with clip"])
    set_trainable(model, ["visual"])
    assert stage.learns == by_part(model)
    assert sum(n for n, _ in stage.learns.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert stage.steps == 3 * (7 - 2) // 2
    assert stage.items is not None and (stage.items.items, stage.items.images) == (7, 7)
    lengths = [
        len(processor.encode_item(item, image_root=tmp_path)["input_ids"]) for item in json.loads(items.read_text())
    ]
    assert stage.lengths is not None and stage.lengths.mean == pytest.approx(sum(lengths) / 7)
    assert (stage.lengths.p99, stage.lengths.cutoff, stage.lengths.cut) == (max(lengths), 2048, 0)
    assert stage.seconds_a_step is not None and stage.seconds_a_step > 0
    text = str(found)
    assert "every image is there, every token is known" in text and "s a step" in text


def test_the_share_over_the_cutoff(made, items) -> None:
    given = small(items, f"model.start={made['with clip']}", "stages.tune.batch=2", "stages.tune.accumulate=1")
    lengths = sorted(dry_run(RECIPES / "own-data.yaml", given).stages[0].items.lengths)
    assert lengths[0] < lengths[-1]
    found = dry_run(RECIPES / "own-data.yaml", [*given, f"stages.tune.options={{max_length: {lengths[0]}}}"])
    assert found.stages[0].lengths.cut == pytest.approx(sum(n > lengths[0] for n in lengths) / 7)
    assert f"over the cutoff of {lengths[0]}" in str(found)


@pytest.mark.parametrize(
    ("mend", "words"),
    [
        (lambda item: item["images"].__setitem__(0, "gone.png"), ["missing image", "gone.png"]),
        (
            lambda item: item["clip_images"].append(item["images"][0]),
            ["placeholder-count", "1 placeholders for 2 clip_images"],
        ),
        (
            lambda item: item["messages"][1].__setitem__("content", "<|region_token_start|><|x_9|>"),
            ["malformed-call", "<|x_9|>"],
        ),
        (
            lambda item: (
                item["messages"][0].__setitem__("content", "<image>\n<seg_image>")
                or item["seg_images"].append(item["images"][0])
            ),
            ["foreign-look", "a seg look, which the model lacks; it has region, clip"],
        ),
        (lambda item: item.pop("messages"), ["not an item"]),
    ],
)
def test_what_is_wrong_with_the_data_is_told(made, items, mend, words) -> None:
    held = json.loads(items.read_text())
    mend(held[4])
    items.write_text(json.dumps(held))
    result = invoke("own-data", *small(items, f"model.start={made['with clip']}"))
    assert result.exit_code == 2, result.output
    assert all(word in result.stdout for word in words), result.stdout
    assert "the data will not do" in result.stderr and "not measured" in result.stdout


def test_published_starts_are_known_without_weights(items, monkeypatch) -> None:
    """No hub here: the shapes are those of the published models, and it says what it could not do."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("relook.model.start.resolve", _no_hub)
    lora = dry_run(RECIPES / "7b-clip-lora.yaml", small(items, f"data.image_root={items.parent}")).stages[0]
    width, kv, inner, layers, vocabulary, r = 3584, 512, 18944, 28, 152064, 512
    attention = 2 * (width + width) + 2 * (width + kv)
    assert lora.learns["LoRA"][0] == r * layers * (attention + 3 * (width + inner))
    assert lora.learns["embed_tokens"][0] == lora.learns["lm_head"][0] == width * vocabulary
    assert lora.learns["visual"][0] == lora.learns["language_model"][0] == 0
    assert lora.memory.keys() == {"weights", "gradients", "optimiser"} and "weights are not here" in lora.unmeasured
    align = dry_run(RECIPES / "det-alignment.yaml", small(items)).stages[0]
    learning = {part: n for part, (n, _) in align.learns.items() if n}
    assert list(learning) == ["detection_projector"]
    total = sum(n for _, n in align.learns.values()) + 1536 * 151936  # a tied head, stored apart
    assert total / 1e9 == pytest.approx(2.75, abs=0.005)  # as published: spec.md, section 7


OF_BASES = ("qwen2.5-vl-3b", "qwen2.5-vl-7b-lora", "qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b-lora")


@pytest.mark.parametrize("name", OF_BASES)
def test_recipes_of_each_base_are_known_at_full_size(tmp_path, monkeypatch, name) -> None:
    """Every weight of the base is there, as many as the hub states, and what a device is to hold follows."""
    monkeypatch.setattr("relook.model.start.resolve", _no_hub)
    own = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    items = write_items_of(tmp_path / "items.json", own["model"]["looks"], count=7)
    given = small(items, f"data.image_root={tmp_path}")
    for stage in own["stages"]:
        data = f"stages.{stage['name']}.data"
        given += [f"{data}.path={items}", f"{data}.image_root={tmp_path}"] if "data" in stage else []
    found = dry_run(RECIPES / f"{name}.yaml", given)
    total = HUB_TOTALS[own["model"]["start"]]
    for stage, dry in zip(own["stages"], found.stages, strict=True):
        more = ("LoRA", "clip_projector", "detection_projector", "detection_model")
        copies = sum(dry.learns[part][0] for part in ("embed_tokens", "lm_head")) if "LoRA" in dry.learns else 0
        assert sum(n for part, (_, n) in dry.learns.items() if part not in more) - copies == total
        assert dry.learns["visual"][0] == 0 and "weights are not here" in dry.unmeasured
        learns = sum(n for n, _ in dry.learns.values())
        assert dry.memory["gradients"] == 4 * learns and dry.memory["optimiser"] == 8 * learns
        assert dry.memory["weights"] == 4 * sum(n for _, n in dry.learns.values())
        assert dry.steps == stage.get("steps", dry.steps) and dry.steps > 0
    assert ("LoRA" in dry.learns) == name.endswith("lora")


def _no_hub(name):
    from relook.errors import UserError

    raise UserError(f"{name}: no hub")


def test_activations_are_those_of_a_batch_that_was_run(made, tmp_path) -> None:
    """Twice the batch keeps about twice as much, and layers that run again keep less."""
    items = write_items_of(tmp_path / "alike.json", ["clip"], count=7)
    given = small(items, f"model.start={made['with clip']}", "stages.tune.accumulate=1")
    kept = {
        (size, again): dry_run(
            RECIPES / "own-data.yaml", [*given, f"stages.tune.batch={size}", f"stages.tune.checkpointing={again}"]
        ).stages[0].memory["activations"]
        for size, again in ((1, "false"), (2, "false"), (2, "true"))
    }  # fmt: skip
    assert 1.6 < kept[2, "false"] / kept[1, "false"] < 2.4
    assert 0 < kept[2, "true"] < 0.7 * kept[2, "false"]


def test_standing_memory_is_what_training_holds(made) -> None:
    """Weights, gradients and AdamW's states after a real step."""
    model = load_model(made["with clip"], device="cpu")
    set_trainable(model, train=["clip_projector", "lm_head"])
    stage = Stage(name="s", objective="instruct", samples=2, weight_decay=0.0)
    said = standing_memory(model, stage)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = Collator(load_processor(made["with clip"]))([conversation(["clip"])])
    model(**batch).loss.backward()
    optimiser.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    assert said["weights"] == size(model.parameters())
    assert said["gradients"] == size(p.grad for p in model.parameters() if p.grad is not None)
    states = size(t for state in optimiser.state.values() for t in state.values() if t.ndim)
    assert said["optimiser"] == states


def test_what_is_known_is_said_before_anything_is_run(made, items, monkeypatch) -> None:
    """Parameters and steps, then items, then cost: each part as soon as it is known, and in all the whole report."""
    said: list[str] = []
    monkeypatch.setattr("relook.train.dry_run._measure", lambda *_: said.append("(a batch runs)"))
    monkeypatch.setattr("relook.train.dry_run.item_length", lambda *_: said.append("(an item is counted)") or 9)
    given = small(items, f"model.start={made['with clip']}")
    found = dry_run(RECIPES / "own-data.yaml", given, say=said.append)
    order = [text.strip().partition("\n")[0].partition(":")[0].partition(" ")[0] for text in said]
    assert order == ["own-data", "stage", *["(an"] * 7, "items", "(a", "memory"]
    assert "\n".join(text for text in said if not text.startswith("(")) == str(found)


def test_one_small_batch_is_run_and_scaled(made, items, monkeypatch) -> None:
    sizes: list[int] = []
    collate = Conversations.collate
    monkeypatch.setattr(Conversations, "collate", lambda self, rows: sizes.append(len(rows)) or collate(self, rows))
    given = small(items, f"model.start={made['with clip']}", "stages.tune.batch=64", "stages.tune.accumulate=100")
    (stage,) = dry_run(RECIPES / "own-data.yaml", given).stages
    assert sizes == [1, 4] and stage.measured == 4  # the first warms up
    assert stage.seconds_a_step is not None and "(from a batch of 4)" in "\n".join(stage.cost())


def test_ctrl_c_says_a_word(made, items) -> None:
    code = "import sys, signal, relook.train.dry_run as d\nfrom relook.cli.app import main\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit "ignored"
    code += "d._measure = lambda *_: signal.raise_signal(signal.SIGINT)\nmain()"
    words = ["train", str(RECIPES / "own-data.yaml"), *small(items, f"model.start={made['with clip']}"), "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "relook: interrupted" in done.stderr and "items    7" in done.stdout


def test_it_says_which_features_are_kept(made, items) -> None:
    given = small(items, f"model.start={made['with clip']}", "stages.tune.batch=2", "stages.tune.accumulate=1")
    found = dry_run(RECIPES / "own-data.yaml", given)
    assert "features of 10 views kept, each encoded once, not 2.8 times" in str(found)  # 7 images, 3 crops
    assert "features" not in str(dry_run(RECIPES / "own-data.yaml", [*given, "stages.tune.epochs=1"]))
