"""Interrupted training: after a kill, signal, full disk or NaN, files on disk are complete and training resumes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from support import interrupted_run
from support.synthetic import OBJECTIVE

from relook.errors import RelookError
from relook.model.loading import load_model
from relook.train.checkpoints import RECORD, Checkpoints, made_of
from relook.train.distributed import Signals, Stopped
from relook.train.runner import run
from relook.train.trainer import StageTrainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of the run that nothing disturbs, and how many events it had."""
    folder, events = tmp_path_factory.mktemp("straight"), []
    with pytest.MonkeyPatch.context() as patch:
        interrupted_run.count_events(patch.setattr, events.append)
        run(interrupted_run.recipe(), out=folder)
    return folder, len(events)


def same_end(ours: Path, theirs: Path) -> None:
    """The same weights, auxiliary heads and log (but for time and memory), bit by bit."""
    for name in (
        "final/model.safetensors",
        "stages/01-noisy/model.safetensors",
        "stages/01-noisy/heads.safetensors",
    ):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (ours, theirs)]
    of_a_clock = ("seconds", "samples_per_s", "tokens_per_s", "memory_mb")
    told = [[{k: v for k, v in e.items() if k not in of_a_clock} for e in log] for log in logs]
    assert told[0] == told[1]
    done = [finished_record(f / "stages/01-noisy") for f in (ours, theirs)]
    assert done[0]["loss"] == done[1]["loss"]
    assert not list(ours.rglob("*.part")) and not (ours / "stages/01-noisy/checkpoints").exists()


def finished_record(place: Path) -> dict:
    return json.loads((place / "done.json").read_text())


def failing_at(monkeypatch, step: int, fault) -> None:
    """Do `fault()` in the first batch of a step of the second stage."""
    inner, fired = StageTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.stage.name == "noisy" and self.state.global_step + 1 == step and not fired:
            fired.append(step)
            fault(self)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


def test_a_killed_run_goes_on_exactly(straight, tmp_path: Path) -> None:
    folder, events = straight
    fatal = random.SystemRandom().randint(2, events - 1)
    print(f"killed at event {fatal} of {events}")  # shown when the test fails
    script = [sys.executable, str(Path(interrupted_run.__file__)), str(tmp_path), str(fatal)]
    assert subprocess.run(script, capture_output=True, check=False).returncode == -signal.SIGKILL
    run(interrupted_run.recipe(), out=tmp_path)
    same_end(tmp_path, folder)


def test_sigterm_saves_and_exits(straight, tmp_path: Path, monkeypatch) -> None:
    """...without any checkpoint on schedule; and what was saved is a model that loads.

    The process that draws examples gets the signal, too, as from a scheduler.
    """

    def everybody(_) -> None:
        for process in (*psutil.Process().children(), psutil.Process()):
            process.send_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    failing_at(monkeypatch, 3, everybody)
    with pytest.raises(Stopped, match="step 3 of 6") as stopped:
        run(interrupted_run.recipe(save_every=0, workers=1), out=tmp_path)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    (saved,) = (tmp_path / "stages/01-noisy/checkpoints").iterdir()
    assert saved.name in str(stopped.value)
    assert sum(p.numel() for p in load_model(saved, dtype=torch.float32).parameters()) > 2e6
    run(interrupted_run.recipe(), out=tmp_path)
    same_end(tmp_path, straight[0])


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_signal_is_obeyed(before) -> None:
    """Also where a script has started the run by `command &`, whose SIGINT the shell has ignored."""
    outside = signal.signal(signal.SIGINT, before)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.seen == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, outside)


def test_a_loss_that_is_no_number_stops(tmp_path: Path, monkeypatch) -> None:
    def spoil(trainer):
        trainer.trained.model.lm_head.weight.data.fill_(torch.nan)

    failing_at(monkeypatch, 4, spoil)
    with pytest.raises(RelookError, match="loss of step 4 is nan") as caught:
        run(interrupted_run.recipe(), out=tmp_path)
    saved = tmp_path / "stages/01-noisy/checkpoints/step-2"
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    assert all(p.isfinite().all() for p in load_model(saved, dtype=torch.float32).parameters())
    assert not (saved.parent.parent / "done.json").exists()


def test_an_exploding_gradient_stops(tmp_path: Path) -> None:
    with pytest.raises(RelookError, match=r"gradient of step 1 exploded.*max_grad_norm=1e-06.*no checkpoint"):
        run(interrupted_run.recipe(max_grad_norm=1e-6), out=tmp_path)


def test_a_full_disk_stops_and_leaves_nothing_half_written(tmp_path: Path, capfd) -> None:
    """No file may grow past 1 MB: the kernel refuses the rest of the weights, in the middle of the write."""
    stages = [{**interrupted_run.recipe().stages[1].model_dump(), "samples": 4, "objective": OBJECTIVE}]
    plan = interrupted_run.recipe(stages=stages, save_every=1)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, most[1]))
    try:
        with pytest.raises(RelookError, match=r"checkpoints could not be written.*MB free") as caught:
            run(plan, out=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert "no checkpoint yet" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("model.safetensors"))


# -- the folder of checkpoints


def publish(checkpoints: Checkpoints, step: int, eval_loss: float | None = None) -> None:
    part = checkpoints.aside / f"checkpoint-{step}"
    part.mkdir(parents=True)
    (part / "model").write_text(str(step))
    checkpoints.publish({"step": step} | ({} if eval_loss is None else {"eval_loss": eval_loss}))


def steps(checkpoints: Checkpoints) -> list[int]:
    on_disk = sorted(int(path.name.removeprefix("step-")) for path in checkpoints.folder.iterdir())
    assert on_disk == [record["step"] for record in checkpoints.found()]
    return on_disk


def test_the_last_k_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 1.5)):
        publish(checkpoints, step, loss)
    assert steps(checkpoints) == [2, 4, 5]
    assert checkpoints.last()["step"] == 5 and checkpoints.best()["step"] == 2
    assert "step-5" in checkpoints.say_last()
    with checkpoints.finishing({"stage": "a"}) as aside:
        aside.mkdir()
    assert steps(checkpoints) == [2] and checkpoints.finished()


def test_what_has_no_record_does_not_exist(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    publish(checkpoints, 1)
    publish(checkpoints, 2)
    (checkpoints.folder / "step-2" / RECORD).unlink()
    assert [r["step"] for r in checkpoints.found()] == [1]
    publish(checkpoints, 2)  # takes the place of the half one
    assert steps(checkpoints) == [1, 2] and (checkpoints.folder / "step-2" / "model").read_text() == "2"


def test_a_stage_is_made_of_what_decides_the_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.json").write_text("[]")

    def of(**changes) -> dict:
        plan = interrupted_run.recipe(**changes)
        return made_of(plan, plan.stages[0], None)

    watched = {"save_every": 7, "keep_last": 9, "evaluate_every": 3, "max_grad_norm": 5.0, "report_to": ["wandb"]}
    assert of(**watched, validation={"questions": 1, "examples": 2}) == of()
    assert of(seed=2) != of()
    items = {"data": {"source": "json", "path": "items.json"}}
    assert of(**items, validation={"items": 5}) != of(**items)  # fewer are left to learn from
    stage = interrupted_run.recipe().stages[0].model_dump(exclude_defaults=True)
    assert of(stages=[stage | {"lr": 0.5}]) != of()
