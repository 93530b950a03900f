"""Distributed training: processes learn what one process learns from the same examples, and none of them blocks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, TESTS, distributed_cases, launched_run
from support.distributed_run import recipe
from support.own_items import write_items_of

from relook.data.collate import SkippedSample
from relook.errors import UserError
from relook.model.segments import synchronised_ranks
from relook.train import distributed
from relook.train.metrics import SkippedReport
from relook.train.runner import run

LAUNCH = ROOT / "recipes" / "launch"
PATIENCE = 300  # seconds until processes that wait for each other are given up


def torchrun(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """A script of this folder in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(TESTS / "support" / script), *map(str, arguments)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=PATIENCE)


# -- models in step (default suite)


@pytest.mark.parametrize("kind", [{}, {"masked": 1}, {"checkpointing": True}], ids=str)
@pytest.mark.parametrize("step", range(len(distributed_cases.ROWS)))
def test_stretches_for_others_change_nothing(step: int, kind: dict, monkeypatch) -> None:
    """As if another process held conversations with three looks: the same loss, and the same gradients."""
    found = []
    for synchronised in (False, True):
        model = distributed_cases.model(**kind)
        monkeypatch.setattr("relook.model.modeling.max_over_ranks", lambda depth, device: 3)
        runs, inner = [], model.model.language_model.layers[0].forward
        model.model.language_model.layers[0].forward = lambda *a, inner=inner, runs=runs, **k: (
            runs.append(1),
            inner(*a, **k),
        )[1]
        with synchronised_ranks(synchronised):
            loss = model(**distributed_cases.batch(step, 0), use_cache=False).loss
        forward = len(runs)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, forward))
    (plain, gradients, _), (stepped, others, forward) = found
    assert forward == 4
    torch.testing.assert_close(stepped, plain, atol=1e-6, rtol=0)
    for name, gradient in others.items():
        torch.testing.assert_close(gradient, gradients.get(name, torch.zeros_like(gradient)), atol=1e-6, rtol=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(others)  # all take part


# -- dividing a step (default suite)


@pytest.mark.parametrize(
    ("step", "processes", "share"),
    [((4, 8), 1, (4, 8)), ((4, 8), 8, (4, 1)), ((4, 8), 16, (2, 1)), ((8, 1), 2, (4, 1)), ((6, 4), 12, (2, 1))],
)
def test_a_step_is_divided(step, processes, share) -> None:
    assert distributed.divided(*step, processes) == share
    assert share[0] * share[1] * processes == step[0] * step[1]


def test_a_step_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match=r"4 x 8 examples.*over 3 processes.*accumulate be a multiple of 3"):
        distributed.divided(4, 8, 3)


def test_processes_come_to_one_account(tmp_path: Path, monkeypatch) -> None:
    account, out = SkippedReport(1.0), [SkippedSample(n, "broken", f"items:{n}", "?") for n in range(3)]
    account.open(tmp_path / "left_out.jsonl", 0)
    noted = [(2, [out[2]]), (3, [out[0], out[1]])]
    monkeypatch.setattr(distributed, "gather", lambda own: noted if own == (0, []) else [own])
    account.settle()
    assert [json.loads(line)["example"] for line in account.path.read_text().splitlines()] == [0, 1, 2]
    assert account.say().startswith("3 of 8 examples")


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_what_the_shipped_configurations_say(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = path.read_text()
    config = load_config_from_file(str(path))
    assert config.num_processes in (8, 16) and f"accelerate launch --config_file recipes/launch/{path.name}" in text
    if config.deepspeed_config:
        named = LAUNCH.parent.parent / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(named.read_text())["zero_optimization"]["stage"] == int(path.name[4])


@pytest.mark.parametrize("change", [{"optimizer": "muon"}, {"lora": {"r": 4}}, {"remember": 3}], ids=str)
def test_what_cannot_be_sharded_is_refused(change, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=rf"FSDP does not go with .*{next(iter(change))}"):
        run(recipe(stage=change), out=tmp_path)


# -- two processes


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """Where two processes left losses and gradients of every case."""
    folder = tmp_path_factory.mktemp("scaled")
    cases = [case for case in distributed_cases.CASES if "zero" not in case or find_spec("deepspeed")]
    done = torchrun("distributed_cases.py", folder, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", distributed_cases.CASES)
def test_losses_and_gradients_are_those_of_one_process(case: str, told: Path) -> None:
    """DDP, FSDP (`fully_shard`) and ZeRO over conversations whose looks differ between the processes."""
    if "zero" in case and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install 'relook[deepspeed]'")
    found, kind = torch.load(told / f"{case}.pt"), distributed_cases.CASES[case][1]
    alone = distributed_cases.alone(**{k: v for k, v in kind.items() if k != "settings"})
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for name, gradient in found["gradients"].items():
        expected = alone["gradients"].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert set(found["gradients"]) >= set(alone["gradients"])
    assert set(found["weights"]) == set(alone["weights"])  # whole again, and tied ones are one
    for name, weight in found["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][name], atol=1e-5, rtol=0)


def log(folder: Path, without: tuple[str, ...] = ()) -> list[dict]:
    without += ("seconds", "samples_per_s", "tokens_per_s", "memory_mb")  # of a clock
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in without} for entry in entries]


def same_run(ours: Path, theirs: Path, without: tuple[str, ...] = (), atol: float = 2e-5) -> None:
    """The same log and weights, but for the order in which numbers were added up."""
    assert len(log(ours)) == len(log(theirs))
    for mine, other in zip(log(ours, without), log(theirs, without), strict=True):
        assert mine.pop("stage") == other.pop("stage")
        assert mine == pytest.approx(other, rel=2e-3, abs=1e-6)
    for name in ("final/model.safetensors", "stages/00-talk/model.safetensors"):
        weights, others = load_file(ours / name), load_file(theirs / name)
        assert set(weights) == set(others)
        assert all(torch.allclose(weights[k], others[k], atol=atol) for k in weights), name
    records = [json.loads((f / "stages/00-talk/done.json").read_text()) for f in (ours, theirs)]
    assert records[0]["samples"] == records[1]["samples"]
    made_of = [(f / "stages/00-talk/stage.json").read_text() for f in (ours, theirs)]
    assert made_of[0] == made_of[1]
    assert not list(ours.rglob("*.part"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(recipe(), out=folder)
    return folder


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(straight: Path, tmp_path: Path) -> None:
    done = torchrun("distributed_run.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(tmp_path, straight)
    assert done.stderr.count("talk 24/24") == 2  # one process speaks: of the last step, and of its evaluation
    assert len(list((tmp_path / "stages/00-talk/pictures").iterdir())) == 2


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_one_goes_on(straight: Path, tmp_path: Path) -> None:
    """...saved once; and a single process goes on with it."""
    torchrun("distributed_run.py", tmp_path, "signal")
    words = [(tmp_path / f"process-{n}.txt").read_text() for n in (0, 1)]
    assert words[0].startswith("143 False stopped at step 2 of 3") and words[1].startswith("143 True")
    saved = tmp_path / "stages/00-talk/checkpoints/step-2"
    assert {"model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in saved.iterdir()}
    run(recipe(), out=tmp_path)
    same_run(tmp_path, straight)


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_stops_all(tmp_path: Path) -> None:
    torchrun("distributed_run.py", tmp_path, "nan")
    words = [(tmp_path / f"process-{n}.txt").read_text() for n in (0, 1)]
    assert all("the loss of step 2 is nan" in said and "step-1" in said for said in words)


@pytest.mark.slow
def test_a_full_disk_stops_all(tmp_path: Path) -> None:
    torchrun("distributed_run.py", tmp_path, "disk")
    words = [(tmp_path / f"process-{n}.txt").read_text() for n in (0, 1)]
    assert words[0].startswith("1 False") and words[1].startswith("1 True")
    assert all("checkpoints could not be written" in said and "step-1" in said for said in words)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_a_batch_is_split(tmp_path: Path) -> None:
    """Items with answers of unlike length, and a broken one: the loss is that of the whole batch, the account one."""
    answers = ("a cat", "two dogs and a very long story about them", "no")
    path = write_items_of(tmp_path / "items.json", ["clip", "region"], 12, answers)
    (tmp_path / "items-3.png").write_bytes(b"?")
    items = os.path.relpath(path)
    run(recipe(items, stage={"batch": 8, "accumulate": 1}), out=tmp_path / "one")
    done = torchrun("distributed_run.py", tmp_path / "two", ITEMS=items, SPLIT="1")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[e["loss"] for e in log(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    names = [(tmp_path / name / "stages/00-talk/left_out.jsonl").read_text() for name in ("one", "two")]
    assert names[0] == names[1] and "items-3.png" in names[0]


# -- as launched: the shipped configurations, through accelerate and the Trainer

SHIPPED = ["fsdp2", "zero2", "zero3"]


def launch(
    config: str, folder: Path, items: str, *fault: str, precision: str = "float32"
) -> subprocess.CompletedProcess:
    """`launched_run.py` in two processes, as a configuration in recipes/launch says (but for its precision)."""
    if config != "fsdp2" and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install 'relook[deepspeed]'")
    here = TESTS / "support"
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", LAUNCH / f"{config}.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "bf16" if precision == "bfloat16" else "no"]
    command += [here / "launched_run.py", folder, items, precision, *fault]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    whole = [str(part) for part in command]
    return subprocess.run(whole, env=settings, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> str:
    """A file of items with looks; its path is relative to where configurations are launched."""
    path = write_items_of(tmp_path_factory.mktemp("items") / "items.json", ["clip", "region"], 24, ("a cat", "no"))
    return os.path.relpath(path, ROOT)


def alone(folder: Path, items: str, precision: str = "float32") -> Path:
    """The same run in one process, this."""
    with contextlib.chdir(ROOT):
        run(launched_run.sharded(items, precision), out=folder)
    return folder


@pytest.fixture(scope="module")
def unsharded(items: str, tmp_path_factory) -> Path:
    return alone(tmp_path_factory.mktemp("unsharded"), items)


@pytest.mark.slow
@pytest.mark.parametrize("config", SHIPPED)
def test_a_sharded_run_is_cut_and_goes_on_as_one_process_would(config, items, unsharded, tmp_path) -> None:
    """A signal to one process stops both; one process alone cannot read what they left; both go on with it."""
    launch(config, tmp_path, items, "signal")
    words = [(tmp_path / f"process-{n}.txt").read_text() for n in (0, 1)]
    assert words[0].startswith("143 False stopped at step 2 of 3") and words[1].startswith("143 True")
    with pytest.raises(UserError, match=r"step-2 was written under (FSDP|ZeRO \d over 2 processes) and cannot go on"):
        alone(tmp_path, items)
    done = launch(config, tmp_path, items)
    assert done.returncode == 0, done.stderr[-3000:]
    same_run(tmp_path, unsharded, without=("eval_failed", "eval_look_rate"))  # of questions, which are not asked


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_two_sharded_stages_are_those_of_one_process(config: str, items: str, tmp_path: Path) -> None:
    done = launch(config, tmp_path / "two", items, "two stages")
    assert done.returncode == 0, done.stderr[-3000:]
    with contextlib.chdir(ROOT):
        run(launched_run.two_stages(items), out=tmp_path / "one")
    unasked = ("eval_failed", "eval_look_rate")
    same_run(tmp_path / "two", tmp_path / "one", without=unasked, atol=5e-5)  # twice the steps (measured: 2.8e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", SHIPPED)
def test_a_full_disk_ends_a_sharded_run(config: str, items: str, tmp_path: Path) -> None:
    """...for both, and what was whole stays."""
    done = launch(config, tmp_path, items, "disk")
    assert done.returncode
    said = (tmp_path / "process-0.txt").read_text()
    assert "could not be written" in said and "step-1" in said
    assert (tmp_path / "stages/00-talk/checkpoints/step-1/checkpoint.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_a_sharded_run_in_bfloat16_is_near(config: str, items: str, tmp_path: Path) -> None:
    """...one process's, with layers that run again in the backward pass, as the published models' recipes have it."""
    done = launch(config, tmp_path / "two", items, precision="bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    paths = tmp_path / "two", alone(tmp_path / "one", items, "bfloat16")
    losses = [[entry.get("loss", entry.get("eval_loss")) for entry in log(path)] for path in paths]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
