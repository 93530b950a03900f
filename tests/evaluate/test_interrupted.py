"""Interrupted evaluations: after a kill and a rerun no item is lost or repeated, and the result is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import interrupted_evaluation
from support.interrupted_evaluation import Echo
from support.subprocesses import run_in_process

from relook.errors import RelookError, UserError
from relook.evaluate import evaluate


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
    code, counts = run_in_process(interrupted_evaluation.run, folder)
    assert code == 0
    return folder, counts


def test_killed_anywhere_and_run_again_gives_the_same(straight, tmp_path):
    whole, counts = straight
    assert counts["asked"] == 6 and len(records(whole)) == 22
    for kill_at in range(1, counts["events"] + 1):
        folder = tmp_path / str(kill_at)
        assert run_in_process(interrupted_evaluation.run, folder, kill_at)[0] == -9
        assert run_in_process(interrupted_evaluation.run, folder)[0] == 0
        assert records(folder) == records(whole), kill_at
        assert results(folder) == results(whole), kill_at
        assert not list(folder.rglob("*.part"))


def test_answered_items_are_not_repeated(straight, tmp_path):
    _, counts = straight
    run_in_process(interrupted_evaluation.run, tmp_path, counts["events"])  # at its last event: renaming its records
    _, again = run_in_process(interrupted_evaluation.run, tmp_path)
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


def test_a_run_is_not_resumed_with_other_settings(cut):
    run = cut.parent / "run"
    before = (run / "records.jsonl.part").read_bytes()
    with pytest.raises(UserError, match=r"batch \(4, now 2\)"):
        evaluate(Echo(), [str(cut)], ["none", "oracle"], out=run, batch=2)
    assert (run / "records.jsonl.part").read_bytes() == before
    model = Echo()
    assert evaluate(model, [str(cut)], ["none", "oracle"], out=run, batch=4).run["taken_up"] == 12
    assert model.asked == 3


@pytest.mark.parametrize("key", ["image", "field"])
def test_a_run_is_not_resumed_with_other_questions(cut, key):
    (cut.parent / "b.png").write_bytes((cut.parent / "a.png").read_bytes())
    rows = [json.loads(line) | {key: "b.png"} for line in cut.read_text().splitlines()]
    cut.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="was another one when this run was cut"):
        evaluate(Echo(), [str(cut)], ["none", "oracle"], out=cut.parent / "run", batch=4)


def test_a_run_is_not_resumed_with_other_weights(tmp_path):
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


def test_a_run_without_any_answer_is_not_resumed(tmp_path):
    class Mute(Echo):
        def ask_many(self, requests, **_):
            raise ValueError("out of order")

    path = interrupted_evaluation.write_questions(tmp_path)
    with pytest.raises(RelookError, match="out of order"):
        evaluate(Mute(), [str(path)], ["none"], out=tmp_path / "run")
    assert evaluate(Echo(), [str(path)], ["none"], out=tmp_path / "run").run["taken_up"] == 0


def test_finished_work_is_not_replaced_unless_told(tmp_path):
    """Neither another model's nor the same one's, nor what a judge was paid for."""

    class Other(Echo):
        name = "other"

    path = interrupted_evaluation.write_questions(tmp_path)
    run = tmp_path / "run"
    evaluate(Echo(), [str(path)], ["none"], out=run)
    file = run / "records.jsonl"
    judged = [json.loads(line) | {"judged": {"reply": "score: 1"}} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in judged))
    before = {each.name: each.read_bytes() for each in run.iterdir()}
    with pytest.raises(UserError, match='finished evaluation of "echo" with the same settings'):
        evaluate(Echo(), [str(path)], ["none"], out=run)
    with pytest.raises(UserError, match=r'of "echo", which differs in model \("echo", now "other"\)'):
        evaluate(Other(), [str(path)], ["none"], out=run)
    assert {each.name: each.read_bytes() for each in run.iterdir()} == before
    evaluate(Other(), [str(path)], ["none"], out=run, overwrite=True)
    assert json.loads((run / "results.json").read_text())["run"]["model"] == "other"
    assert "judged" not in json.loads(file.read_text().splitlines()[0])


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The second is refused while the first is at it, and what the first writes is whole."""

    class Nosy(Echo):
        def ask_many(self, requests, **options):
            with pytest.raises(UserError, match="another run is writing here"):
                evaluate(Echo(), [str(path)], ["none"], out=tmp_path / "run")
            return super().ask_many(requests, **options)

    path = interrupted_evaluation.write_questions(tmp_path)
    evaluate(Nosy(), [str(path)], ["none"], out=tmp_path / "run")
    assert len(records(tmp_path)) == 11
