"""Executors: records do not depend on the executor, nor on an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from support import TESTS
from support.interrupted_evaluation import Echo, write_questions
from support.synthetic import PAGES

from relook.errors import UserError
from relook.evaluate import evaluate
from relook.evaluate.executors import Executor
from relook.evaluate.record_writer import RecordWriter, parts
from relook.evaluate.runner import Plan, fastest_batch, in_order

HERE = TESTS / "support"
BIN = Path(sys.executable).parent
QUESTIONS = {"looks": ["none", "oracle"], "batch": 4}


def plain(folder: Path) -> list[dict]:
    """The records of a finished run without what a clock said."""
    found = []
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        (record["usage"] or {}).pop("seconds", None)
        found.append(record | {"seconds": None, "where": None, "image": None})
    return found


@pytest.fixture
def own(tmp_path) -> str:
    return str(write_questions(tmp_path))


@pytest.fixture
def straight(own, tmp_path) -> list[dict]:
    evaluate(Echo(), [own], out=tmp_path / "straight", **QUESTIONS)
    return plain(tmp_path / "straight")


def test_shares_of_several_processes_are_the_records_of_one(own, straight, tmp_path):
    plan = Plan((own,), ("none", "oracle"), None, 0, 4, 64, "default")
    shares = [list(Executor(Echo()).share(plan, RecordWriter(None, {}), None, rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [8, 8, 6]
    together = in_order([record for share in reversed(shares) for record in share], plan)
    assert [(r["index"], r["look"], r["answer"]) for r in together] == [
        (r["index"], r["look"], r["answer"]) for r in straight
    ]


def test_one_process_resumes_a_run_of_two(own, straight, tmp_path):
    """Each of two was cut after its first batch, one of them in the midst of a write."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(_dying(0), [own], out=tmp_path / "run", **QUESTIONS)
    about = json.loads((tmp_path / "run/run.json").read_text())
    plan = Plan((own,), ("none", "oracle"), None, 0, 4, 64, "default")
    for rank in (0, 1):
        share = Executor(Echo()).share(plan, RecordWriter(tmp_path / "run", about, rank), None, rank, 2)
        for _ in range(8):
            next(share)
    with (tmp_path / "run/records.jsonl.part-1").open("ab") as file:
        file.write(b'{"task": "own", "lo')
    assert len(parts(tmp_path / "run")) == 2
    model = Echo()
    run = evaluate(model, [own], out=tmp_path / "run", **QUESTIONS)
    assert run.run["taken_up"] == 16 and model.asked == 2
    assert plain(tmp_path / "run") == straight
    assert not list((tmp_path / "run").glob("*.part*"))


def test_an_interrupted_run_of_one_look_keeps_its_answers(own, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(_dying(2), [own], ["none"], out=tmp_path / "run", batch=4)
    model = Echo()
    assert evaluate(model, [own], ["none"], out=tmp_path / "run", batch=4).run["taken_up"] == 8
    assert model.asked == 1


def _dying(after: int) -> Echo:
    class Dying(Echo):
        def ask_many(self, requests, **options):
            if self.asked == after:
                raise KeyboardInterrupt
            return super().ask_many(requests, **options)

    return Dying()


# ---- a batch size by measuring


@pytest.mark.parametrize(
    ("seconds", "best"),
    [([4, 6, 7, 15, 99], 4), ([1, 3, 1, 1], 1), ([4, 2, 1, 0.5, 0.2], 8)],  # of a batch of 1, 2, 4, 8 (11 questions)
)
def test_a_batch_grows_until_it_is_no_faster(own, tmp_path, monkeypatch, seconds, best):
    times = iter([0.0, *seconds])
    monkeypatch.setattr("relook.evaluate.runner._time", lambda *_: next(times))
    run = evaluate(Echo(), [own], ["none"], out=tmp_path / "run", batch="auto")
    assert run.run["batch"] == best and len(run.run["measured"]) <= 4
    assert json.loads((tmp_path / "run/run.json").read_text())["batch"] == best


def test_measurements_before_an_interruption_are_kept(own, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        evaluate(_dying(1), [own], ["none"], out=tmp_path / "run", batch=3)
    monkeypatch.setattr("relook.evaluate.executors.fastest_batch", lambda *_: pytest.fail("measured again"))
    assert evaluate(Echo(), [own], ["none"], out=tmp_path / "run", batch="auto").run["taken_up"] == 3


def test_measuring_asks_the_first_questions_alone(own):
    from relook.evaluate.runner import Runner

    model = Echo()
    plan = Plan((own,), ("none",), 3, 0, 1, 64, "default")
    assert set(fastest_batch(Runner(model, plan), sizes=(1, 2, 4))) <= {1, 2}


# ---- wrong input


def test_wrong_engines_are_said_before_any_work(own):
    with pytest.raises(UserError, match="engine 'spark' is unknown; expected one of local, processes, ray"):
        evaluate(Echo(), [own], engine="spark")
    with pytest.raises(UserError, match="started alone; start it as"):
        evaluate(Echo(), [own], engine="processes")
    with pytest.raises(UserError, match="loads the model in each replica"):
        evaluate(Echo(), [own], engine="ray")
    with pytest.raises(UserError, match="replicas=2 is for engine='ray'"):
        evaluate(Echo(), [own], replicas=2)


# ---- for real


def start(*command: object, **more: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HERE, env=env)


TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_killed_anywhere_and_run_again_give_the_same(own, straight, tmp_path):
    script = HERE / "interrupted_evaluation.py"
    for rank, kill_at in ((0, 1), (1, 3), (0, 8), (0, 17)):
        folder = tmp_path / f"{rank}-{kill_at}"
        write_questions(folder)
        cut = start(*TORCHRUN, script, folder, kill_at, rank)
        assert cut.returncode != 0 and not (folder / "run/records.jsonl").exists(), cut.stderr
        again = start(*TORCHRUN, script, folder, 0)
        assert again.returncode == 0, again.stderr
        assert plain(folder / "run") == straight, (rank, kill_at)
        assert not list((folder / "run").glob("*.part*"))


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """cards-tiny asked in one process; the arguments, and the records."""
    folder = tmp_path_factory.mktemp("cards")
    arguments = ["evaluate", "-m", "cards-tiny", "--tasks", PAGES, "--looks", "auto", "none", "oracle"]
    arguments += ["--limit", "13", "--batch", "4", "--out"]
    done = start(sys.executable, "-m", "relook", *arguments, folder)
    assert done.returncode == 0, done.stderr
    return arguments, folder


@pytest.mark.slow
def test_torchrun_gives_the_records_of_one_process(cards, tmp_path):
    arguments, alone = cards
    done = start(*TORCHRUN, "-m", "relook", *arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert plain(tmp_path) == plain(alone) and len(plain(alone)) == 39
    assert done.stdout.count("LM pos.") == 1  # one of them speaks


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")
def test_two_actors_of_ray_give_the_records_of_one_process(cards, tmp_path):
    arguments, alone = cards
    done = start(sys.executable, "-m", "relook", *arguments, tmp_path, "--engine", "ray", "--replicas", "2")
    assert done.returncode == 0, done.stderr
    assert plain(tmp_path) == plain(alone)
    run = json.loads((tmp_path / "results.json").read_text())["run"]
    assert run["replicas"] == 2 and run["engine"] == "ray"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")
@pytest.mark.parametrize("victim", ["the run", "a replica"])
def test_a_run_with_ray_survives_a_kill(cards, tmp_path, victim):
    """Killed itself, it goes on when given again; of a replica that dies it asks the batch once more."""
    arguments, alone = cards
    command = [sys.executable, "-m", "relook", *arguments, str(tmp_path), "--engine", "ray", "--replicas", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    journal = tmp_path / "records.jsonl.part"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=HERE, env=env, **pipes) as run:
        try:
            wait_until(lambda: run.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") >= 3))
            assert run.poll() is None, run.stderr.read()
            if victim == "a replica":
                below = psutil.Process(run.pid).children(recursive=True)
                next(p for p in below if "ray::Replica" in " ".join(p.cmdline())).kill()
                _, problems = run.communicate(timeout=300)
                assert run.returncode == 0, problems
        finally:
            run.kill()
    if victim == "the run":
        assert not (tmp_path / "records.jsonl").exists()
        again = start(*command)
        assert again.returncode == 0, again.stderr
    assert plain(tmp_path) == plain(alone)


def wait_until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
