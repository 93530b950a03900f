"""Interrupted evaluations: after a kill and a rerun no item is lost or repeated, and the result is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS, interrupted_evaluation
from support.interrupted_evaluation import Echo

from relook.errors import RelookError, UserError
from relook.evaluate import evaluate

SCRIPT = TESTS / "support" / "interrupted_evaluation.py"


def start(folder: Path, kill_at: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, folder, str(kill_at)]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=SCRIPT.parent)


def records(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "run/records.jsonl").read_text().splitlines()]
    home = str(folder)
    return [json.loads(json.dumps(r | {"seconds": None}).replace(home, "")) for r in found]


def results(folder: Path) -> list[dict]:
    found = json.loads((folder / "run/results.json").read_text())["results"]
    for result in found:
        result["measures"].pop("seconds")
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    done = start(folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_killed_anywhere_and_given_again_gives_the_same(straight, tmp_path):
    whole, told = straight
    assert told["asked"] == 6 and len(records(whole)) == 22
    for kill_at in range(1, told["events"] + 1, 4):
        folder = tmp_path / str(kill_at)
        cut = start(folder, kill_at)
        assert cut.returncode == -9, cut.stderr
        again = start(folder)
        assert again.returncode == 0, again.stderr
        assert records(folder) == records(whole), kill_at
        assert results(folder) == results(whole), kill_at
        assert not list(folder.rglob("*.part"))


def test_what_was_answered_is_not_asked_again(straight, tmp_path):
    _, told = straight
    start(tmp_path, told["events"])  # at its last event: the name of its records
    again = json.loads(start(tmp_path).stdout)
    assert again["asked"] == 0


@pytest.fixture
def cut(tmp_path):
    """The folder of a run that was cut after its third batch."""

    class Dying(Echo):
        def ask_many(self, requests, **options):
            if self.asked == 3:
                raise KeyboardInterrupt
            return super().ask_many(requests, **options)

    path = interrupted_evaluation.write_questions(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dying(), [str(path)], ["none", "oracle"], out=tmp_path / "run", batch=4)
    return path


def test_other_settings_do_not_go_on_with_the_run(cut):
    run = cut.parent / "run"
    before = (run / "records.jsonl.part").read_bytes()
    with pytest.raises(UserError, match=r"batch \(4, now 2\)"):
        evaluate(Echo(), [str(cut)], ["none", "oracle"], out=run, batch=2)
    assert (run / "records.jsonl.part").read_bytes() == before
    model = Echo()
    assert evaluate(model, [str(cut)], ["none", "oracle"], out=run, batch=4).run["taken_up"] == 12
    assert model.asked == 3


def test_other_weights_do_not_go_on_with_the_run(tmp_path):
    from support import tiny_model as tiny

    class Model(Echo):
        model = tiny.tiny_model(seed=0)

        def ask_many(self, requests, **options):
            if self.asked == 2:
                raise KeyboardInterrupt
            return super().ask_many(requests, **options)

    path = interrupted_evaluation.write_questions(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Model(), [str(path)], ["none"], out=tmp_path / "run", batch=4)
    Model.model = tiny.tiny_model(seed=1)
    with pytest.raises(UserError, match="weights"):
        evaluate(Model(), [str(path)], ["none"], out=tmp_path / "run", batch=4)


def test_a_run_in_which_nothing_was_answered_is_not_gone_on_with(tmp_path):
    class Mute(Echo):
        def ask_many(self, requests, **_):
            raise ValueError("out of order")

    path = interrupted_evaluation.write_questions(tmp_path)
    with pytest.raises(RelookError, match="out of order"):
        evaluate(Mute(), [str(path)], ["none"], out=tmp_path / "run")
    assert evaluate(Echo(), [str(path)], ["none"], out=tmp_path / "run").run["taken_up"] == 0
