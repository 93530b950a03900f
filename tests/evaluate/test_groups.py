"""Results by groups of questions (`--by`): against counting by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from support.hand_made_records import call, record, save

from relook.errors import UserError
from relook.evaluate.groups import grouping
from relook.evaluate.report import collect, table_csv, table_md
from relook.evaluate.results import Evaluation, escaped

BY = "field,width<880"


def records(look: str, right, seed: int = 0) -> list[dict]:
    """40 questions on 20 images, even ones ("date") and odd ones ("total"); the images are 600 or 900 pixels wide."""
    drawn = np.random.default_rng(seed).random(40)
    sizes = [[600 if image % 4 else 900, 1280] for image in range(20)]
    return [
        record(i, float(drawn[i] < right(sizes[i // 2][0])), f"{i // 2}.png", look, size=sizes[i // 2])
        for i in range(40)
    ]


@pytest.fixture
def both() -> list[dict]:
    """As of a model whose second look helps where images are wide."""
    return [*records("region", lambda width: 0.7), *records("once", lambda width: 0.8 if width < 880 else 0.1, 1)]


def by_hand(found, look: str, field: str | None, wide: bool) -> list[float]:
    those = [each for each in found if each["look"] == look and (each["size"][0] >= 880) is wide]
    return [each["scores"]["exact"] for each in those if field in (None, each["field"])]


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ("field", "total"),
        ("width<880", "width < 880"),
        (" field , height < 1280.5", "total, height < 1280.5"),
        ("width<600", "width >= 600"),
        ("image,index", "7.png, 3"),
        ("index<3", "index >= 3"),
        ("located", None),  # it has none
    ],
)
def test_a_record_is_in_the_group_of_what_it_holds(by, name):
    assert grouping(by)(record(3, 1.0, "7.png", size=[600, 1280])) == name
    assert grouping("width<880")(record(3, 1.0)) is None  # of no known size


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("width>880", "is not understood; expected keys and bounds"),
        ("", "is not understood"),
        ("width<wide", "is not understood"),
        ("feild", "records have no 'feild'; "),
    ],
)
def test_what_is_no_group_is_said_before_any_work(tmp_path, by, words):
    with pytest.raises(UserError, match="by ") as error:
        grouping(by)
    assert words in str(error.value)
    folder = save(tmp_path / "run", records("none", lambda width: 0.5))
    assert words in call("report", folder, "--by", by, code=2).stderr
    said = call("evaluate", "-m", "cards-tiny", "--tasks", "no-task", "--by", by, code=2).stderr
    assert words in said and len(said.splitlines()) == 1


def test_what_a_run_prints_is_what_was_counted(both):
    evaluation = Evaluation.of({}, both, {"own": ["exact"]}, 0, [BY])
    text = str(evaluation)
    heading = next(line for line in text.splitlines() if line.startswith(f"own, exact % by {BY} (n)"))
    assert heading.split("  ")[1:] and heading.index("date, width < 880") < heading.index("total, width >= 880")
    for look in ("region", "once"):
        found = evaluation.result("own", look).groups[BY]
        for field in ("date", "total"):
            for wide in (False, True):
                name = f"{field}, width {'>=' if wide else '<'} 880"
                scores = by_hand(both, look, field, wide)
                exact = found[name]["exact"]
                assert (exact.mean, exact.n) == (pytest.approx(np.mean(scores)), len(scores))
                assert f"{100 * np.mean(scores):.1f} ({len(scores)})" in text
    json.dumps(evaluation.to_dict())


def test_a_difference_is_given_for_each_group_too(both):
    """Does the second look pay, and where: region - once, over all and by width."""
    evaluation = Evaluation.of({}, both, {"own": ["exact"]}, 0, ["width<880"])
    found = {each.group: each for each in evaluation.compared if (each.a, each.b) == ("region", "once")}
    assert [*found] == ["", "width < 880", "width >= 880"] and found[""].n == 40
    for wide, name in ((False, "width < 880"), (True, "width >= 880")):
        region, once = (by_hand(both, look, None, wide) for look in ("region", "once"))
        assert found[name].gain.mean == pytest.approx(np.mean(region) - np.mean(once)) and found[name].n == len(once)
        assert found[name].only_a == sum(a > b for a, b in zip(region, once, strict=True))
    assert "own, width >= 880: region - once" in str(evaluation)
    plain = Evaluation.of({}, both, {"own": ["exact"]}, 0).to_dict()
    assert all("group" not in each for each in plain["compared"]) and "groups" not in plain["results"][0]


def test_a_report_has_tables_and_differences_by_group(tmp_path: Path, both):
    save(tmp_path / "run", both)
    rows = [{"name": look, "title": look, "records": "run", "look": look} for look in ("region", "once")]
    config = {"title": "t", "rows": rows, "compare": [["region", "once"]], "by": ["width<880"]}
    (tmp_path / "rows.yaml").write_text(json.dumps(config))
    report = collect([tmp_path / "rows.yaml"], ["field"])
    assert report.by == ("width<880", "field")
    text = table_md(report)
    assert "own, exact match % by width<880:" in text and text.count("own, exact match % by field:") == 1
    lines = list(csv.DictReader(io.StringIO(table_csv(report))))
    for wide, name in ((False, "width < 880"), (True, "width >= 880")):
        region, once = (by_hand(both, look, None, wide) for look in ("region", "once"))
        (line,) = [each for each in lines if each["field"] == name and each["against"] and each["measure"] == "exact"]
        assert float(line["value"]) == pytest.approx(np.mean(region) - np.mean(once))
        (line,) = [
            each
            for each in lines
            if (each["field"], each["row"], each["against"], each["measure"]) == (name, "once", "", "exact")
        ]
        assert float(line["value"]) == pytest.approx(np.mean(once)) and int(line["n"]) == len(once)
        assert f"| region - once: {escaped(name)} |" in text
    printed = call("report", tmp_path / "run", "--by", "width<880", "--by", "field").stdout
    assert "by width<880:" in printed and "by field:" in printed
