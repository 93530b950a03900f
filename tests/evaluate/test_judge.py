"""The judge, against a local HTTP server that answers, fails, stalls, rejects requests or returns nonsense."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
from PIL import Image
from support.stub_judge_server import stub_judge_at
from typer.testing import CliRunner

from relook.cli import app
from relook.errors import UserError
from relook.evaluate import evaluate
from relook.evaluate.judge import Judge, JudgeRequest, judge_folder, parse_score
from relook.trace import Answer, Usage


@pytest.fixture
def stub_judge(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = stub_judge_at(0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def requests(*answers):
    return [JudgeRequest("What is the total?", ("9.30",), answer) for answer in answers]


def judged(stub_judge, *answers, **settings):
    return Judge("judge", stub_judge.url, **({"timeout": 1.0, "retries": 3} | settings)).judge(requests(*answers))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 0.5", 0.5),
        ("Score: 1", 1.0),
        ("**Score**: 0.75.", 0.75),
        ("score: .5", 0.5),
        ("The score is 0", 0.0),
        ("score: 1.0\nscore: 1.0", 1.0),
        ("score: 0.2 ... no, score: 0.8", None),
        ("score: 7", None),
        ("score: 7/10", None),
        ("score: 1/2", None),
        ("score: 80%", None),
        ("score: -1", None),
        ("1.0", None),
        ("", None),
        ("I cannot score this.", None),
    ],
)
def test_only_a_score_from_0_to_1_is_one(reply, score):
    assert parse_score(reply) == score


def test_scores_are_in_order_with_their_cost(stub_judge):
    first, second = judged(stub_judge, "right", "half")
    assert (first.score, second.score) == (1.0, 0.5)
    assert (first.model, first.tokens_in, first.tokens_out) == ("judge-2026", 100, 5)
    assert {(b["temperature"], b["max_tokens"], b["model"]) for b in stub_judge.bodies} == {(0, 64, "judge")}
    assert "9.30" in stub_judge.bodies[0]["messages"][-1]["content"]


def test_failures_that_pass_are_tried_again(stub_judge):
    assert [j.score for j in judged(stub_judge, "flaky", "busy")] == [1.0, 1.0]
    assert stub_judge.seen == {"flaky": 3, "busy": 2}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("dead", "InternalServerError"),
        ("stalls", "Timeout"),
        ("babbles", "no score"),
        ("boasts", "no score"),
        ("html", ""),
        ("hollow", "no text"),
    ],
)
def test_failed_judgements_are_unscored_with_a_reason(stub_judge, answer, words):
    good, bad = judged(stub_judge, "right", answer, retries=1)
    assert good.score == 1.0
    assert bad.score is None and bad.problem and words in bad.problem


def test_an_endpoint_that_is_not_there_leaves_answers_unscored():
    lost = Judge("judge", "http://127.0.0.1:9/v1", timeout=1.0, retries=0).judge(requests("right"))
    assert lost[0].score is None and "Connection" in lost[0].problem


def test_a_rejected_key_stops_the_run(stub_judge):
    with pytest.raises(UserError, match=r"no such key.*OPENAI_API_KEY"):
        judged(stub_judge, *["refused"] * 20, concurrency=2)
    assert stub_judge.seen["refused"] < 20


def test_no_key_is_said_before_anything_is_sent(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Judge("gpt-4o")


def test_no_more_requests_at_once_than_allowed(stub_judge):
    judged(stub_judge, *(f"answer{i}" for i in range(12)), concurrency=3)
    assert 2 <= stub_judge.most <= 3


def test_what_was_judged_is_not_asked_again(stub_judge, tmp_path):
    cache = tmp_path / "judged.jsonl"
    judged(stub_judge, "right", "babbles", cache=cache)
    with cache.open("a") as file:
        file.write('{"key": "torn')  # killed while writing
    right, babbles = judged(stub_judge, "right", "babbles", cache=cache)
    assert (right.score, right.cached, right.tokens_in) == (1.0, True, 0)
    assert not babbles.cached  # what failed is asked once more
    assert stub_judge.seen == {"right": 1, "babbles": 2}
    Judge("another", stub_judge.url, cache=cache).judge(requests("right"))
    assert stub_judge.seen["right"] == 2  # another judge is another judgement


# ---- whole folders


class Parrot:
    """A model of plain Python that answers what the question tells it to."""

    name = "parrot"

    processor = SimpleNamespace(grid_size=8, region_margin=0, region_of="whole", max_looks=1, looks=())

    def ask_many(self, requests, **_):
        return [Answer(text=r["question"].split()[-1], looks=[], transcript=[], usage=Usage()) for r in requests]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": f"Say {word}", "answer": "right"}
        for word in ("right", "half", "babbles", "right")
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate(Parrot(), [str(tmp_path / "own.jsonl")], ["none"], out=tmp_path / "run")
    return tmp_path / "run"


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_folder_is_judged_and_summed_up_again(stub_judge, folder, tmp_path):
    done = command("judge", folder, "-m", "judge", "--url", stub_judge.url, "--cache", tmp_path / "c", "--json")
    assert done.exit_code == 0, done.output
    results = json.loads((folder / "results.json").read_text())
    (result,) = results["results"]
    judge = result["measures"]["judge"]
    assert (judge["mean"], judge["n"], result["unscored"]) == (pytest.approx(2.5 / 3), 3, 1)  # the babble is not a 0
    assert result["measures"]["exact"]["n"] == 4
    assert results["run"]["judge"] == {
        "model": "judge",
        "url": stub_judge.url + "/",
        "judged_by": {"judge-2026": 3},
        "cached": 0,
        "unscored": 1,
        "problems": {"no score from 0 to 1 in 'I like turtles.'": 1},
        "tokens_in": 400,
        "tokens_out": 20,
    }
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [r["scores"].get("judge") for r in records] == [1.0, 0.5, None, 1.0]
    assert records[2]["judged"]["reply"] == "I like turtles."
    assert json.loads(done.stdout) == results


def test_the_cost_is_reported_at_given_prices(stub_judge, folder, tmp_path):
    """Four replies of 100 + 5 tokens, the one that cannot be read among them; what was known before costs nothing."""
    base = ("judge", folder, "-m", "judge", "--url", stub_judge.url, "--cache", tmp_path / "c", "--prices", "2.5", "10")
    first, second = command(*base), command(*base)
    assert "400 + 20 tokens, cost 0.0012" in first.stdout, first.output
    assert "100 + 5 tokens, cost 0.0003" in second.stdout  # only the babble is asked again
    told = json.loads((folder / "results.json").read_text())["run"]["judge"]
    assert (told["prices"], told["cost"]) == ([2.5, 10.0], pytest.approx(0.0003))


def test_judging_again_pays_only_for_what_failed(stub_judge, folder, tmp_path):
    for _ in range(2):
        done = command("judge", folder, "-m", "judge", "--url", stub_judge.url, "--cache", tmp_path / "c")
    assert stub_judge.seen["half"] == 1 and stub_judge.seen["babbles"] == 2
    assert "1 unscored, 3 known before" in done.stdout


def test_where_nothing_can_be_judged_the_files_stay(stub_judge, folder, tmp_path):
    before = [(folder / name).read_bytes() for name in ("records.jsonl", "results.json")]
    done = command(
        "judge", folder, "-m", "judge", "--url", "http://127.0.0.1:9/v1", "--cache", tmp_path / "c", "--retries", 0
    )
    assert done.exit_code != 0 and "not one of 4 answers could be judged" in done.stderr
    assert [(folder / name).read_bytes() for name in ("records.jsonl", "results.json")] == before


def test_a_folder_without_records_raises(stub_judge, tmp_path):
    done = command("judge", tmp_path, "-m", "judge", "--url", stub_judge.url, "--cache", tmp_path / "c")
    assert done.exit_code == 2 and "relook evaluate --out" in done.stderr


def test_prices_below_nothing_are_refused(stub_judge, tmp_path):
    with pytest.raises(UserError, match="prices -1 and 2; expected"):
        judge_folder(tmp_path, Judge("judge", stub_judge.url), prices=(-1.0, 2.0))


def test_a_folder_is_held_while_it_is_judged(stub_judge, folder):
    class Slow(Judge):
        def judge(self, requests, progress=None):
            with pytest.raises(UserError, match="another run is writing here"):
                evaluate(Parrot(), [str(folder.parent / "own.jsonl")], ["none"], out=folder, overwrite=True)
            return super().judge(requests, progress)

    judge_folder(folder, Slow("judge", stub_judge.url))
