"""Tasks from files in their published layouts, and user-defined tasks.

Except for Visual-CoT (test_protocols) the real files are not available: each layout is written in small as its
publisher documents it, and read back.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from relook.errors import UserError
from relook.evaluate import BENCHMARKS, TASKS, Places, evaluate
from relook.evaluate.metrics import SCORERS
from relook.evaluate.results import PAPER
from relook.evaluate.tasks import find_task, find_tasks
from relook.looks import LOOKS
from relook.trace import Answer, Usage


def png(size=(40, 30), colour="red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if path.suffix == ".json" and "pope" not in path.name else ""
    path.write_text(text or "".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(name: str, folder: Path, **images: Path) -> list:
    return list(TASKS[name].items(None, 0, Places(folder, images)))


class Parrot:
    """Says what it was told to, whatever it is asked."""

    name, looks = "parrot", []
    processor = SimpleNamespace(grid_size=8, region_margin=0, region_of="whole", max_looks=1)

    def __init__(self, *answers: str):
        self.answers = list(answers)

    def ask_many(self, requests, **_):
        return [Answer(self.answers.pop(0), [], Usage(), question=r["question"]) for r in requests]


# ---- the paper's table


def test_every_column_of_the_papers_table_is_a_task():
    assert {PAPER["means_of"].get(name, name) for name in TASKS} >= set(PAPER["columns"])
    assert all(score in SCORERS for task in TASKS.values() for score in task.scores)


def test_a_published_region_split(tmp_path):
    """Question with its sentence, crops as boxes, the answer without its prefix, images found by set and name."""
    Image.new("RGB", (400, 400)).save(tmp_path / "1.jpg")
    trigger = LOOKS["region"].trigger
    turns = [f"<image>\nWho? {trigger}", "<|region_token_start|>...", "<image>", "Now answer the question.\nThe cat"]
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    there = "/root/data/gqa/images/1.jpg"
    write(
        tmp_path / "data/GQA_region_test_8cut.json", {"messages": messages, "images": [there, f"{there}_0,50,100,200"]}
    )
    (question,) = asked("gqa", tmp_path / "data", gqa=tmp_path)
    assert (question.text, question.answers, question.boxes) == (f"Who? {trigger}", ("The cat",), ((0, 50, 100, 200),))
    assert question.image == str(tmp_path / "1.jpg")


def test_the_published_split_comes_before_what_it_was_made_of(tmp_path):
    messages = [{"role": "user", "content": "<image>\nA?"}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "CUB_Birds_action_test.json", {"messages": messages, "images": ["CUB_200_2011/x.jpg"]})
    box = "Please provide the bounding box coordinate of the region that can help you answer the question better."
    values = (f"<image>\nOld? {box}", "[0.1, 0.1, 0.2, 0.2]", "<image>", "no")
    talk = [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]
    write(tmp_path / "cub.json", {"image": ["cub/x.jpg", "cub/x.jpg###[1, 1, 2, 2]"], "conversations": talk})
    assert [q.text for q in asked("cub", tmp_path)] == ["A?"]
    (tmp_path / "CUB_Birds_action_test.json").unlink()
    assert [q.text for q in asked("cub", tmp_path)] == [f"Old? {LOOKS['clip'].trigger}"]  # an action split asks so


def test_an_item_that_is_no_conversation_is_said(tmp_path):
    write(tmp_path / "VSR_region_test.json", {"messages": [{"role": "user", "content": "A?"}], "images": []})
    with pytest.raises(UserError, match=r"VSR_region_test.json:1.*question, an answer and an image"):
        asked("vsr", tmp_path)


# ---- POPE


def pope(folder: Path, kind: str) -> None:
    name = "COCO_val2014_000000000042.jpg"
    rows = [{"question_id": i, "image": name, "text": f"Is there a {t}?", "label": a} for i, (t, a) in enumerate(PAIRS)]
    write(folder / f"coco_pope_{kind}.json", *rows)


PAIRS = (("dog", "yes"), ("cat", "no"), ("cup", "yes"), ("car", "no"))


def test_pope_is_counted_over_its_split(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "000000000042.jpg")  # COCO's name of 2017
    pope(tmp_path / "data", "random")
    places = Places(tmp_path / "data", {"coco": tmp_path})
    run = evaluate(Parrot("Yes, there is.", "Yes", "No.", "There is no car"), ["pope-random"], ["none"], places=places)
    measures = run.result("pope-random", "none").measures
    figures = {name: measures[name].mean for name in ("yes_no", "yes_precision", "yes_recall", "yes_f1", "yes_ratio")}
    assert figures == dict.fromkeys(figures, 0.5)
    assert "yes F1 %" in str(run) and "exact %" not in str(run)


def test_pope_is_all_its_files_by_kind(tmp_path):
    for kind in ("random", "adversarial"):
        pope(tmp_path, kind)
    assert [q.field for q in asked("pope", tmp_path)] == ["adversarial"] * 4 + ["random"] * 4
    assert asked("pope-adversarial", tmp_path)[0].image.endswith("COCO_val2014_000000000042.jpg")
    with pytest.raises(UserError, match=r"coco_pope_popular.json.*RUCAIBox"):
        asked("pope-popular", tmp_path)


# ---- multiple choice

VSTAR = {"image": "direct_attributes/sa_1.jpg", "category": "direct_attributes", "label": "B", "question_id": "0",
         "text": "What is the glove made of?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
                 "Answer with the option's letter from the given choices directly."}  # fmt: skip


def test_vstar_with_its_boxes(tmp_path):
    folder = tmp_path / "data/vstar_bench"
    write(folder / "test_questions.jsonl", VSTAR, {**VSTAR, "image": "relative_position/sa_2.jpg"})
    (folder / "direct_attributes").mkdir()
    Image.new("RGB", (2000, 1500)).save(folder / "direct_attributes/sa_1.jpg")
    note = {"target_object": ["glove"], "bbox": [[564, 142, 155, 157]], "question": "What is the glove made of?"}
    (folder / "direct_attributes/sa_1.json").write_text(json.dumps(note))
    first, second = asked("vstar", tmp_path / "data")
    assert first.answers == ("B", "cotton") and first.boxes == ((564, 142, 719, 299),) and second.boxes == ()
    assert Path(first.image).is_file() and first.field == "direct_attributes" and first.text == VSTAR["text"]
    run = evaluate(Parrot("(B) cotton"), ["vstar"], ["none"], places=Places(tmp_path / "data"))
    result = run.result("vstar", "none")
    assert result.measures["choice"].mean == 1 and (result.answered, result.failed) == (1, 1)


HR = {"index": 0, "question": "What number is on the bus?", "answer": "C", "category": "single", "A": "1", "B": "2",
      "C": "3", "D": "4", "cycle_category": "3", "image": base64.b64encode(png((400, 300))).decode()}  # fmt: skip


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_hr_bench_in_both_its_forms(tmp_path, kind):
    path = tmp_path / f"hr_bench_4k.{kind}"
    if kind == "tsv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, HR, delimiter="\t")
            table.writeheader()
            table.writerow(HR)
    else:
        import pyarrow as arrow
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist([HR] * 20), path)
    questions = asked("hr-bench-4k", tmp_path)
    assert len(questions) == (1 if kind == "tsv" else 20)
    question = questions[0]
    assert question.text.splitlines() == [
        HR["question"],
        "A. 1",
        "B. 2",
        "C. 3",
        "D. 4",
        "Answer the option letter directly.",
    ]
    assert (question.answers, question.field, question.image.size) == (("C", "3"), "single", (400, 300))
    run = evaluate(Parrot("C."), ["hr-bench-4k"], ["none"], n=1, places=Places(tmp_path))
    assert run.result("hr-bench-4k", "none").measures["choice"].mean == 1


def test_hr_bench_names_the_row_of_a_corrupt_image(tmp_path):
    with (tmp_path / "hr_bench_8k.tsv").open("w", newline="") as file:
        table = csv.DictWriter(file, HR, delimiter="\t")
        table.writeheader()
        table.writerow({**HR, "image": "???"})
    with pytest.raises(UserError, match=r"hr_bench_8k.tsv: row 1: 'image' is no base64"):
        asked("hr-bench-8k", tmp_path)


def cv_row(index: int, source: str, **more) -> dict:
    return {"idx": index, "type": "2D", "task": "Count", "question": "How many?", "choices": ["3", "2"],
            "answer": "(B)", "prompt": "How many? Select from the following choices.\n(A) 3\n(B) 2", "source": source,
            "filename": f"img/2D/count/{index}.png", **more}  # fmt: skip


def test_cv_bench_as_json_lines_is_weighed_by_source(tmp_path):
    for index in range(4):
        (tmp_path / "img/2D/count").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"img/2D/count/{index}.png").write_bytes(png())
    write(tmp_path / "test_2d.jsonl", cv_row(0, "ADE20K"), cv_row(1, "ADE20K"), cv_row(2, "COCO"))
    write(tmp_path / "test_3d.jsonl", cv_row(3, "Omni3D"))
    run = evaluate(Parrot("(B)", "A", "B", "2"), ["cv-bench"], ["none"], places=Places(tmp_path))
    measures = run.result("cv-bench", "none").measures
    assert measures["choice"].mean == 0.75 and measures["cv_bench"].mean == ((0.5 + 1) / 2 + 1) / 2
    assert "CV-Bench %" in str(run)


def test_cv_bench_as_parquet_brings_its_images(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    row = cv_row(0, "COCO", image={"bytes": png((20, 10)), "path": "0.png"})
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "test_2d.parquet")
    (question,) = asked("cv-bench", tmp_path)
    assert question.image.size == (20, 10) and question.answers == ("B", "2")
    assert question.text.endswith("(B) 2\nAnswer with the option's letter from the given choices directly.")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_states_its_source(name, tmp_path):
    for folder, words in ((None, "--data"), (tmp_path, "there is no")):
        with pytest.raises(UserError, match=words) as error:
            asked(name, folder)
        assert BENCHMARKS[name].questions.source.split(" ")[0] in str(error.value)


# ---- own tasks


@pytest.fixture
def own(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    write(tmp_path / "q.jsonl", {"image": "a.png", "question": "How much?", "answer": "RM 9.00"})
    return tmp_path


def test_a_user_defined_task_is_one_line(own):
    (own / "own.yaml").write_text("prices: {questions: q.jsonl, scores: [exact, amount]}\n")
    run = evaluate(Parrot("9.00"), [str(own / "own.yaml")], ["none"])
    measures = run.result("prices", "none").measures
    assert (measures["exact"].mean, measures["amount"].mean) == (0, 1) and "anls" not in measures
    assert run.run["scores"] == {"prices": ["exact", "amount"]}


def test_several_tasks_in_one_file(own):
    (own / "own.yaml").write_text(
        "a: {questions: q.jsonl}\nb: {questions: q.jsonl, scores: [yes_f1], n: 1, about: B}\n"
    )
    first, second = find_tasks([str(own / "own.yaml")])
    assert (first.name, first.scores) == ("a", ("exact", "anls"))
    assert (second.scores, second.usual, second.about) == (("yes_no",), 1, "B")
    with pytest.raises(UserError, match="holds 2 tasks"):
        find_task(str(own / "own.yaml"))
    with pytest.raises(UserError, match="same name"):
        find_tasks([str(own / "own.yaml"), str(write(own / "a.jsonl", {}))])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("t: {question: q.jsonl}", "unknown key 'question'; did you mean 'questions'?"),
        ("t: {questions: q.jsonl, scores: [anlss]}", "score 'anlss' is unknown; did you mean 'anls'?"),
        ("t: {questions: q.jsonl, scores: [zzz]}", "expected some of exact, anls"),
        ("t: {questions: q.jsonl, n: 0}", "n: Input should be greater"),
        ("t: {questions: gone.jsonl}", "there is no file"),
        ("t: {scores: [exact]}", "questions: Field required"),
        ("t: q.jsonl", "expected {questions: FILE"),
        ("- t", "holds no tasks"),
        ("t: {", "is not valid YAML"),
    ],
)
def test_errors_of_user_defined_tasks_are_reported(own, line, words):
    (own / "own.yaml").write_text(line)
    with pytest.raises(UserError) as error:
        find_tasks([str(own / "own.yaml")])
    assert words in str(error.value) and "own.yaml" in str(error.value)
