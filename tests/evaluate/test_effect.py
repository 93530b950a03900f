"""Whether looks mattered: numbers counted by hand, and the files that hold them."""

from __future__ import annotations

import json

import pytest
from support.hand_made_records import record, save

from relook.errors import UserError
from relook.evaluate import collect, effects, read_folder
from relook.evaluate.effect import OUTCOMES, VERDICTS, side_seen
from relook.evaluate.report.effect_files import matter_json, matter_md, matter_text, write_matter

TAKEN = {"kind": "region", "cells": [0, 0, 1, 1], "box": [0, 0, 9, 9], "problem": None}
BROKEN = {**TAKEN, "cells": None, "box": None, "problem": "cut off"}


def row(look: str, rights: str, says: str = "", looked: str = "", **changes) -> list[dict]:
    """Records of a look: "10-" is right, wrong, failed; `says` a letter an answer; `looked` 1, 0 or x (malformed)."""
    found = []
    for i, right in enumerate(rights):
        kind = (looked or ("0" if look == "none" else "1") * len(rights))[i]
        answer = says[i] if says else ("right" if right == "1" else f"wrong {look}")
        own = {"answer": answer, "looks": {"1": [TAKEN], "0": [], "x": [BROKEN]}[kind], **changes}
        found.append(record(i, None if right == "-" else float(right), look=look, **(own if right != "-" else {})))
    return found


def effect(tmp_path, *rows: list[dict], **run):
    (found,) = effects(read_folder(save(tmp_path / "run", [each for r in rows for each in r], **run)))
    return found


def test_questions_divide_into_five(tmp_path):
    """Needed 3, idle 2, harmful 1, useless 2, no look 2 (one of them malformed), and one that failed."""
    found = effect(tmp_path, row("auto", "11111000110", looked="111111110x1"), row("none", "0001110010-"))
    shares = {name: found.outcomes[name].mean for name in OUTCOMES}
    assert shares == {"needed": 0.3, "idle": 0.2, "harmful": 0.1, "useless": 0.2, "no look": 0.2}
    assert {value.n for value in found.outcomes.values()} == {10}
    none = found.row("none").against
    assert (none.a, none.b, none.n, none.only_a, none.only_b) == ("auto", "none", 10, 4, 1)
    assert none.gain.mean == pytest.approx(0.3) and none.gain.low < 0.3 < none.gain.high
    auto = found.row("auto")
    assert (auto.answered, auto.looked.mean, auto.malformed.mean) == (11, 9 / 11, 1 / 11)
    assert auto.against is None and auto.changed is None and found.row("none").failed == 1


def test_an_answer_is_changed_where_it_looked_and_says_something_else(tmp_path):
    own = row("auto", "11111", says="abcde", looked="11110")
    found = effect(tmp_path, own, row("none", "00000"), row("other", "11001", says="aBxyz"))
    assert found.row("other").changed.mean == 2 / 4 and found.row("other").changed.n == 4  # case is forgiven
    assert found.row("other").against.gain.mean == pytest.approx(2 / 5)


def test_the_side_of_a_region_in_the_first_look():
    seen = {"boxes": [[80, 100, 320, 250]], "size": [640, 400], "seen": [320, 200]}
    assert side_seen(seen) == pytest.approx((120 * 75) ** 0.5)
    apart = {**seen, "boxes": [[0, 0, 10, 10], [630, 390, 700, 500]]}  # around both, inside the image
    assert side_seen(apart) == pytest.approx((320 * 200) ** 0.5)
    for lacking in ({"boxes": []}, {"size": None}, {"seen": None}):
        assert side_seen({**seen, **lacking}) is None


def test_sizes_are_in_bins_and_a_look_pays_up_to_one(tmp_path):
    """Six sides of 4, six of 20, one of 200 and one of 8, in a first look at half the size; 8 belongs to 8 to 16."""
    sides = [4] * 6 + [20] * 6 + [200, 8]
    sizes = [{"boxes": [[0, 0, 2 * s, 2 * s]], "size": [1000, 1000], "seen": [500, 500]} for s in sides]
    auto, none = row("auto", "1" * 13 + "0"), row("none", "0" * 12 + "10")
    for rows in (auto, none):
        for each, size in zip(rows, sizes, strict=True):
            each.update(size)
    found = effect(tmp_path, auto, none)
    spans = [(each.low, each.high, each.n) for each in found.bins]
    assert spans == [(0, 8, 6), (8, 16, 1), (16, 32, 6), (128, None, 1)]
    assert [each.with_look.mean for each in found.bins] == [1, 0, 1, 1]
    assert [each.without.mean for each in found.bins] == [0, 0, 0, 1]
    assert [each.gain.mean for each in found.bins] == [1, 0, 1, 0] and found.pays_to == 32
    assert [each.p for each in found.bins] == [2 / 64, 1, 2 / 64, 1]
    assert "under 32 pixels" in matter_text([found])
    never = effect(tmp_path / "never", none, [{**each, "look": "auto", "looks": [TAKEN]} for each in none])
    assert never.pays_to is None and "of no size" in matter_text([never])
    few = effect(tmp_path / "few", auto[:5], none[:5])
    assert few.bins[0].gain.low == 1 and few.pays_to is None  # five alike: an interval without width, and p = 1 / 16
    every = effect(tmp_path / "every", auto[6:12], none[6:12])
    assert every.pays_to == float("inf") and every.to_dict()["pays_to"] == "any"


def test_what_a_right_answer_costs(tmp_path):
    """Two of three are right, and all are paid for: 300 tokens and 60 read again, 24 patches, 0.75 s, 30 written."""
    usage = {"lm_positions": 100, "vision_patches": 8, "generated_tokens": 10, "cached_tokens": 20, "seconds": {}}
    rows = [*row("auto", "110", usage=usage), *row("none", "000", usage={**usage, "generated_tokens": None})]
    folder = read_folder(save(tmp_path / "run", rows))
    (plain,), (priced,) = effects(folder), effects(folder, (2.0, 10.0))
    cost = {name: value.mean for name, value in plain.row("auto").per_right.items()}
    assert cost == {"tokens": 180, "patches": 12, "seconds": 0.375}
    money = ((3 * (100 - 10 + 20)) * 2 + 30 * 10) / 1e6 / 2
    assert priced.row("auto").per_right["money"].mean == pytest.approx(money)
    assert priced.row("none").per_right["tokens"].mean is None and "money" not in priced.row("none").per_right
    assert "money / right" in matter_text([priced]) and "money" not in matter_text([plain])


def test_the_zooming_gap_is_between_the_annotated_crop_and_no_look(tmp_path):
    skipped = {**record(3, None, look="oracle"), "failed": None, "skipped": "nothing is annotated"}
    found = effect(tmp_path, row("auto", "1000"), row("none", "1000"), [*row("oracle", "111"), skipped])
    assert found.gap.gain.mean == pytest.approx(2 / 3) and found.gap.n == 3 and found.row("oracle").skipped == 1
    assert "Zooming gap (oracle - none): +66.7" in matter_text([found])
    assert "oracle: 0 failed and 1 skipped" in matter_text([found]) and "none: " not in matter_text([found])
    assert effect(tmp_path / "less", row("auto", "1"), row("none", "1")).gap is None


def test_an_unconditioned_look_is_compared_with_the_look(tmp_path):
    found = effect(tmp_path, row("auto", "10"), row("none", "10"), row("clip", "11"), row("clip-unconditioned", "00"))
    against = found.row("clip-unconditioned").against
    assert (against.a, against.gain.mean) == ("clip", 1.0) and found.row("clip").against.a == "auto"


CASES = {
    "no looks": (row("auto", "1" * 9, looked="0" * 9), row("none", "0" * 9)),
    "ignored": (
        row("auto", "101" * 3),
        row("none", "0" * 9),
        row("auto-blank", "101" * 3, says=""),
        row("other", "101" * 3),
    ),
    "needed": (row("auto", "1" * 9), row("none", "0" * 9), row("auto-blank", "0" * 9), row("other", "0" * 9)),
    "unseen": (row("auto", "1" * 9), row("none", "0" * 9), row("auto-blank", "0" * 9), row("other", "1" * 8 + "0")),
    "helps": (row("auto", "1" * 9), row("none", "0" * 9)),
    "harmful": (row("auto", "0" * 9), row("none", "1" * 9), row("other", "0" * 9)),
    "no better": (row("auto", "10" * 5), row("none", "01" * 5), row("other", "01" * 5)),
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_verdicts(tmp_path, verdict):
    rows = [[dict(each) for each in rows] for rows in CASES[verdict]]
    if verdict == "ignored":
        for rows_of in rows[2:]:
            for mine, own in zip(rows_of, rows[0], strict=True):
                mine["answer"] = own["answer"]
    found = effect(tmp_path, *rows)
    assert found.verdict == verdict and found.said[-1] == "." and "{" not in found.said
    if verdict == "ignored":
        assert "shown blank or of another question's image, not one of 9 answers" in found.said
        assert "33.3 % would" in found.said
    if verdict == "unseen":
        assert "over a crop of another question's image" in found.said  # the row that leaves least


def test_without_a_row_to_compare_with(tmp_path):
    folder = read_folder(save(tmp_path / "run", row("region", "11") + row("none", "00")))
    with pytest.raises(UserError, match="own was not asked under auto; whether a look mattered needs auto and none"):
        effects(folder)


def test_files(tmp_path):
    seen = {"boxes": [[0, 0, 30, 30]], "size": [100, 100], "seen": [50, 50]}
    rows = (row("auto", "1110", **seen), row("none", "0100", **seen), row("blurred", "0101", **seen))
    found = effect(tmp_path, *rows, model="m<b>")
    report = collect([tmp_path / "run"])
    written = write_matter([found], report, tmp_path / "out", 0, ["'once' leaves out further looks"])
    assert [path.name for path in written] == ["matter.md", "matter.json", "matter.png", "sizes.png", "report.html"]
    text = (tmp_path / "out/matter.md").read_text()
    assert text == matter_md([found], ["'once' leaves out further looks"])
    assert "| needed | right with, wrong without | 50.0 (0.0-100.0) |" in text and "m&lt;b>" in text
    assert (
        "| blurred | the model decides; its crops are shown with the pixels of the first look, enlarged | 4 |" in text
    )
    told = json.loads((tmp_path / "out/matter.json").read_text())
    assert told["effects"][0]["outcomes"]["needed"]["mean"] == 0.5 and told["runs"] == [{"model": "m<b>"}]
    assert told["effects"][0]["bins"][0]["low"] == 8 and told["not_run"] and told["size_edges"] == [8, 16, 32, 64, 128]
    assert told == json.loads(matter_json([found], [{"model": "m<b>"}], ["'once' leaves out further looks"]))
    for name in ("matter.png", "sizes.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out/report.html").read_text()
    assert "right with, wrong without" in page and 'id="effect"' in page and "m&lt;b&gt;" in page
    write_matter([found], report, tmp_path / "bare", None)
    assert not (tmp_path / "bare/report.html").exists()


def test_the_browser_filters_by_what_the_look_was(tmp_path, chromium):
    rows = (row("auto", "11001", looked="11110"), row("none", "01010"), row("blurred", "00000"))
    found = effect(tmp_path, *rows)
    write_matter([found], collect([tmp_path / "run"]), tmp_path / "out", 0)
    page = chromium.new_page()
    page.goto((tmp_path / "out/report.html").as_uri())
    for name, index in (("needed", 0), ("idle", 1), ("useless", 2), ("harmful", 3), ("no look", 4)):
        page.select_option("#effect", name)
        assert page.inner_text("#found") == "3 answers of 15"
        places = page.eval_on_selector_all("#list .from", "nodes => nodes.map(node => node.textContent)")
        assert all(place.endswith(f"· {index}") for place in places)
    page.close()
