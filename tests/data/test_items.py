"""Items, builder, dataset and linter, compared with the published pipeline's recorded items."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import ROOT
from support.published_items import needs_pipeline, recorded_samples
from support.synthetic import Pages

from relook.data import (
    BuildOptions,
    BuildReport,
    Item,
    ItemsDataset,
    Question,
    build,
    build_item,
    check,
    from_page,
    read_items,
    read_questions,
    write_items,
)
from relook.data import reader as reader_module
from relook.data.images import place_image
from relook.data.reader import read_records
from relook.errors import RelookError, UserError
from relook.io import replacing
from relook.looks import parse_calls

RECEIPTS = ROOT / "../shared/data/receipts"
needs_receipts = pytest.mark.skipif(not RECEIPTS.is_dir(), reason="../shared/data/receipts is not there")


@pytest.fixture(scope="module")
def published() -> dict[str, dict]:
    return recorded_samples()


def line(**changes) -> dict:
    """A question line as people write them, in the size of wide.png."""
    base = {"image": "wide.png", "width": 640, "height": 400, "question": "What is the name of the company?"}
    return base | {"answer": "ACME corp.", "bboxs": [[100, 120, 300, 240]]} | changes


def write_lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- records: places, laziness, wrong input


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(
        st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.lists(st.text(), max_size=2), max_size=3),
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 1, 4]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_arrays_read_in_any_chunks_equal_json_loads(tmp_path_factory, values, indent, ascii_only, chunk):
    path = tmp_path_factory.mktemp("array") / "items.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if "\ud800" <= max(text) <= "\udfff":
        return  # lone surrogates are not UTF-8; the error is tested below
    before, reader_module.CHUNK = reader_module.CHUNK, chunk
    try:
        found = list(read_records(path))
    finally:
        reader_module.CHUNK = before
    assert [record.value for record in found] == values
    raw = path.read_bytes()
    for record in found:
        assert json.loads(raw[record.start : record.end].decode("utf-8", "surrogatepass")) == record.value
        assert record.line == raw[: record.start].count(b"\n") + 1


def test_json_lines_have_their_lines_and_blank_ones_are_skipped(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n  {"a": "é"}\n{"a": 3}', encoding="utf-8")
    assert [(r.value["a"], r.line) for r in read_records(path)] == [(1, 1), ("é", 3), (3, 4)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.jsonl", b'{"a": 1}\n{"a": \n', ":2: broken JSON"),
        ("latin1.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', ":2: byte 0xe9 is not UTF-8"),
        ("latin1.json", b'[{"a": 1},\n{"a":\n "caf\xe9"}]', ":3: byte 0xe9 is not UTF-8"),
        ("type.jsonl", b'{"a": 1}\n[1]\n', ":2: a list where an object"),
        ("type.json", b'[{"a": 1},\n 7]', ":2: an entry that starts with '7'"),
        ("cut.json", b'[{"a": 1},\n{"a": "x', ":2: broken JSON"),
        ("open.json", b'[{"a": 1}\n', "the end of the file where ','"),
        ("comma.json", b'[{"a": 1},\n]', ":2: an entry that starts with ']'"),
        ("after.json", b'[{"a": 1}]\n{}', ":2: '{' after the end of the array"),
        ("number.json", b"42", "starts with '4'"),
        # one line, as json.dump writes it: only the entry's number says where
        ("flat.json", b'[{"a": 1}, {"a": 2}, {"a": ]', ":1, entry 3: broken JSON"),
        ("flat8.json", b'[{"a": 1}, {"a": "caf\xe9"}]', ":1, entry 2: byte 0xe9 is not UTF-8"),
        ("flat7.json", b'[{"a": 1}, 7]', ":1, entry 2: an entry that starts with '7'"),
        ("flats.json", b'[{"a": 1}, {"a": 2} {"a": 3}]', ":1: '{' after entry 2 where ','"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_records(path))
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(read_records(tmp_path / "none.json"))
    with pytest.raises(UserError, match="is a folder"):
        list(read_records(tmp_path))


def test_nothing_half_written_is_left(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as file:
        file.write("half")
        raise RuntimeError
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


# ---- items


@needs_pipeline
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_published_items_survive_reading_and_writing(tmp_path, published, suffix):
    items = [Item.from_dict(sample["sample"]) for sample in published.values()]
    assert write_items(tmp_path / f"items{suffix}", items) == len(published)
    again = [item.to_dict() for item in read_items(tmp_path / f"items{suffix}")]
    assert again == [sample["sample"] for sample in published.values()]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "no 'messages'"),
        ({"messages": "hello"}, "'messages' is a str"),
        ({"messages": [{"role": "bot", "content": ""}]}, "role 'bot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0] has a int"),
        ({"messages": [{"role": "user", "content": "x"}], "images": "a.jpg"}, "'images' is a str"),
        ({"messages": [{"role": "user", "content": "x"}], "clip_images": [1]}, "clip_images[0] is a int"),
    ],
)
def test_wrong_items_name_file_line_and_place(tmp_path, data, words):
    path = write_lines(tmp_path / "items.jsonl", {"messages": [{"role": "user", "content": "x"}]}, data)
    with pytest.raises(UserError) as error:
        list(read_items(path))
    assert words in str(error.value) and f"{path}:2:" in str(error.value)


def test_items_of_an_array_on_one_line_are_told_apart(tmp_path):
    path = tmp_path / "items.json"
    good = {"messages": [{"role": "user", "content": "é"}]}
    path.write_text(json.dumps([good, good, {"messages": 3}, good], ensure_ascii=False))
    with pytest.raises(UserError, match=r"items.json:1, entry 3: 'messages' is a int"):
        list(read_items(path))
    dataset = ItemsDataset(path)
    assert dataset[0].messages == dataset[3].messages == dataset[-1].messages
    for number in (2, -2):
        with pytest.raises(UserError, match=r"items.json:1, entry 3: 'messages' is a int"):
            dataset[number]
    path.write_text(json.dumps([good, {"messages": 3}], indent=1))
    with pytest.raises(UserError, match=r"items.json:10: 'messages'"):
        list(read_items(path))


def test_paths_may_not_leave_a_given_root(tmp_path):
    assert place_image("a dir/a.jpg_0,0,8,8", tmp_path) == f"{tmp_path}/a dir/a.jpg_0,0,8,8"
    assert place_image("../a.jpg", tmp_path / "sub") == f"{tmp_path}/a.jpg"
    for path in ("../../etc/passwd", "/etc/passwd", "a/../../b.jpg"):
        with pytest.raises(UserError, match="leaves the image root"):
            place_image(path, tmp_path, strict=True)


# ---- builder


@needs_pipeline
def test_the_published_items_come_out_of_their_boxes(published):
    """Questions, boxes within the recorded regions, and the options each sample was made with give the same JSON."""
    who, cup = published["region"]["sample"], published["two_regions"]["sample"]
    question = Question.from_dict(line())
    assert build_item(question, BuildOptions(answer_prefix=True)).to_dict() == who

    edges = [[0, 0, 160, 100], [320, 200, 640, 400]]  # both boxes end exactly on cell edges, one on the image's border
    two = Question.from_dict(line(question="Is the cup left of the plate?", answer="yes", bboxs=edges))
    assert build_item(two, BuildOptions(margin=1)).to_dict() == cup  # this sample's crops are wider than its tokens

    bird = line(image="tall.png", question="What bird is this?", answer="A laysan albatross", width=90, height=210)
    assert (
        build_item(Question.from_dict(bird), BuildOptions(look="clip", answer_prefix=True)).to_dict()
        == published["clip"]["sample"]
    )
    many = line(question="How many?", answer="3")
    assert (
        build_item(Question.from_dict(many), BuildOptions(look="detection")).to_dict()
        == published["detection"]["sample"]
    )
    many["image"] = "small.png"
    assert build_item(Question.from_dict(many), BuildOptions(look="seg")).to_dict() == published["seg"]["sample"]
    scene = line(
        image="small.png",
        question="Describe the scene. Answer the question using a single word or phrase.",
        answer="snow — naïve café 東京",
    )
    assert build_item(Question.from_dict(scene), BuildOptions(look="none")).to_dict() == published["direct"]["sample"]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=st.integers(1, 700), height=st.integers(1, 700), grid=st.sampled_from([1, 4, 8, 13]))
def test_regions_hold_their_boxes_and_never_leave_grid_or_image(data, width, height, grid):
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = [x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))]
    margin = data.draw(st.integers(0, grid - 1))
    question = Question.from_dict(line(width=width, height=height, bboxs=[box]))
    item = build_item(question, BuildOptions(grid=grid, margin=margin))
    (call,) = parse_calls(item.messages[1].content, grid)
    assert call.problem is None and max(call.cells) < grid
    crop = [int(edge) for edge in item.images["images"][1].rsplit("_", 1)[1].split(",")]
    assert 0 <= crop[0] <= box[0] and box[2] <= crop[2] <= width
    assert 0 <= crop[1] <= box[1] and box[3] <= crop[3] <= height


def test_options_change_what_they_say():
    question = Question.from_dict(line(bboxs=[[100, 120, 300, 240], [90, 110, 310, 249], [600, 0, 640, 10]]))
    each = build_item(question)
    assert each.images["images"] == ("wide.png", "wide.png_80,100,320,250", "wide.png_560,0,640,50")
    assert each.messages[2].content == "Region 0: <image>\nRegion 1: <image>\n"
    union = build_item(question, BuildOptions(boxes="union"))
    assert union.images["images"] == ("wide.png", "wide.png_80,0,640,250")
    wide = build_item(question, BuildOptions(boxes="union", margin=1))
    assert wide.messages[1] == union.messages[1] and wide.images["images"][1] == "wide.png_0,0,640,300"
    free = build_item(question, BuildOptions(free_choice=True))
    assert free.messages[0].content == "<image>\nWhat is the name of the company?"
    assert free.messages[1:] == each.messages[1:]
    first = build_item(question, BuildOptions(question_first=True, look="none"))
    assert first.messages[0].content == "What is the name of the company?\n<image>"


def test_odd_boxes_are_mended_or_left_out_and_counted():
    report = BuildReport()
    swapped = Question("wide.png", "Who?", ("ACME",), ((300, 240, 100, 120),), (640, 400), where="q:1")
    over = Question.from_dict(line(bboxs=[[600, 390, 700, 500]]), "q:2")
    away = Question.from_dict(line(bboxs=[[700, 0, 800, 10]]), "q:3")
    assert build_item(swapped, None, report).images["images"][1] == "wide.png_80,100,320,250"
    assert build_item(over, None, report).images["images"][1] == "wide.png_560,350,640,400"
    assert build_item(away, None, report) is None
    assert sum(report.counts.values()) == 4 and report.examples["questions without a usable box"] == ["q:3"]
    assert len(build_item(away, BuildOptions(no_box="direct")).messages) == 2
    with pytest.raises(UserError, match="q:3: no usable box"):
        build_item(away, BuildOptions(no_box="error"))


def test_a_page_in_memory_becomes_an_item_with_its_crop():
    page = Pages(3).sample(0)
    item = build_item(from_page(page, 1), BuildOptions(free_choice=True))
    whole, (image, box) = item.images["images"]
    assert whole is image is page.image
    x1, y1, x2, y2 = page.qas[1].boxes[0]
    assert box[0] <= x1 < x2 <= box[2] and box[1] <= y1 < y2 <= box[3]
    assert item.messages[-1].content == page.qas[1].answer


def test_build_writes_paths_that_hold_from_the_new_place(tmp_path):
    (tmp_path / "in/img").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    Image.new("RGB", (640, 400)).save(tmp_path / "in/img/a b.png")
    source = write_lines(
        tmp_path / "in/qa.jsonl", line(image="img/a b.png", width=None, height=None), line(image="img/a b.png")
    )
    report = build(source, tmp_path / "out/items.json", answer_prefix=True)
    assert report.items == 2 and not report.counts
    items = list(ItemsDataset(tmp_path / "out/items.json"))
    assert items[0] == items[1] and Path(items[0].images["images"][0]).samefile(tmp_path / "in/img/a b.png")

    report = build(source, tmp_path / "out/rooted.jsonl", image_root=tmp_path / "in", limit=1)
    assert report.items == 1
    assert next(read_items(tmp_path / "out/rooted.jsonl")).images["images"][0] == "img/a b.png"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (line(width=320, height=200), "is 640 x 400, but width and height say 320 x 200"),
        (line(image="gone.png", width=None, height=None), "no image at"),
        (line(question=" "), "'question' is ' '"),
        (line(bboxs=[[1, 2, 3]]), "box [1, 2, 3]"),
        (line(bboxs=[[1, 2, float("inf"), 4]]), "expected [x1, y1, x2, y2]"),
        (line(width=-1), "positive whole numbers"),
        ({"question": "?"}, "no 'image' among its keys (question); expected one of image, "),
    ],
)
def test_wrong_lines_stop_the_build_with_file_and_line_and_leave_nothing(tmp_path, row, words):
    Image.new("RGB", (640, 400)).save(tmp_path / "wide.png")
    source = write_lines(tmp_path / "qa.jsonl", line(), row)
    with pytest.raises(UserError) as error:
        build(source, tmp_path / "items.json")
    assert f"{source}:2:" in str(error.value) and words in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qa.jsonl", "wide.png"]


def test_wrong_options_are_refused(tmp_path):
    source = write_lines(tmp_path / "qa.jsonl", line(bboxs=[]))
    for options, words in [
        ({"look": "zoom"}, "look is 'zoom'"),
        ({"colour": 1}, "'colour'"),
        ({"margin": 8}, "margin 8"),
    ]:
        with pytest.raises(UserError, match=words):
            build(source, tmp_path / "items.json", **options)
    with pytest.raises(UserError, match="no item came out"):
        build(source, tmp_path / "items.json")
    with pytest.raises(UserError, match="is the source itself"):
        build(source, source)


@pytest.mark.parametrize("options", [{}, {"val": 0.5}])
def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path, options):
    """A limit on the size of files stands in for the disk: the write itself fails, after a part was written."""
    rows = [line(image=f"{i}.png", question=f"Number {i}?") for i in range(200)]
    source = write_lines(tmp_path / "qa.jsonl", *rows)
    before = build(source, tmp_path / "items.json", limit=50, **options)
    left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RelookError, match=r"json: could not be written \(File too large\); make room") as error:
            build(source, tmp_path / "items.json", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.exit_code == 1 and before.items == 50
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == left


@needs_receipts
def test_real_receipts_build_without_a_fault(tmp_path):
    questions = list(read_questions(RECEIPTS / "val_qa.jsonl"))
    report = build(RECEIPTS / "val_qa.jsonl", tmp_path / "items.json")
    assert report.items == len(questions) == 234 and not report.counts
    assert check(tmp_path / "items.json").ok
    for question, item in zip(questions, ItemsDataset(tmp_path / "items.json"), strict=True):
        assert Path(item.images["images"][0]).samefile(question.image)


# ---- dataset


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_dataset_gives_any_item_in_any_order(tmp_path, suffix):
    rows = [{"messages": [{"role": "user", "content": f"é{'x' * i} {i}"}], "images": []} for i in range(30)]
    write_items(tmp_path / f"items{suffix}", (Item.from_dict(row) for row in rows))
    dataset = ItemsDataset(tmp_path / f"items{suffix}")
    order = list(range(30))
    random.Random(1).shuffle(order)
    assert [dataset[i].messages[0].content for i in order] == [rows[i]["messages"][0]["content"] for i in order]
    assert dataset[-1] == dataset[29] and len(dataset) == len(list(dataset)) == 30
    with pytest.raises(IndexError):
        dataset[30]


def test_dataset_refuses_paths_out_of_a_given_root_and_empty_files(tmp_path):
    bad = {"messages": [{"role": "user", "content": "<image>"}], "images": ["../../etc/a.png"]}
    path = write_lines(tmp_path / "items.jsonl", bad)
    with pytest.raises(UserError, match=r"items.jsonl:1: image path '../../etc/a.png' leaves"):
        ItemsDataset(path, image_root=tmp_path)[0]
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="holds no items"):
        ItemsDataset(tmp_path / "empty.json")


# ---- linter


def test_check_finds_each_fault_and_no_other(tmp_path):
    good = build_item(Question.from_dict(line())).to_dict()

    def spoiled(change) -> dict:
        item = json.loads(json.dumps(good))
        change(item)
        return item

    def x8(item):
        item["messages"][1]["content"] = item["messages"][1]["content"].replace("<|x_3|>", "<|x_8|>")

    faults = {
        "placeholder-count": lambda item: item["messages"][0].update(content="no image?"),
        "off-edge": x8,
        "role-order": lambda item: item["messages"].append({"role": "user", "content": "thanks"}),
        "empty-answer": lambda item: item["messages"][-1].update(content=" "),
        "crop-region": lambda item: item["images"].__setitem__(1, "wide.png_80,100,320,300"),
        "form": lambda item: item.pop("messages"),
    }
    path = write_lines(tmp_path / "items.jsonl", good, *[spoiled(change) for change in faults.values()])
    report = check(path, images=False)
    found = {(finding.rule, int(finding.where.rsplit(":", 1)[1])) for finding in report.findings}
    expected = {(rule, number) for number, rule in enumerate(faults, start=2)}
    assert found == expected | {("crop-region", 3)}  # the crop of the x_8 call ends at its old cell
    assert report.items == 7 and not report.ok and "1 role-order" in str(report)
    json.dumps(report.to_dict())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), width=st.integers(8, 900), height=st.integers(8, 900), margin=st.integers(0, 3))
def test_check_accepts_every_built_item(tmp_path_factory, data, width, height, margin):
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    question = Question.from_dict(line(width=width, height=height, bboxs=[[x1, y1, x1 + 1, y1 + 1]]))
    path = tmp_path_factory.mktemp("check") / "items.json"
    write_items(path, [build_item(question, BuildOptions(margin=margin))])
    assert set(check(path, images=False).counts) <= {"answer-room"}  # a pixel holds no name
