"""Sampling: the order of examples depends only on the position, not on source, workers or interruptions."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.item_sets import LOOKS, data, numbered, relative, said
from support.own_items import conversation, picture, write_items_of
from support.synthetic import SIZE, TINY

from relook.data.collate import EncodedDataset, group_by_length, item_length
from relook.data.dataset import SampledItems, open_items
from relook.data.images import split_ref
from relook.data.items import Item
from relook.data.order import interleaved
from relook.data.records import records
from relook.data.remap import convert
from relook.errors import UserError
from relook.model import new as tiny
from relook.train.recipe import Data, Recipe
from relook.train.runner import run


def told(source: SampledItems, positions) -> list[str]:
    return [said(source.item(*source.record(p))) for p in positions]


def mixed(folder: Path, **more) -> Data:
    paths = [numbered(folder, name, count) for name, count in (("a", 30), ("b", 9), ("c", 50))]
    sources = [{"path": relative(p), "weight": w} for p, w in zip(paths, (2.0, 1.0, 3.0), strict=True)]
    return data(sources=sources, **{"mix": "interleave_under", **more})


# -- orders


@pytest.mark.parametrize("over", [False, True], ids=["under", "over"])
def test_interleaving_draws_as_datasets_does(over) -> None:
    lengths, shares = [13, 40, 700], [0.1, 0.3, 0.6]
    parts = [datasets.Dataset.from_dict({"x": [f"{s}-{n}" for n in range(k)]}) for s, k in enumerate(lengths)]
    strategy = "all_exhausted" if over else "first_exhausted"
    theirs = datasets.interleave_datasets(parts, probabilities=shares, seed=3, stopping_strategy=strategy)["x"]
    which, before = interleaved(lengths, shares, over, np.random.default_rng(3))
    assert [f"{s}-{n % lengths[s]}" for s, n in zip(which, before, strict=True)] == list(theirs)


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_an_epoch_of_one_source_is_all_of_it_once_and_in_another_order_the_next_time(tmp_path, streaming) -> None:
    plan = data(path=relative(numbered(tmp_path, "a", 40)), streaming=streaming, buffer=16)
    epochs = [told(open_items(plan, 1), range(start, start + 40)) for start in (0, 40)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"a{n}" for n in range(40))
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert told(open_items(plan, 2), range(40)) != epochs[0]


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
@pytest.mark.parametrize("mix", ["concat", "interleave_under", "interleave_over"])
def test_mixes_of_sources(tmp_path, streaming, mix) -> None:
    plan = mixed(tmp_path, mix="interleave_under", streaming=streaming, buffer=8)
    if mix == "concat":
        plan = data(sources=[{"path": s.path} for s in plan.sources], streaming=streaming, buffer=8)
    plan = plan.model_copy(update={"mix": mix})
    length = len(open_items(plan, 1))
    first = told(open_items(plan, 1), range(length))
    counts = Counter(name[0] for name in first)
    if mix == "concat":
        assert counts == {"a": 30, "b": 9, "c": 50} and len(set(first)) == 89
    elif mix == "interleave_under":  # ends with the first that ran out; nothing twice
        assert len(set(first)) == length and any(counts[name] == n for name, n in (("a", 30), ("b", 9), ("c", 50)))
        assert counts["c"] > counts["a"] > counts["b"]
    else:  # ends when the last ran out: everything at least once
        assert len(set(first)) == 89 and length > 89


def test_the_order_is_a_function_of_the_position(tmp_path) -> None:
    """From the start, from the middle (a run that goes on), every other batch (a worker), and backwards."""
    for streaming in (False, True):
        plan = mixed(tmp_path, streaming=streaming, buffer=8)
        straight = told(open_items(plan, 5), range(120))
        assert told(open_items(plan, 5), range(57, 120)) == straight[57:]
        worker = [p for p in range(120) if p // 4 % 2]
        assert told(open_items(plan, 5), worker) == [straight[p] for p in worker]
        one = open_items(plan, 5)
        assert told(one, [99, 98, 3, 99]) == [straight[p] for p in (99, 98, 3, 99)]


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_validation_items_are_never_trained_on(tmp_path, streaming) -> None:
    plan = data(path=relative(numbered(tmp_path, "a", 30)), streaming=streaming, buffer=8)
    source = open_items(plan, 1, validation=7)
    held = {said(item) for item in source.validation}
    assert len(held) == 7 and not held & set(told(source, range(60)))
    assert sorted(told(source, range(23)) + sorted(held)) == sorted(f"a{n}" for n in range(30))
    with pytest.raises(UserError, match=r"validation.items is 16 and would hold out most of the 30.*items=3"):
        open_items(plan, 1, validation=16)
    assert len(open_items(plan, 1, validation=15).validation) == 15


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_an_interleaved_source_goes_on_where_the_last_epoch_left_it(tmp_path, streaming) -> None:
    """Issue 24: 346 of 440 items were ever taught. Each source is gone through evenly: uses differ by one at most."""
    paths = [numbered(tmp_path, name, count) for name, count in (("a", 300), ("b", 100), ("c", 40))]
    sources = [{"path": relative(p), "weight": w} for p, w in zip(paths, (6, 3, 1), strict=True)]
    plan = data(sources=sources, mix="interleave_under", streaming=streaming, buffer=64)
    uses = Counter(told(open_items(plan, 1), range(4000)))
    assert len(uses) == 440
    for name, count in (("a", 300), ("b", 100), ("c", 40)):
        mine = [uses[f"{name}{n}"] for n in range(count)]
        assert max(mine) - min(mine) <= 1


def seen_by(folder: Path, name: str, images: list[str]) -> Path:
    """Items that show these images, whose answers are their numbers."""
    turns = lambda n: [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": f"{name}{n}"}]  # noqa: E731
    lines = (json.dumps({"messages": turns(n), "images": [image]}) for n, image in enumerate(images))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / f"{name}.jsonl"


def test_validation_is_held_out_by_image_as_asked_and_the_same_for_every_seed_and_way_of_reading(tmp_path) -> None:
    first = seen_by(tmp_path, "a", [f"{n % 8}.png" for n in range(24)])
    second = seen_by(tmp_path, "b", [f"../{tmp_path.name}/{n % 16}.png_0,0,9,{n + 1}" for n in range(16)])
    plan = data(sources=[{"path": relative(first)}, {"path": relative(second)}])
    kept = []
    for seed, streaming in ((1, False), (2, False), (1, True)):
        source = open_items(plan.model_copy(update={"streaming": streaming}), seed, validation=7)
        held, taught = list(source.validation), list(source)
        assert len(held) == 7
        shown = [{split_ref(item.images["images"][0])[0] for item in part} for part in (held, taught)]
        assert not shown[0] & shown[1] and shown[1]
        kept.append([said(item) for item in held])
    assert kept[0] == kept[1] == kept[2]
    again = open_items(data(path=relative(first)), 5, validation=3).validation  # another stage, one of the files
    assert {item.images["images"][0] for item in again} <= {item.images["images"][0] for item in held}
    alike = seen_by(tmp_path, "c", ["1.png"] * 10)
    with pytest.raises(UserError, match=r"validation.items is 3 and leaves nothing to learn from"):
        open_items(data(path=relative(alike)), 1, validation=3)


@pytest.mark.parametrize("spelling", ["absolute", "folder link", "file link", "unicode"])
def test_one_image_under_two_names_is_held_out_or_taught(tmp_path, spelling) -> None:
    names = [f"\u00e9{n}.png" for n in range(8)]
    for name in names:
        (tmp_path / name).write_bytes(b"")
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
    (tmp_path / "same").symlink_to(tmp_path)
    other = {
        "absolute": lambda name: str(tmp_path / name),
        "folder link": lambda name: f"same/{name}",
        "file link": lambda name: f"link-{name}",
        "unicode": lambda name: unicodedata.normalize("NFD", name),
    }[spelling]
    path = seen_by(tmp_path, "a", [*names, *map(other, names)])
    source = open_items(data(path=relative(path)), 1, validation=6)
    held, taught = ({said(item)[1:] for item in part} for part in (source.validation, source))  # 3 and 11 are one image
    assert len(held) == 6 and {int(n) % 8 for n in held}.isdisjoint({int(n) % 8 for n in taught})


@pytest.mark.parametrize("mix", ["concat", "interleave_under", "interleave_over"])
@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_a_small_source_beside_a_large_one_is_held_out_in_proportion(tmp_path, mix, streaming) -> None:
    sources = [{"path": relative(numbered(tmp_path, name, count))} for name, count in (("a", 50), ("c", 3))]
    for held in (0, 10, 20):
        source = open_items(data(sources=sources, mix=mix, streaming=streaming, buffer=8), 1, validation=held)
        assert len(source.validation) == held and len(told(source, range(60))) == 60


def test_the_entry_of_an_array_on_one_line_is_named(tmp_path) -> None:
    path = write_items_of(tmp_path / "items.json", LOOKS[:1], 3)
    for streaming in (False, True):
        source = open_items(data(path=relative(path), streaming=streaming, buffer=1), 1)
        places = sorted(Path(source.record(i)[1].where).name for i in range(3))
        assert places == [f"items.json:1, entry {n}" for n in (1, 2, 3)]


def test_a_stream_opens_no_image_and_makes_no_item_it_passes_over(tmp_path, monkeypatch) -> None:
    path = write_items_of(tmp_path / "items.json", ["clip"], 20)
    made, item = list[str](), Item.from_dict(conversation([], image="a.png"))
    monkeypatch.setattr(Item, "from_dict", lambda *a: made.append(a[1]) or item)
    monkeypatch.setattr(Image, "open", lambda *a, **k: made.append("image"))
    source = open_items(data(path=relative(path), streaming=True, buffer=4), 1)
    source.record(15)
    assert made == []
    source.item(*source.record(16))
    assert len(made) == 1 and made != ["image"]


def test_a_file_is_opened_once_for_all_that_an_item_shows_of_it(tmp_path, tiny_vlm, monkeypatch) -> None:
    """A page, a crop of it and a second look: one file; and the same tensors as from three."""
    processor = tiny_vlm(("region", "clip")).processor
    picture(1, (90, 70)).save(tmp_path / "page.png")
    shown = conversation(["region", "clip"], image="page.png")
    (tmp_path / "items.json").write_text(json.dumps([shown]))
    source = open_items(data(path=relative(tmp_path / "items.json")), 1)
    count, inner = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: count.append(a) or inner(*a, **k))
    row = EncodedDataset(source, processor)[0]
    assert len(count) == 1
    apart = processor.encode_item(shown, image_root=tmp_path)
    assert row["input_ids"] == apart["input_ids"]
    for name in ("pixel_values", "image_grid_thw", "clip_pixel_values"):
        assert torch.equal(row[name], apart[name])


# -- sources


def test_all_forms_of_a_set_give_the_same_items(tmp_path) -> None:
    """JSON, JSON lines, Parquet, and a saved dataset whose images are bytes; by number and from front to back."""
    array = write_items_of(tmp_path / "items.json", LOOKS[:2], 6)
    items = json.loads(array.read_text())
    lines = tmp_path / "items.jsonl"
    lines.write_text("".join(json.dumps(item) + "\n" for item in items))
    convert(array, tmp_path / "parquet", rows=4)
    saved = [{"messages": i["messages"], "images": i["images"], "clip_images": i["clip_images"]} for i in items]
    datasets.Dataset.from_list(saved).save_to_disk(tmp_path / "saved")
    for path in (array, lines, tmp_path / "parquet", tmp_path / "saved"):
        rows = records(path)
        assert len(rows) == 6
        rows = pickle.loads(pickle.dumps(rows))  # as a worker that is not forked gets it
        by_number, streamed = [rows[n].value for n in (3, 0, 5)], [row.value for row in rows]
        assert by_number == [streamed[n] for n in (3, 0, 5)]
        assert [value["messages"] for value in streamed] == [item["messages"] for item in items]
    source = SampledItems(data(path=relative(tmp_path / "saved"), image_root=relative(tmp_path)), 1)
    placed = source.item(0, source.records[0][0])
    assert Path(split_ref(placed.images["images"][0])[0]).exists()


def test_a_dataset_with_an_image_column_becomes_items_with_the_look_that_is_named(tmp_path) -> None:
    rows = {"picture": [picture(n) for n in range(3)], "query": ["What?"] * 3, "answers": [["cat", "a cat"]] * 3,
            "box": [[8, 6, 24, 18]] * 3}  # fmt: skip
    features = datasets.Features(
        picture=datasets.Image(), query=datasets.Value("string"), answers=datasets.List(datasets.Value("string")),
        box=datasets.List(datasets.Value("int32")),
    )  # fmt: skip
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "set")
    item = {}
    for look in ("region", "clip", "none"):
        plan = data(sources=[{"path": relative(tmp_path / "set"), "look": look}])
        source = open_items(plan, 1)
        item[look] = source.item(*source.record(0))
    assert len(source.records[0]) == 3
    assert "<|x_1|><|y_1|><|x_2|><|y_2|>" in item["region"].messages[1].content
    assert item["clip"].placeholder_counts()["clip_images"] == len(item["clip"].images["clip_images"]) == 1
    assert [turn.role for turn in item["none"].messages] == ["user", "assistant"] and said(item["none"]) == "cat"
    _, processor = tiny.build(TINY, seed=0)
    assert processor.encode_item(item["region"].to_dict())["pixel_values"].shape[0] > 0
    with pytest.raises(UserError, match="has no split 'dev'; its splits: train, test"):
        open_items(data(sources=[{"path": relative(tmp_path / "set"), "split": "dev"}]), 1)


def test_data_sections_of_recipes_are_validated(tmp_path) -> None:
    for raw, message in (
        ({"sources": [{"path": "a"}], "path": "b"}, "exactly one of path"),
        ({"sources": [{"path": "a", "weight": 2}]}, "weights need mix"),
        ({"sources": [{"path": "a", "look": "squint"}]}, "squint"),
        ({"path": "/etc/items.json"}, "absolute"),
        ({"path": "a", "mix": "shuffle"}, "interleave_under"),
    ):
        with pytest.raises(ValueError, match=message):
            data(**raw)
    with pytest.raises(UserError, match="no such file or folder"):
        open_items(data(path="nothing.json"), 1)


# -- lengths


@pytest.fixture(scope="module")
def built():
    return tiny.build(TINY, seed=0)


@pytest.mark.parametrize("looks", [[], ["region"], ["clip"], ["region", "clip"]], ids=str)
def test_lengths_are_computed_without_decoding_images(tmp_path, tiny_vlm, monkeypatch, looks) -> None:
    """The header's size is enough, a sideways photograph's too; compared with what encoding really makes."""
    processor = tiny_vlm(("region", "clip", "detection")).processor
    photo = picture(3, (90, 40))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=exif)
    photo.save(tmp_path / "plain.png")
    stream = io.BytesIO()
    photo.save(stream, "PNG")
    for shown in (str(tmp_path / "photo.jpg"), str(tmp_path / "plain.png"), Image.open(stream), picture(4, (33, 71))):
        item = Item.from_dict(conversation(looks, image=shown))
        expected = len(processor.encode_item(item.to_dict())["input_ids"])
        with monkeypatch.context() as patch:
            if isinstance(shown, str):
                patch.setattr(Image.Image, "load", None)
            assert item_length(processor, item) == expected


def test_length_grouped_batches_are_similar_random_and_complete() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(10, 500, 96)
    order = group_by_length(lengths, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(96))
    padding = lambda o: sum(8 * max(b) for b in lengths[o].reshape(-1, 8)) / lengths.sum() - 1  # noqa: E731
    assert padding(np.array(order)) < padding(np.arange(96)) / 5
    longest = [int(max(lengths[order[i : i + 8]])) for i in range(0, 96, 8)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["by number", "streamed"])
def test_grouping_keeps_every_example_and_the_position(tmp_path, built, streaming) -> None:
    items = [conversation(["region"], n, answer="7" * (1 + 13 * n % 40), image=f"{n % 3}.png") for n in range(24)]
    for n in range(3):
        picture(n).save(tmp_path / f"{n}.png")
    (tmp_path / "items.json").write_text(json.dumps(items))
    plan = data(path=relative(tmp_path / "items.json"), streaming=streaming, buffer=4)

    def lengths(indices, group):
        dataset = EncodedDataset(open_items(plan, 1), built[1], group=group, batch=4)
        return [len(dataset[i]["input_ids"]) for i in indices]

    plain, grouped = lengths(range(24), 0), lengths(range(24), 3)
    assert sorted(plain[:12]) == sorted(grouped[:12]) and sorted(plain) == sorted(grouped)
    spread = lambda found: sum(max(found[i : i + 4]) - min(found[i : i + 4]) for i in range(0, 24, 4))  # noqa: E731
    assert spread(grouped) < spread(plain) / 2
    assert lengths(range(14, 24), 3) == grouped[14:]


# -- runs


def own_recipe(**changes) -> Recipe:
    stage = {"name": "tune", "objective": "instruct", "samples": 16, "batch": 2, "lr": 1e-3,
             "options": {"max_length": 400, "group": 2, "pack": 300}}  # fmt: skip
    sources = [{"path": "a.json", "weight": 2}, {"path": "b.json", "weight": 1}]
    base = {
        "name": "own",
        "model": {"size": SIZE},
        "data": {"sources": sources, "mix": "interleave_over", "streaming": True, "buffer": 5, "max_broken": 0.5},
        "stages": [stage],
        "save_every": 2,
        "log_every": 1,
        "save_dtype": "float32",
    }
    return Recipe.model_validate(base | changes)


def two_sets(folder: Path) -> None:
    for name, looks in (("a", LOOKS[:1]), ("b", ["clip"])):
        write_items_of(folder / f"{name}.json", looks, 7)
    (folder / "a-2.png").write_bytes(b"no picture")


def same_run(ours: Path, theirs: Path) -> None:
    for name in ("final/model.safetensors", "stages/00-tune/left_out.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    losses = [[json.loads(line)["loss"] for line in (f / "log.jsonl").read_text().splitlines()] for f in (ours, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) >= 8


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    two_sets(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        run(own_recipe(), out="run")
    finally:
        os.chdir(here)
    return folder


def test_a_killed_stream_resumes_with_the_next_examples(straight, tmp_path, monkeypatch) -> None:
    """Packed, grouped, streamed from two sources, with an image that cannot be read; killed at step 6 of 8."""
    monkeypatch.chdir(straight)
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_sampling import own_recipe, run\n"
        "from relook.train.trainer import StageTrainer\n"
        "step = StageTrainer.training_step\n"
        "def fatal(self, *a, **k):\n"
        "    if self.state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "StageTrainer.training_step = fatal\n"
        "run(own_recipe(), out=sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "run/stages/00-tune/checkpoints/step-4").is_dir()
    run(own_recipe(), out=tmp_path / "run")
    same_run(tmp_path / "run", straight / "run")


def test_workers_draw_the_same_examples(straight, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(straight)
    run(own_recipe(workers=2), out=tmp_path / "run")
    same_run(tmp_path / "run", straight / "run")
