"""`relook ask --batch`: every question once, whatever interrupts; and what `ask` says of models that are not ready."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.own_items import picture
from typer.testing import CliRunner

from relook.cli import app
from relook.cli.ask import describe
from relook.errors import UserError
from relook.model.loading import resolve
from relook.perceive.batch import ask_file
from relook.perceive.vlm import untrained_looks
from relook.trace import Answer


class Parrot:
    """Answers with the question; cannot be asked "broken"."""

    name = "parrot"

    def __init__(self, stop_after: int = 1000) -> None:
        self.asked: list[str] = []
        self.stop_after = stop_after

    def ask_many(self, pairs, batch_size, **options):
        for pair in pairs:
            if not Path(pair["image"]).is_file() or pair["question"] == "broken":
                raise UserError(f"{pair['image']}: cannot be asked")
            if len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(pair["question"])
        return [Answer(pair["question"], [], question=pair["question"]) for pair in pairs]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    picture(0).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": f"Q{n}?"} for n in range(20)]
    lines[4]["question"] = "broken"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "q.jsonl"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_question_is_asked_once_across_an_interruption(questions, tmp_path):
    out, seen = tmp_path / "more/answers.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        ask_file(Parrot(stop_after=12), questions, out)
    begun = read(out)
    assert 0 < len(begun) < 20
    out.write_text(out.read_text() + '{"number": 19, "ima')  # a line that a kill cut short
    again = Parrot()
    assert ask_file(again, questions, out, lambda *seen_: seen.append(seen_)) == (20, 1)
    lines = [json.loads(line) for line in out.read_text().splitlines() if not line.endswith('"ima')]
    assert [line["number"] for line in lines] == [*range(1, 21)] and lines[: len(begun)] == begun
    assert lines[4]["error"].endswith("cannot be asked") and lines[5]["answer"] == "Q5?"
    assert seen[0][1:] == (len(begun), 20) and seen[-1][1:] == (20, 20)
    assert ask_file(Parrot(stop_after=0), questions, out) == (20, 1)  # nothing is left to ask


def test_answers_to_other_questions_are_not_gone_on_with(questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask_file(Parrot(), questions, out)
    questions.write_text(questions.read_text().replace("Q7?", "Q seven?"))
    with pytest.raises(UserError, match=r"answer 8 has the question 'Q7\?', but it would be 'Q seven\?'"):
        ask_file(Parrot(), questions, out)


def test_answers_with_other_options_are_not_gone_on_with(questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask_file(Parrot(), questions, out, box=(1, 2, 30, 40))
    assert read(out)[0]["options"] == {"box": [1.0, 2.0, 30.0, 40.0]}
    ask_file(Parrot(stop_after=0), questions, out, box="1,2,30,40")  # the same
    with pytest.raises(UserError, match=r"answer 1 has the options \{'box'.*but it would be None"):
        ask_file(Parrot(), questions, out)
    with pytest.raises(UserError, match=r"would be \{'look': 'none'\}; give another place"):
        ask_file(Parrot(), questions, out, look="none")


def test_a_list_of_one_image_is_one_and_errors_name_no_other_question(tmp_path):
    picture(0).save(tmp_path / "a.png")
    lines = [{"image": ["a.png"], "question": "Q?"}, {"image": "gone.png", "question": "Q?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["ask", "-m", "cards-tiny", "--batch", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "answers.jsonl")]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    first, second = read(tmp_path / "answers.jsonl")
    assert (first["image"], second["number"]) == ("a.png", 2)
    assert second["error"].startswith(str(tmp_path / "gone.png"))
    (tmp_path / "q.jsonl").write_text('{"image": ["a.png", "b.png"], "question": "Q?"}\n')
    with pytest.raises(UserError, match=r"q.jsonl:1: has 2 images, and the keys image, question"):
        ask_file(Parrot(), tmp_path / "q.jsonl", tmp_path / "more.jsonl")


def test_the_command_asks_a_csv_of_a_real_model(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "q.csv").write_text("image,question\na.png,What is the total?\na.png,Who?\n")
    words = ["ask", "-m", "cards-tiny", "--batch", str(tmp_path / "q.csv"), "--out", str(tmp_path / "answers.jsonl")]
    done = CliRunner().invoke(app, [*words, "--max-new-tokens", "4"])
    assert done.exit_code == 0 and "2 answers" in done.stdout, done.output
    lines = read(tmp_path / "answers.jsonl")
    assert [line["question"] for line in lines] == ["What is the total?", "Who?"]
    assert all(line["model"] == "cards-tiny" and "answer" in line for line in lines)


@pytest.mark.parametrize("words", [[], ["a.png"], ["--batch", "q"], ["a.png", "Q?", "--batch", "q", "--out", "a"]])
def test_one_question_or_a_file_of_them(words):
    done = CliRunner().invoke(app, ["ask", *words])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1


# -- models that are not ready


def test_a_run_points_at_its_model(tmp_path):
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/final/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it is a run, whose model is .*run/final"):
        resolve(tmp_path / "run")
    (tmp_path / "cut/stages/00-tune/checkpoints/step-4").mkdir(parents=True)
    (tmp_path / "cut/stages/00-tune/checkpoints/step-4/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has not ended; its last checkpoint is .*step-4"):
        resolve(tmp_path / "cut")


def test_an_empty_answer_is_said():
    assert describe(Answer("", [])).splitlines()[0] == "(empty answer)"


@pytest.mark.parametrize(
    ("provenance", "untrained"),
    [
        (None, []),  # nothing is known
        ({"layout": "published"}, []),
        ({"stages": [{"stage": "old"}]}, []),  # of a version that did not say
        ({"stages": [{"looks": ["region"]}]}, ["clip"]),
        ({"stages": [{"looks": ["region"]}], "start": {"from": "x", "stages": [{"looks": ["clip"]}]}}, []),
        ({"stages": [{"looks": ["region"]}], "start": {"from": "x", "base": "Qwen2-VL", "seed": 1}}, ["clip"]),
        ({"stages": [{"looks": ["region"]}], "start": {"from": "x", "layout": "published"}}, []),
        ({"base": "Qwen2-VL", "seed": 1}, ["region", "clip"]),
    ],
)
def test_looks_that_nothing_has_taught(provenance, untrained):
    assert untrained_looks(SimpleNamespace(provenance=provenance, looks=["region", "clip"])) == untrained
