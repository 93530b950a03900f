"""`evaluate`: scores against hand-computed values and other implementations, and runs with a plain Python model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.synthetic import FIRST_SEED, PAGES, Pages

from relook.data import Question
from relook.errors import RelookError, UserError
from relook.evaluate import SETTINGS, TASKS, anls, evaluate, exact_match, find_task, region_overlap
from relook.evaluate.environment import model_facts
from relook.evaluate.settings import Case, annotated_cells, random_cells
from relook.regions import cells_to_box, crop
from relook.trace import Answer, Look, Turn, Usage

# ---- scores


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("9.30", ["9.30"], 1),
        ("  Sin  THYE\n& Company ", ["sin thye & company"], 1),
        ("9.30", ["9,30"], 0),
        ("b", ["a", "B"], 1),
        ("", ["a"], 0),
    ],
)
def test_exact_match_forgives_case_and_space_only(answer, accepted, score):
    assert exact_match(answer, accepted) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("28/02/2016", ["28/02/2016"], 1.0),
        ("28/02/2015", ["28/02/2016"], 0.9),  # one of ten
        ("abcd", ["abxy"], 0.0),  # 2 of 4 is a distance of 0.5: not under the threshold
        ("abcde", ["abcxy"], 0.6),  # 2 of 5
        ("kitten", ["sitting"], 1 - 3 / 7),  # the textbook example: three edits in seven
        ("", ["abc"], 0.0),
        ("TOTAL  5", ["zzz", "total 5"], 1.0),
    ],
)
def test_anls_by_hand(answer, accepted, score):
    assert anls(answer, accepted) == pytest.approx(score)


def edit_distance(a: str, b: str) -> int:
    """Wagner and Fischer's table, whole: an implementation apart from rapidfuzz."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0, :] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, j in np.ndindex(len(a), len(b)):
        table[i + 1, j + 1] = min(table[i, j + 1] + 1, table[i + 1, j] + 1, table[i, j] + (a[i] != b[j]))
    return int(table[-1, -1])


@settings(max_examples=100, deadline=None)
@given(
    answer=st.text("abc1", max_size=8),
    accepted=st.lists(st.text("abc1", min_size=1, max_size=8), min_size=1, max_size=3),
)
def test_anls_equals_a_table_of_edit_distances(answer, accepted):
    distances = [edit_distance(answer, each) / max(len(answer), len(each)) for each in accepted]
    assert anls(answer, accepted) == pytest.approx(max(1 - d if d < 0.5 else 0.0 for d in distances))


@settings(max_examples=100, deadline=None)
@given(
    looked=st.lists(st.tuples(*[st.integers(0, 20)] * 4), max_size=4),
    annotated=st.lists(st.tuples(*[st.integers(0, 20)] * 4), max_size=4),
)
def test_overlap_equals_counting_pixels(looked, annotated):
    seen, wanted = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    for boxes, mask in ((looked, seen), (annotated, wanted)):
        for x1, y1, x2, y2 in boxes:
            mask[y1:y2, x1:x2] = True
    overlap = region_overlap(looked, annotated)
    if not seen.any() or not wanted.any():
        assert overlap is None
    else:
        both, either = (seen & wanted).sum(), (seen | wanted).sum()
        assert overlap == pytest.approx((both / wanted.sum(), both / either))


# ---- a model made of plain Python


class Reader:
    """Stands in for a VLM on pages with codes: it sees the code if the region it looked at covers the card asked for.

    Left to itself (`auto`, `region`) it looks at the top left quarter; `fails_on` is a question index it chokes on.
    """

    name = "reader"
    looks = ["region", "clip"]

    class processor:
        grid_size, region_margin, region_of, max_looks = 8, 0, "whole", 1

    def __init__(self, truth: dict[str, tuple[str, tuple]], broken: str | None = None):
        self.truth, self.broken, self.batches = truth, broken, []

    def ask_many(self, pairs, **options):
        self.batches.append((len(pairs), options))
        return [self.answer(**pair) for pair in pairs]

    def answer(self, image, question, look="auto", region=None, max_looks=None):
        code, box = self.truth[question_key(image, question)]
        if self.broken and self.broken in question:
            raise ValueError("cannot read this one")
        looks = []
        if region is not None or look in ("auto", "region"):
            cells = region or (0, 0, 3, 3)
            seen, pixels = crop(image, cells, margin=0)
            looks.append(Look("region", cells, pixels, seen))
        elif look == "clip":
            looks.append(Look("clip", problem="cut off: <|clip_action_end|> is missing"))
        covered = (
            looks
            and looks[0].box
            and all(
                (
                    looks[0].box[0] <= box[0],
                    looks[0].box[1] <= box[1],
                    box[2] <= looks[0].box[2],
                    box[3] <= looks[0].box[3],
                )
            )
        )
        text = "Now answer the question.\n" + (code if covered else "???")
        usage = Usage(lm_positions=100 + 50 * len(looks), sequence_length=150)
        return Answer(text, looks, usage, [Turn("user", question)], question, image, grid=8)


def question_key(image, question) -> str:
    return f"{hash(image.tobytes())} {question}"


@pytest.fixture
def truth() -> dict:
    """Code and box of every question about the first 30 unseen pages of the task (seed 0)."""
    world = Pages(FIRST_SEED)
    found = {}
    for index in range(30):
        page = world.sample(index)
        for qa in page.qas:
            found[question_key(page.image, qa.question)] = (qa.answer, qa.boxes[0])
    return found


def test_arms_differ_as_what_they_show_does(truth, tmp_path):
    model = Reader(truth)
    run = evaluate(model, [PAGES], ["auto", "none", "clip", "oracle", "random"], n=30, batch=7, out=tmp_path / "run")
    measures = {arm: run.result("pages", arm).measures for arm in ("auto", "none", "clip", "oracle", "random")}

    assert measures["none"]["exact"].mean == 0 and measures["none"]["looked"].mean == 0
    assert measures["oracle"]["exact"].mean == 1 and measures["oracle"]["recall"].mean == 1
    assert measures["oracle"]["exact"].low == measures["oracle"]["exact"].high == 1
    assert measures["random"]["recall"].mean < 0.5 and measures["random"]["exact"].mean < 0.5
    assert measures["clip"]["malformed"].mean == 1 and measures["clip"]["looked"].mean == 0
    assert measures["clip"]["recall"].n == 0 and measures["clip"]["recall"].mean is None
    assert measures["auto"]["lm_positions"].mean == 150 and measures["none"]["lm_positions"].mean == 100
    assert run.result("pages", "auto").kinds == {"region": 30}
    assert {size for size, _ in model.batches} == {7, 2}

    records = [json.loads(row) for row in (tmp_path / "run/records.jsonl").read_text().splitlines()]
    assert len(records) == 150 and not (tmp_path / "run/records.jsonl.part").exists()
    assert sorted({r["index"] for r in records if r["look"] == "auto"}) == list(range(30))
    auto = [r for r in records if r["look"] == "auto"]
    assert sum(r["scores"]["exact"] for r in auto) / 30 == measures["auto"]["exact"].mean
    for record in auto:  # recall by hand: the quarter [0, 256) x [0, 256) against the card
        ((x1, y1, x2, y2),) = record["boxes"]
        inside = max(min(x2, 256) - x1, 0) * max(min(y2, 256) - y1, 0)
        assert record["recall"] == pytest.approx(inside / ((x2 - x1) * (y2 - y1)))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["run"]["model"] == "reader" and results["run"]["seed"] == 0 and len(results["results"]) == 5
    assert results["results"][0]["fields"].keys() == {r["field"] for r in records}


def test_the_same_seed_asks_the_same_and_another_does_not(truth):
    first, second = (evaluate(Reader(truth), [PAGES], ["random"], n=10, batch=size) for size in (10, 3))
    assert first.results[0].measures["recall"] == second.results[0].measures["recall"]
    pages = [[q.where for q in find_task(PAGES).items(3, seed)] for seed in (0, 1)]
    assert pages[0] != pages[1]


def test_a_failed_item_is_shown_and_never_scored(truth):
    run = evaluate(Reader(truth, broken="red"), [PAGES], ["oracle"], n=30, batch=8)
    result = run.results[0]
    assert 0 < result.failed < 30 and result.answered == 30 - result.failed and result.asked == 30
    assert result.measures["exact"].mean == 1.0 and result.measures["exact"].n == result.answered
    assert "ValueError: cannot read this one" in result.errors[0]
    assert f"{result.failed}" in str(run) and "failed: page" in str(run)


def test_a_run_without_one_answer_is_an_error(truth, tmp_path):
    with pytest.raises(RelookError, match=r"not one question was answered.*cannot read this one"):
        evaluate(Reader(truth, broken="e"), [PAGES], ["auto"], n=3, out=tmp_path)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "records.jsonl").exists()


def test_own_questions_from_a_file(tmp_path):
    """Fields, several accepted answers, a missing image (failed), a question without a box (no oracle: skipped)."""

    class Parrot(Reader):
        def answer(self, image, question, look="auto", region=None, max_looks=None):
            assert Path(image).is_file()
            return Answer(question.removeprefix("say "), [], Usage(), question=question)

    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "say yes", "answer": ["no", "YES"], "bboxs": [[0, 0, 10, 5]], "field": "f1"},
        {"image": "a.png", "question": "say hm", "answer": "mh", "bboxs": [[10, 5, 80, 40]], "field": "f2"},
        {"image": "gone.png", "question": "say a", "answer": "a", "bboxs": [[0, 0, 10, 5]]},
        {"image": "a.png", "question": "say b", "answer": "b"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluate(Parrot({}), [str(path)], ["none", "oracle"])
    none, oracle = run.results
    assert (none.task, none.answered, none.failed, none.skipped) == ("own", 3, 1, 0)
    assert none.errors[0].count("own.jsonl:") == 1  # the place once
    assert (oracle.answered, oracle.failed, oracle.skipped) == (2, 1, 1)
    assert none.measures["exact"].mean == pytest.approx(2 / 3)
    assert none.fields["f1"]["exact"].mean == 1 and none.fields["f2"]["exact"].mean == 0
    assert "own.jsonl:3: no image at" in none.errors[0]
    assert "f1" in str(run) and "100.0 (1)" in str(run)


# ---- arms


@settings(max_examples=100, deadline=None)
@given(data=st.data(), width=st.integers(1, 600), height=st.integers(1, 600), grid=st.sampled_from([1, 2, 8]))
def test_regions_of_arms_lie_on_the_grid_and_hold_what_they_should(data, width, height, grid):
    edges = [data.draw(st.integers(0, side)) for side in (width, height, width, height)]
    boxes = (tuple(edges),) if data.draw(st.booleans()) else ()
    case = Case(Question("a.png", "?", ("a",), boxes), (width, height), grid, np.random.default_rng(0))
    known, drawn = annotated_cells(case), random_cells(case)
    assert 0 <= drawn[0] <= drawn[2] < grid and 0 <= drawn[1] <= drawn[3] < grid
    if boxes and edges[0] < edges[2] and edges[1] < edges[3]:
        left, top, right, bottom = cells_to_box(known, (width, height), grid)
        assert left <= edges[0] and top <= edges[1] and edges[2] <= right and edges[3] <= bottom
        assert (known[2] - known[0], known[3] - known[1]) == (drawn[2] - drawn[0], drawn[3] - drawn[1])
    else:
        assert known is None


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tasks": ["cards2"]}, "'cards2' is neither a task (gqa,"),
        ({"tasks": []}, "no task was named"),
        ({"looks": ["zoom"]}, "look 'zoom' is unknown"),
        ({"looks": []}, "no look was named"),
        ({"looks": ["seg"]}, "'seg' needs a seg look, and this model has region, clip"),
        ({"n": 0}, "n=0 questions"),
        ({"batch": 0}, "batch=0"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' was given with a model that is loaded"),
    ],
)
def test_wrong_arguments_are_said_before_any_work(arguments, words):
    with pytest.raises(UserError) as error:
        evaluate(Reader({}), **{"tasks": [PAGES], "looks": ["auto"], **arguments})
    assert words in str(error.value)


def test_every_setting_and_task_has_a_description():
    assert all(arm.about for arm in SETTINGS.values()) and all(task.about for task in TASKS.values())


# ---- the real loop


def test_the_real_loop_goes_through_every_arm(tiny_vlm):
    """A random model: nothing is right, but every arm asks, looks and counts as its name says."""
    looks = ["auto", "none", "clip", "oracle", "random"]
    vlm = tiny_vlm(looks=("region", "clip"))
    run = evaluate(vlm, [PAGES], looks, n=2, batch=2, max_new_tokens=2)
    assert [result.answered for result in run.results] == [2] * 5, run.results[0].errors
    looked = {arm: run.result("pages", arm).measures["looked"].mean for arm in looks}
    assert looked["none"] == 0 and looked["oracle"] == looked["random"] == 1
    assert run.result("pages", "oracle").measures["recall"].mean == 1
    positions = {arm: run.result("pages", arm).measures["lm_positions"].mean for arm in looks}
    assert positions["oracle"] > positions["none"] > 0
    assert run.run["facts"]["parameters"] == sum(p.numel() for p in vlm.model.parameters())
    assert run.run["facts"]["dtype"] == "float32"
    assert run.run["machine"].keys() == {"processor", "cores", "threads"}


def test_results_state_how_the_model_was_trained():
    provenance = {"recipe": "own", "seed": 2, "samples": 10, "seconds": 3.5, "stages": [], "torch": "2"}

    class Trained:
        class model:
            class config:
                pass

            device = "cpu"
            parameters = staticmethod(tuple)

    Trained.model.config.provenance = provenance
    facts = model_facts(Trained())
    assert facts["training"] == {"recipe": "own", "seed": 2, "samples": 10, "seconds": 3.5}
    assert model_facts(Reader({})) == {}
