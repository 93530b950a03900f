"""`build`: items from all sources and from questions with boxes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.source_files import (
    BOXED,
    ITEM,
    VISCOT,
    call,
    picture,
    refused,
    write,
)

from relook.data import BuildOptions, Question, build, build_item, read_items
from relook.data.build import build_items
from relook.data.remap import remap
from relook.data.rules import draw, merged
from relook.data.variants import variant
from relook.errors import UserError
from relook.looks import parse_calls
from relook.regions import iou, split_crop_suffix


def test_estimated_sizes_give_way_to_real_images_and_are_marked_where_there_are_none(tmp_path):
    source = write(tmp_path / "viscot.json", VISCOT)
    report = build(source, tmp_path / "blind.json")
    (item,) = read_items(tmp_path / "blind.json")
    picture(tmp_path / "any/7.jpg", (9, 9))
    write(tmp_path / "theirs.json", item.to_dict() | {"images": ["/x/gqa/7.jpg"]})
    assert remap(tmp_path / "theirs.json", tmp_path / "mine.json", {"gqa": tmp_path / "any"}).estimated == 1
    assert {name: item.extra[name] for name in ("estimated_size", "off_by")} == {
        "estimated_size": [392, 500],
        "off_by": [3, 2],
    }
    assert any("worked out from boxes" in what for what in report.counts)

    picture(tmp_path / "my/7.jpg", (391, 500))
    call("data", "build", source, tmp_path / "seen.json", "--images", f"gqa={tmp_path}/my")
    (item,) = read_items(tmp_path / "seen.json")
    assert "estimated_size" not in item.extra and item.images["images"][0] == "my/7.jpg"
    assert split_crop_suffix(item.images["images"][1])[1] == (195, 312, 244, 437)

    picture(tmp_path / "my/7.jpg", (500, 391))
    assert "another size than their boxes" in refused(
        "data", "build", source, tmp_path / "wrong.json", "--images", f"gqa={tmp_path}/my"
    )


def test_boxes_are_merged_clamped_and_answered_directly_when_whole():
    overlapping = BOXED | {"bboxs": [[0, 0, 100, 100], [600, 350, 640, 400], [90, 90, 200, 200], [195, 0, 250, 250]]}
    item = build_item(Question.from_dict(overlapping), BuildOptions(boxes="merge"))
    calls = parse_calls(item.messages[1].content)
    assert [call.cells for call in calls] == [(7, 7, 7, 7), (0, 0, 3, 4)]

    away = Question.from_dict(BOXED | {"bboxs": [[700, 500, 800, 600]]})
    assert build_item(away) is None
    (call_,) = parse_calls(build_item(away, BuildOptions(outside="clamp")).messages[1].content)
    assert call_.cells == (7, 7, 7, 7)
    assert len(build_item(away, BuildOptions(no_box="seg")).images["seg_images"]) == 1

    whole = Question.from_dict(BOXED | {"bboxs": [[10, 0, 640, 400]]})
    assert len(build_item(whole, BuildOptions(whole=0.9)).messages) == 2
    assert len(build_item(whole, BuildOptions(whole=0.99)).messages) == 4


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 15)] * 2), max_size=8))
def test_merged_boxes_cover_all_and_overlap_no_more(quads):
    boxes = [(x, y, x + width, y + height) for x, y, width, height in quads]
    out = merged(boxes)
    assert all(any(o[0] <= b[0] and o[1] <= b[1] and o[2] >= b[2] and o[3] >= b[3] for o in out) for b in boxes)
    assert all(iou(a, b) == 0 for i, a in enumerate(out) for b in out[:i])


def test_shares_of_looks_are_drawn_by_content_not_by_order(tmp_path):
    questions = [Question.from_dict(BOXED | {"question": f"Number {i}?"}) for i in range(400)]
    options = BuildOptions(look="region=0.5,clip=0.3,none=0.2")

    def looks(items):
        names = {0: "none", 1: "clip"}
        kinds = {}
        for item in items:
            kind = "region" if len(item.images["images"]) == 2 else names[len(item.images["clip_images"])]
            kinds[item.messages[0].content.split(" Identify")[0].split(" Require")[0]] = kind
        return kinds

    one, other = looks(build_items(questions, options)), looks(build_items(reversed(questions), options))
    assert one == other
    counts = [list(one.values()).count(name) for name in ("region", "clip", "none")]
    assert all(abs(count - share) < 40 for count, share in zip(counts, (200, 120, 80), strict=True))
    assert one != looks(build_items(questions, BuildOptions(look=options.look, seed=1)))
    for wrong in ("region=0.5", "region=x,none=0.5", "zoom=1"):
        assert "look" in refused(
            "data", "build", write(tmp_path / "q.jsonl", BOXED), tmp_path / "o.json", "--look", wrong
        )


def test_alignment_pairs_are_the_published_ones():
    question = Question("tall.png", "Render a clear and concise summary of the photo.", ("a dog in the park",))
    item = build_item(question, BuildOptions(look="detection", align=True)).to_dict()
    assert item["messages"] == [
        {"role": "user", "content": "<detection_image>\nRender a clear and concise summary of the photo."},
        {"role": "assistant", "content": "a dog in the park"},
    ]
    assert item["detection_images"] == ["tall.png"] and item["images"] == []
    with pytest.raises(UserError, match="a look that re-encodes"):
        BuildOptions(align=True)


def test_validation_and_training_share_no_image(tmp_path):
    rows = [BOXED | {"image": f"{i % 40}.jpg", "question": f"Number {i}?"} for i in range(200)]
    result = call("data", "build", write(tmp_path / "q.jsonl", *rows), tmp_path / "items.json", "--val", 0.2)
    train, val = (list(read_items(tmp_path / name)) for name in ("items.json", "items.val.json"))
    assert len(train) + len(val) == 200 and f"{len(val)} to validate" in result.stdout
    first = [{item.images["images"][0] for item in part} for part in (train, val)]
    assert not first[0] & first[1] and 3 <= len(first[1]) <= 15
    call("data", "build", tmp_path / "q.jsonl", tmp_path / "far/away.json", "--val", 0.2, "--look", "clip=0.5,none=0.5")
    call("data", "build", tmp_path / "q.jsonl", tmp_path / "near.json", "--val", 0.2, "--look", "clip=0.5,none=0.5")
    for part in ("", ".val"):  # what is drawn does not depend on where the items go
        far, near = (list(read_items(tmp_path / f"{name}{part}.json")) for name in ("far/away", "near"))
        assert [item.messages for item in far] == [item.messages for item in near]
    assert "give another share" in refused("data", "build", tmp_path / "q.jsonl", tmp_path / "o.json", "--val", 0.0001)
    assert not (tmp_path / "o.json").exists() and not (tmp_path / "o.val.json").exists()
    assert 0 <= draw("") < 1


def test_pages_of_one_document_are_in_one_part(tmp_path):
    rows = [BOXED | {"image": f"{i // 5}.pdf#page={i % 5 + 1}", "question": f"Number {i}?"} for i in range(100)]
    report = build(write(tmp_path / "q.jsonl", *rows), tmp_path / "items.json", val=0.3)
    parts = [read_items(tmp_path / name) for name in ("items.json", "items.val.json")]
    documents = [{item.images["images"][0].partition("#")[0] for item in part} for part in parts]
    assert report.items == 100 and not documents[0] & documents[1] and all(documents)
    assert len(documents[0] | documents[1]) == 20


def test_items_of_several_images_are_in_one_part_only_if_all_their_images_are(tmp_path):
    turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "No."}]
    pairs = [(f"{i % 30}.jpg", f"./{(i * 7 + 1) % 30}.jpg") for i in range(60)]
    rows = [{"images": list(pair), "conversations": turns} for pair in pairs]
    source = write(tmp_path / "q.jsonl", *rows)
    call("data", "build", source, tmp_path / "out/o.jsonl", "--val", 0.4, "--image-root", tmp_path)
    train, val = (list(read_items(tmp_path / "out" / name)) for name in ("o.jsonl", "o.val.jsonl"))
    images = [{ref.removeprefix("./") for item in part for ref in item.images["images"]} for part in (train, val)]
    assert not images[0] & images[1] and train and val
    report = build(source, tmp_path / "p.jsonl", val=0.4)
    (what,) = report.counts
    assert what == "items with images of both parts, left out"
    assert report.items + report.counts[what] == 60 and report.items > report.val > 0


def test_items_may_not_leave_the_given_root(tmp_path):
    bad = ITEM | {"images": ["../../etc/a b.jpg", "../../etc/a b.jpg_80,100,320,250"]}
    source = write(tmp_path / "items.jsonl", ITEM, bad)
    line = refused("data", "build", source, tmp_path / "o.json", "--image-root", tmp_path)
    assert f"{source}:2: image path '../../etc/a b.jpg" in line and "leaves the image root" in line
    assert list(tmp_path.iterdir()) == [source]
    picture(tmp_path / "mine/gqa/7.jpg")  # found by its name: nothing of the written path is followed
    found = ITEM | {"images": ["/root/gqa/7.jpg", "/root/gqa/7.jpg_80,100,320,250"]}
    call("data", "build", write(source, found), tmp_path / "o.json", "--image-root", tmp_path,
         "--images", f"gqa={tmp_path}/mine")  # fmt: skip


def test_published_items_take_another_encoder_lose_triggers_or_looks(tmp_path):
    question = Question.from_dict(BOXED)
    made = {look: build_item(question, BuildOptions(look=look)) for look in ("region", "clip", "detection", "none")}
    assert variant(made["clip"], "detection") == made["detection"]
    assert variant(made["clip"]) == made["clip"] and variant(made["region"], "seg") == made["region"]
    for look, item in made.items():
        assert variant(item, "none") == made["none"]
        assert variant(item, free_choice=True) == build_item(question, BuildOptions(look=look, free_choice=True))

    path = write(tmp_path / "items.json", made["clip"].to_dict(), made["region"].to_dict())
    call("data", "build", path, tmp_path / "o.jsonl", "--look", "seg", "--free-choice")
    seg, region = read_items(tmp_path / "o.jsonl")
    assert seg.images["seg_images"] == ("cot/gqa/7.jpg",) and len(parse_calls(region.messages[1].content)) == 1
    assert "feature" not in seg.messages[0].content


def test_the_question_may_come_first(tmp_path):
    call("data", "build", write(tmp_path / "q.jsonl", BOXED), tmp_path / "o.json", "--question-first", "--free-choice")
    (item,) = read_items(tmp_path / "o.json")
    assert item.messages[0].content == "Who?\n<image>"
