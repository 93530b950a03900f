"""The loss of a step, and of validation, is the mean over its learnt tokens, however it is cut into batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.own_items import conversation, picture
from support.synthetic import SIZE
from torch.nn.functional import cross_entropy

from relook.data.collate import Collator
from relook.data.dataset import SampledItems, open_items
from relook.errors import RelookError, UserError
from relook.io import read_lines
from relook.model.start import open_start
from relook.train.recipe import Recipe
from relook.train.runner import run
from relook.train.trainer import StageTrainer, step_weights

LONG = "word " * 300  # over the cutoff
ANSWERS = ("a cat", "two dogs and a very long answer that goes on and on for a while", "x")


@pytest.fixture
def items(tmp_path: Path, monkeypatch) -> Path:
    """Twelve items with answers of unequal length and different looks."""
    monkeypatch.chdir(tmp_path)
    found = []
    for i in range(12):
        picture(i, (64, 48)).save(f"{i}.png")
        found.append(conversation([["region"], ["clip"], []][i % 3], seed=i, answer=ANSWERS[i % 3], image=f"{i}.png"))
    Path("items.json").write_text(json.dumps(found))
    return Path("items.json")


def recipe(items: Path, stage: dict, **changes) -> Recipe:
    whole = {"name": "tune", "objective": "instruct", "steps": 1, "batch": 4, "clip": 0.0, "warmup": 0.0} | stage
    whole["options"] = {"max_length": 200} | stage.get("options", {})
    raw = {"name": "r", "seed": 3, "model": {"size": SIZE}, "data": {"path": str(items), "max_broken": 0.9}}
    return Recipe.model_validate({**raw, "stages": [whole], "save_every": 0, "log_every": 1, **changes})


@pytest.fixture
def gradients(items, monkeypatch):
    """A function of a stage: the gradients of its first step."""

    def of(**stage) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        norm = StageTrainer._get_grad_norm

        def watched(self, model, grad_norm=None):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            return norm(self, model, grad_norm=grad_norm)

        with monkeypatch.context() as patch:
            patch.setattr(StageTrainer, "_get_grad_norm", watched)
            out = Path("runs") / "-".join(map(str, stage.values()))
            run(recipe(items, stage), out=out)
        return found

    return of


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Length of the difference of two gradients over that of one."""
    zero = torch.zeros(())
    pairs = [(ours.get(name, zero), theirs.get(name, zero)) for name in {**ours, **theirs}]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)) ** 0.5


def test_a_step_is_the_same_however_it_is_cut(items, gradients) -> None:
    whole = gradients(batch=4, accumulate=1)
    for batch, accumulate in ((1, 4), (2, 2)):
        assert apart(gradients(batch=batch, accumulate=accumulate), whole) < 2e-6  # measured: 4e-7
    assert apart(gradients(batch=2, accumulate=2, options={"pack": 400}), whole) < 2e-6  # measured: 4e-7
    assert apart(gradients(batch=1, accumulate=4, average="batches"), whole) > 0.05  # as published


def test_logged_shares_are_over_all_cases_however_a_step_is_cut(items) -> None:
    logged = []
    for batch in (4, 1):
        stage = {"batch": batch, "accumulate": 4 // batch, "lr": 0.02, "steps": 3}
        plan = dict(evaluate_every=3, validation={"items": 4, "questions": 0}, log_every=3)
        run(recipe(items, stage, **plan), out=f"runs/{batch}")
        lines = {name: value for line in read_lines(f"runs/{batch}/log.jsonl") for name, value in line.items()}
        logged.append({name: value for name, value in lines.items() if "items" in name or "token_" in name})
    assert {"items", "items_tokens", "eval_items_tokens", "token_text"} <= logged[0].keys()
    assert logged[0] == pytest.approx(logged[1], abs=1e-3) and max(logged[0].values()) > 0.1


def test_batches_that_are_left_out_count_nothing(items, gradients) -> None:
    found = json.loads(items.read_text())
    for item in found[::2]:
        item["messages"][-1]["content"] = LONG
    items.write_text(json.dumps(found))
    whole = gradients(batch=4, accumulate=1)
    assert apart(gradients(batch=1, accumulate=4), whole) < 2e-6  # measured: 4e-7


def test_the_weights_of_a_step() -> None:
    """Two processes with two batches each; by batches, processes may share a batch."""
    assert step_weights([[1, 3], [0, 0]], 0) == [1.0, 3.0] and step_weights([[1, 3], [0, 0]], 1) == [0.0, 0.0]
    assert step_weights([[1, 3], [2, 0]], 1, parts=1) == [4 / 3, 0.0]
    shared = [step_weights([[1, 3], [3, 1]], number, parts=2) for number in (0, 1)]
    assert shared == [[0.5, 1.5], [1.5, 0.5]]
    assert step_weights([[0, 0]], 0) == [0.0, 0.0] and step_weights([[7]], 0) == [1.0]


def validated(items: Path, batch: int, out: str) -> float:
    stage = {"batch": batch, "lr": 1e-12}
    run(recipe(items, stage, evaluate_every=1, validation={"items": 4, "questions": 0}), out=out)
    (loss,) = [entry["eval_loss"] for entry in read_lines(Path(out) / "log.jsonl") if "eval_loss" in entry]
    return loss


def held_out(items: Path) -> list[int]:
    """Numbers of the items that a run holds out."""
    whole = recipe(items, {})
    split = open_items(whole.data, whole.seed, 4).validation
    return [int(Path(item.images["images"][0]).stem) for item in split]


@pytest.mark.parametrize("long", [0, 1, 3])
def test_validation_is_the_mean_over_its_tokens_without_what_is_left_out(items, long: int, capsys) -> None:
    found, held = json.loads(items.read_text()), held_out(items)
    for number in held[:long]:
        found[number]["messages"][-1]["content"] = LONG
    items.write_text(json.dumps(found))
    losses = [validated(items, batch, f"runs/{batch}") for batch in (1, 2, 4)]
    model, processor = open_start(recipe(items, {}).model, seed=3)
    total, tokens = 0.0, 0
    for number in held[long:]:
        batch = Collator(processor)([processor.encode_item(found[number], image_root=".")])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        total += float(cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels != -100).sum())
    assert losses == pytest.approx([total / tokens] * 3, rel=1e-3)  # logged with four digits
    assert (f"tune: {long} of 4 validation items are left out" in capsys.readouterr().err) == (long > 0)


def test_validation_of_which_nothing_is_left_is_refused_before_training(items) -> None:
    found = json.loads(items.read_text())
    for number in held_out(items):
        found[number]["messages"][-1]["content"] = LONG
    items.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"4 of 4 validation items are left out.*cutoff of 200.*none is left"):
        validated(items, 2, "runs/none")
    assert not read_lines("runs/none/log.jsonl")


def test_one_left_out_example_at_the_start_does_not_end_a_run_and_only_such_do(items, capsys) -> None:
    """With batch 1 the first example is the first step: too long, or its image gone."""
    stage = {"batch": 1, "steps": 3}
    drawn = SampledItems(recipe(items, {}).data, 3)
    first = int(Path(drawn.item(*drawn.record(0)).images["images"][0]).stem)
    whole = json.loads(items.read_text())
    found = json.loads(items.read_text())
    found[first]["messages"][-1]["content"] = LONG
    items.write_text(json.dumps(found))
    run(recipe(items, stage), out="runs/long")
    assert "1 of 3 examples were left out (1 too long)" in capsys.readouterr().err
    items.write_text(json.dumps(whole))
    Path(f"{first}.png").unlink()
    run(recipe(items, stage), out="runs/gone")
    assert "1 of 3 examples were left out (1 broken)" in capsys.readouterr().err
    with pytest.raises(RelookError, match="all 3 examples so far are longer than the cutoff"):
        run(recipe(items, {**stage, "options": {"max_length": 20}}), out="runs/all")
