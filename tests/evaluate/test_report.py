"""Reports on hand-made records: figures computed by hand or by another implementation, and readable output files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.hand_made_records import call, record, save

from relook.errors import UserError
from relook.evaluate import WRITERS, collect, keep, read_folder, write
from relook.evaluate.report import PAGE, table_csv, table_md
from relook.evaluate.report.figures import _matplotlib, fields_figure
from relook.evaluate.summary import compare, pool, summarize

FACTS = {"parameters": 1_500_000, "training": {"samples": 24_000, "seconds": 3600.4}}
YAML = """
title: By hand
tasks: [own]
rows:
  - {name: a, title: direct, records: "direct-s[0-9]*", look: none}
  - {name: c, title: looks, records: [look-s1, look-s2], look: region}
  - {name: d, title: never tried, records: clip-s1, look: clip}
  - {name: c none, title: wrong look, records: look-s1, look: seg}
compare: [[c, a], [d, a]]
"""


@pytest.fixture
def plan(tmp_path) -> Path:
    """Four questions about two pages, direct (one seed) and with a look (two seeds), and two rows that were not run."""
    pages = ["p", "p", "q", "q"]
    save(tmp_path / "direct-s1", [record(i, e, pages[i]) for i, e in enumerate((0, 0, 1, 0))], facts=FACTS)
    looks = {"looks": [{"kind": "region", "cells": [0, 0, 1, 1], "box": [0, 0, 9, 9], "problem": None}], "recall": 0.5}
    for seed, scores in (("1", (1, 0, 1, None)), ("2", (1, 1, 1, 0))):
        rows = [record(i, e, pages[i], "region", **(looks if e is not None else {})) for i, e in enumerate(scores)]
        save(tmp_path / f"look-s{seed}", rows, facts={**FACTS, "parameters": 2_000_000 + int(seed) * 100_000})
    (tmp_path / "arms.yaml").write_text(YAML)
    return tmp_path / "arms.yaml"


# ---- statistics


def test_seeds_are_averaged_within_a_question(plan):
    result = collect([plan]).row("c").results["own"]
    # questions 0 and 2 right in both seeds, 1 in one of two, 3 wrong in the one seed that answered
    assert result.measures["exact"].mean == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert result.measures["anls"].mean == pytest.approx((0.5 + 0.25 + 0.5 + 0) / 4)
    assert result.measures["recall"].mean == 0.5 and result.measures["looked"].mean == 1
    assert result.measures["lm_positions"].mean == 101.5 and result.measures["iou"].mean is None
    assert result.fields["date"]["exact"].mean == 1 and result.fields["total"]["exact"].mean == 0.25
    assert result.seeds == {
        "look-s1": pytest.approx({"exact": 2 / 3, "anls": 1 / 3}),
        "look-s2": {"exact": 0.75, "anls": 0.375},
    }
    assert (result.answered, result.failed, result.skipped, result.images) == (7, 1, 0, 2)
    # two pages: a resample is p twice (1 in 4), both (1 in 2) or q twice, with means 0.75, 0.625 and 0.5
    assert (result.measures["exact"].low, result.measures["exact"].high) == (0.5, 0.75)


def test_a_difference_is_taken_question_by_question(plan):
    (exact, anls) = collect([plan]).differences
    assert (exact.a, exact.b, exact.score, exact.n) == ("c", "a", "exact", 4)
    # page p: 1 - 0 and 0.5 - 0; page q: 1 - 1 and 0 - 0
    assert exact.gain.mean == 0.375 and anls.gain.mean == 0.1875
    assert (exact.gain.low, exact.gain.high) == (0.0, 0.75)


def test_questions_without_a_partner_are_left_out_of_a_difference():
    a = pool({"one": [record(0, 1), record(1, 1), record(2, None)]})
    b = pool({"two": [record(0, 0), record(2, 1), record(3, 1), record(1, 0, accepted=["another answer"])]})
    found = compare("own", "exact", ("a", a), ("b", b)).gain
    assert (found.mean, found.n) == (1, 1)


def test_the_paired_interval_comes_near_the_normal_one():
    rng = np.random.default_rng(1)
    hard = rng.random(400)
    one, other = (hard < 0.6).astype(float), (hard < 0.4).astype(float)  # what one misses the other misses too
    a, b = (pool({"x": [record(i, value) for i, value in enumerate(values)]}) for values in (one, other))
    found = compare("own", "exact", ("a", a), ("b", b)).gain
    half = 1.96 * np.std(one - other) / 20
    assert found.mean == pytest.approx(np.mean(one - other))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.01)


@settings(max_examples=25, deadline=None)
@given(
    scores=st.lists(st.lists(st.sampled_from([None, 0.0, 0.3, 1.0]), min_size=1, max_size=6), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_records_and_folders_changes_nothing(scores, order):
    """Also not the last bit: sums of floats are taken in one order."""
    folders = {
        f"s{seed}": [record(i, e, f"{i // 2}.png", where=f"/{seed}/{i}") for i, e in enumerate(values)]
        for seed, values in enumerate(scores)
    }
    names = list(folders)
    order.shuffle(names)
    shuffled = {name: order.sample(folders[name], len(folders[name])) for name in names}
    assert summarize("own", "none", shuffled) == summarize("own", "none", folders)


def test_shuffled_files_give_the_same_tables(plan):
    before = collect([plan])
    for file in plan.parent.glob("*/records.jsonl"):
        lines = file.read_text().splitlines()
        random.Random(0).shuffle(lines)
        file.write_text("\n".join(lines))
    after = collect([plan])
    assert table_md(after) == table_md(before) and table_csv(after) == table_csv(before)


# ---- folders


def test_kept_records_are_small_and_give_the_same_tables(plan, tmp_path):
    before = collect([plan])
    for folder in before.folders:
        keep(folder, tmp_path / "kept" / folder.name)
    (tmp_path / "kept/arms.yaml").write_text(plan.read_text())
    after = collect([tmp_path / "kept/arms.yaml"])
    assert table_md(after) == table_md(before)
    packed = tmp_path / "kept/look-s1/records.jsonl.gz"
    assert b"transcript" not in gzip.decompress(packed.read_bytes())
    first = packed.read_bytes()
    keep(read_folder(plan.parent / "look-s1"), packed.parent)
    assert packed.read_bytes() == first  # nothing changes in the repository where no record changed
    again = read_folder(packed.parent)
    keep(again, packed.parent)
    assert packed.read_bytes() == first and again.run["facts"]["parameters"] == 2_100_000


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda f: (f / "records.jsonl").unlink(), "no records.jsonl or records.jsonl.gz"),
        (lambda f: (f / "records.jsonl").write_text("{}\n"), "records.jsonl:1: a record without accepted"),
        (lambda f: (f / "records.jsonl").write_text("\n[1,\n"), "records.jsonl:2: broken JSON"),
        (lambda f: (f / "records.jsonl").write_bytes(b"\xff"), "cannot be read"),
        (
            lambda f: (f / "records.jsonl").rename(f / "records.jsonl.gz"),
            "records.jsonl.gz: cannot be read (Not a gzipped file",
        ),
        (lambda f: (f / "results.json").write_text("[]"), "not the results of an evaluation"),
        (lambda f: (f / "results.json").write_text('{"run": 3}'), "'run' is 3"),
        (
            lambda f: (f / "records.jsonl").write_text(2 * (json.dumps(record(0, 1)) + "\n")),
            "records.jsonl:2: question 0 of own under none is there twice",
        ),
    ],
)
def test_broken_folders_are_reported_with_file_and_line(tmp_path, break_it, words):
    folder = save(tmp_path / "one", [record(0, 1)])
    break_it(folder)
    with pytest.raises(UserError) as error:
        read_folder(folder)
    assert words in str(error.value) and str(folder) in str(error.value)


# ---- rows


def test_what_was_not_run_is_shown_so_and_has_no_numbers(plan):
    report = collect([plan])
    assert [row.name for row in report.run] == ["a", "c"]
    rows = list(csv.DictReader(io.StringIO(table_csv(report))))
    assert [(r["task"], r["measure"], r["value"]) for r in rows if r["row"] == "d"] == [("own", "not run", "")]
    text = table_md(report)
    assert "| d | never tried | - | not run |" in text and "| d - a | not run | not run | - |" in text
    assert "d was not run: no finished evaluation at clip-s1." in text
    assert "c none was not run: look-s1 has no look 'seg', only region." in text


def test_the_table_agrees_with_the_records(plan):
    text = table_md(collect([plan]))
    assert (
        "| c | looks | 4 | 2 (66.7-75.0) | 62.5 (50.0-75.0) | 31.2 (25.0-37.5) | 50.0 (50.0-50.0) | - | 100.0 | 102 |"
        " 0.25 | 2.10 M to 2.20 M | 24,000 | 3,600 |" in text
    )
    assert "| c - a | +37.5 (+0.0 to +75.0), p = 1.000 | +18.8 (+0.0 to +37.5), p = 1.000 | 4 |" in text
    assert "| c | looks | 100.0 (100.0-100.0) | 25.0 (0.0-50.0) |" in text  # date, total
    assert (
        "c, own: 7 answered, 1 failed, 0 skipped (the look does not apply); first failure: own.jsonl:4: out of" in text
    )


def test_the_long_form_holds_every_number(plan):
    rows = list(csv.DictReader(io.StringIO(table_csv(collect([plan])))))
    wanted = {"row": "c", "measure": "exact", "task": "own"}
    found = [r for r in rows if all(r[key] == value for key, value in wanted.items())]
    by = {(r["field"], r["folder"], r["against"]): float(r["value"]) for r in found}
    assert by == pytest.approx(
        {
            ("", "", ""): 0.625,
            ("date", "", ""): 1,
            ("total", "", ""): 0.25,
            ("", "look-s1", ""): 2 / 3,
            ("", "look-s2", ""): 0.75,
            ("", "", "a"): 0.375,
        }
    )
    facts = [(r["folder"], r["value"]) for r in rows if (r["row"], r["measure"]) == ("c", "parameters")]
    assert facts == [("look-s1", "2100000"), ("look-s2", "2200000")]


def test_facts_of_a_row_fill_what_old_results_lack(tmp_path):
    save(tmp_path / "old", [record(0, 1)])
    text = "title: t\nrows: [{name: a, title: a, records: old, look: none, facts: {samples: 12}}]"
    (tmp_path / "arms.yaml").write_text(text)
    facts = collect([tmp_path / "arms.yaml"]).row("a").facts
    assert facts == {"parameters": (), "samples": (12,), "train_seconds": ()}


def test_plain_folders_give_a_row_for_each_look(tmp_path):
    one = save(tmp_path / "one", [record(0, 1), record(0, 0, look="clip"), record(0, 0, look="auto")])
    other = save(tmp_path / "b/one", [record(0, 1, task="cards")])
    assert [row.name for row in collect([one]).rows] == ["auto", "none", "clip"]
    report = collect([one, other, one])
    assert [row.name for row in report.rows] == [f"{one} auto", f"{one} none", f"{one} clip", f"{other} none"]
    assert report.tasks == ("cards", "own")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("title: By hand", "titel: By hand"), "unknown key 'titel'; did you mean 'title'?"),
        (("records: clip-s1", "record: clip-s1"), "unknown key 'rows.d.record'; did you mean 'records'?"),
        (("name: d", "name: a"), "two rows have the same name"),
        (("[d, a]", "[z, a]"), "compare names a row 'z', and rows are a, c, d, c none"),
        (("records: clip-s1", "records: /clip-s1"), "'/clip-s1' is no path relative to this file"),
        (("look: clip}", "look: clip, facts: {speed: 1}}"), "'speed' is unknown; facts are parameters"),
        (("title: By hand", "title: ["), "is not valid YAML"),
        ((YAML, "- a"), "holds list"),
    ],
)
def test_wrong_files_of_rows_are_said_plainly(plan, change, words):
    plan.write_text(plan.read_text().replace(*change))
    with pytest.raises(UserError) as error:
        collect([plan])
    assert words in str(error.value) and str(plan) in str(error.value)


def test_wrong_sources_are_said_plainly(plan, tmp_path):
    with pytest.raises(UserError, match="nothing to report"):
        collect([])
    with pytest.raises(UserError, match="no such file or folder"):
        collect([tmp_path / "gone.yaml"])
    with pytest.raises(UserError, match="one YAML file alone, or folders only"):
        collect([plan, tmp_path])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/arms.yaml").write_text(YAML)
    with pytest.raises(UserError, match=r"no records for any row of 'By hand'.*no finished evaluation at direct-s"):
        collect([tmp_path / "other/arms.yaml"])


def test_region_coverage_is_reported_by_field(tmp_path):
    """Even questions are about a date: covered in full and by half; odd ones about a total: never."""
    covered = {0: 1.0, 1: 0.0, 2: 0.5, 3: 0.0}
    save(tmp_path / "looked", [record(i, 1, look="region", recall=r, iou=r / 10) for i, r in covered.items()])
    save(tmp_path / "plain", [record(i, 1) for i in covered])
    text = table_md(collect(sorted(tmp_path.iterdir())))
    below = text.split("own, region recall % by field:")[1].split("own, IoU % by field:")
    for shares, cells in zip(
        below, ("75.0 (50.0-100.0) | 0.0 (0.0-0.0)", "7.5 (5.0-10.0) | 0.0 (0.0-0.0)"), strict=True
    ):
        (line,) = (line for line in shares.splitlines() if line.startswith(("| looked", "| plain")))
        assert cells in line


# ---- files


def test_every_file_is_written_and_the_pictures_open(plan, tmp_path):
    paths = write(collect([plan]), tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert sorted(path.name for path in paths) == written == sorted([*WRITERS, PAGE])
    for name in ("cost.png", "fields.png"):
        image = Image.open(tmp_path / "out" / name).convert("RGB")
        assert min(image.size) > 400 and len(image.getcolors(1 << 20)) > 50


def test_one_task_without_fields_is_drawn_too(tmp_path):
    folder = save(tmp_path / "one", [record(0, 0, field=None)])
    assert len(write(collect([folder]), tmp_path / "out", images=None)) == len(WRITERS)


def test_without_matplotlib_nothing_is_written_and_the_extra_is_named(plan, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"relook\[eval\]"):
        write(collect([plan]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rows", "fields"), [(2, 12), (10, 12), (1, 30), (10, 2)])
def test_names_of_fields_and_points_do_not_run_into_each_other(tmp_path, rows, fields):
    name = "a field of $some_ length {}".format
    for row in range(rows):
        save(tmp_path / f"row-{row}", [record(i, i % 2, field=name(i % fields)) for i in range(2 * fields)])
    with _matplotlib():
        figure = fields_figure(collect(sorted(tmp_path.glob("row-*"))))
        figure.draw_without_rendering()
    (panel,) = figure.axes
    boxes = [label.get_window_extent() for label in panel.get_yticklabels()]
    assert len(boxes) == fields and all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    marked = [line for line in panel.lines if line.get_marker() not in ("None", "")]
    points = sorted(panel.transData.transform((0, line.get_ydata()[0]))[1] for line in marked)
    assert len(points) == rows * fields and min(b - a for a, b in pairwise(points)) >= 5.5 * 150 / 72


def test_a_judges_score_is_a_column_and_what_it_left_out_a_note(tmp_path):
    judged = [record(i, i % 2, scores={"exact": i % 2, "anls": 0.0} | ({"judge": 0.5} if i else {})) for i in range(4)]
    text = table_md(collect([save(tmp_path / "one", judged)]))
    assert "| exact match % | ANLS % | judge % | region recall % |" in text and "| 50.0 (50.0-50.0) |" in text
    assert "none, own: 1 answers have no judge score; its means leave them out." in text


# ---- the command


def test_the_command_prints_writes_and_keeps(plan, tmp_path):
    assert call("report", plan).stdout == table_md(collect([plan])) + "\n"
    lines = call("report", plan, "--out", tmp_path / "out", "--keep", tmp_path / "kept").stdout.splitlines()
    kept = [tmp_path / "kept" / name for name in ("direct-s1", "look-s1", "look-s2")]
    assert lines == [f"written: {path}" for path in [*(tmp_path / "out" / name for name in (*WRITERS, PAGE)), *kept]]
    assert (tmp_path / "out/table.md").read_text() == table_md(collect([plan]))
    assert "no records.jsonl" in call("report", tmp_path, code=2).stderr
    assert "kept over itself" in call("report", plan.parent / "look-s1", "--keep", plan.parent, code=2).stderr


def test_reports_load_neither_torch_nor_matplotlib_before_they_draw():
    code = "import relook.evaluate, sys; print(*{'torch', 'transformers', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr
