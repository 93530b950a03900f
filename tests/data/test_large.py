"""Large datasets: constant memory, shuffling, resumable Parquet conversion, and corrupt files."""

from __future__ import annotations

import gc
import importlib.util
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import ROOT
from typer.testing import CliRunner

from relook.cli import app
from relook.data import Item, ItemsDataset, build, read_items, write_items
from relook.data import reader as reader_module
from relook.data.check import check
from relook.data.dataset import ItemStream
from relook.data.order import windowed
from relook.data.reader import Unreadable, read_records, scan, write_records
from relook.data.remap import convert
from relook.data.stats import stats
from relook.errors import UserError

TOOL = ROOT / "tools" / "large_set.py"
TINY, SMALL, LARGE = 100, 2_000, 5_000


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[int, Path]:
    """The set that tools/large_set.py makes, at three sizes."""
    spec = importlib.util.spec_from_file_location("large_set", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    folder = tmp_path_factory.mktemp("large")
    return {n: tool.make(folder, n, padding=200, name=f"{n}.json") for n in (TINY, SMALL, LARGE)}


def peak(work: Callable[[], object]) -> int:
    """Most bytes that Python held while working, over what it held before."""
    gc.collect()
    tracemalloc.start()
    work()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held


def drain(stream) -> int:
    return sum(1 for _ in stream)


WORK: dict[str, tuple[Callable[[Path], object], int]] = {  # and the bytes that an item may cost
    "open": (ItemsDataset, 60),
    "build": (lambda path: build(path, Path(tempfile.mkdtemp(dir=path.parent), "o.json"), free_choice=True), 0),
    "check": (lambda path: check(path, images=False), 80),
    "stream": (lambda path: drain(ItemStream(path, buffer=200)), 0),
    "stats": (stats, 0),
    "convert": (lambda path: convert(path, tempfile.mkdtemp(dir=path.parent), rows=5000), 0),
}


@pytest.mark.parametrize("name", WORK)
def test_memory_does_not_grow_with_the_set(sets, name, monkeypatch):
    """2.5 times the items cost at most a few numbers more per item, and some batches (3,000 of these items are 2 MB of
    text, and 9 MB as objects)."""
    work, cost = WORK[name]
    monkeypatch.setattr(reader_module, "CHUNK", 1 << 16)  # else the small set is read in one piece
    work(sets[TINY])  # what is imported and cached once
    small, large = (peak(lambda n=n: work(sets[n])) for n in (SMALL, LARGE))
    assert large - small < cost * (LARGE - SMALL) + 1_200_000


def test_the_set_is_what_its_commands_say(sets):
    report = check(sets[LARGE])
    assert report.ok and report.items == LARGE and report.images == 64
    assert stats(sets[LARGE]).looks == {"region": LARGE // 2, "clip": LARGE // 4, "none": LARGE // 4}


# ---- streams


def test_a_stream_gives_every_item_once_in_an_order_of_its_seed(sets):
    def numbers(**options) -> list[str]:
        stream = ItemStream(sets[SMALL], buffer=options.pop("buffer", 300), seed=options.pop("seed", 0), **options)
        return [item.messages[-1].content for item in stream]

    first = numbers()
    assert first == numbers() and sorted(first, key=int) == [str(n) for n in range(SMALL)]
    assert first != numbers(seed=1) and numbers(buffer=1) == [str(n) for n in range(SMALL)]
    later = ItemStream(sets[SMALL], buffer=300)
    later.epoch = 1
    assert [item.messages[-1].content for item in later] != first
    parts = [numbers(part=(i, 3)) for i in range(3)]
    assert sorted([number for part in parts for number in part], key=int) == sorted(first, key=int)


def test_numbers_leave_their_place_by_a_window_and_no_more():
    orders = [windowed(5000, 500, np.random.default_rng(seed)) for seed in (3, 4)]
    for order in orders:
        moves = order - np.arange(5000)
        assert sorted(order) == list(range(5000)) and abs(moves).max() < 500 and (abs(moves) > 100).sum() > 2500
    starts = [{n for n in range(1, 5000) if order[:n].max() < n} for order in orders]
    assert not starts[0] & starts[1]  # windows begin elsewhere in another epoch


def test_stream_places_images_below_the_root_or_says_where_not(sets, tmp_path):
    first = next(iter(ItemStream(sets[SMALL], buffer=1)))
    assert Path(first.images["images"][0]).is_file()
    bad = {"messages": [{"role": "user", "content": "<image>"}], "images": ["../../etc/a b.png"]}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(UserError, match=r"items.jsonl:2: image path '../../etc/a b.png' leaves"):
        drain(ItemStream(path, tmp_path))
    for options in ({"buffer": 0}, {"part": (2, 2)}):
        with pytest.raises(UserError, match="expected a buffer"):
            ItemStream(path, **options)


# ---- Parquet


def test_parquet_holds_the_same_items(sets, tmp_path):
    done = convert(sets[SMALL], tmp_path / "far/parquet", rows=700)
    assert (done.items, done.files, done.before) == (SMALL, 3, 0)
    moved = list(ItemStream(tmp_path / "far/parquet", buffer=1))
    there = list(ItemStream(sets[SMALL], buffer=1))
    assert [item.messages for item in moved] == [item.messages for item in there]
    assert all(Path(a.images["images"][0]).samefile(b.images["images"][0]) for a, b in zip(moved, there, strict=True))
    report = check(tmp_path / "far/parquet")
    assert report.ok and report.items == SMALL and report.images == 64


def test_parquet_keeps_what_else_a_record_said(tmp_path):
    turns = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "東京"}]
    items = [{"messages": turns, "images": ["a b.png"], "field": "total", "boxes": [[1, 2]]}, {"messages": turns}]
    write_records(tmp_path / "items.json", items)
    convert(tmp_path / "items.json", tmp_path / "p", image_root=tmp_path)
    assert [Item.from_dict(row.value) for row in read_records(tmp_path / "p")] == [
        Item.from_dict(each) for each in items
    ]


def test_a_stopped_conversion_goes_on(sets, tmp_path):
    """Stopped in the third file: the first two stay, nothing half-written does; a rerun writes only what is missing."""
    target = tmp_path / "p"

    def stop(items: int) -> None:
        if items > 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sets[SMALL], target, rows=700, image_root=sets[SMALL].parent, progress=stop)
    assert sorted(path.name for path in target.iterdir()) == [
        "convert.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    stamps = [(target / f"part-0000{i}.parquet").stat().st_mtime_ns for i in (0, 1)]
    arguments = [
        "data",
        "convert",
        str(sets[SMALL]),
        str(target),
        "--rows",
        "700",
        "--image-root",
        str(sets[SMALL].parent),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "2000 items in 3 files, 2 of them there before" in result.output
    assert stamps == [(target / f"part-0000{i}.parquet").stat().st_mtime_ns for i in (0, 1)]
    known = [item.messages for item in read_items(sets[SMALL])]
    assert [Item.from_dict(row.value).messages for row in read_records(target)] == known
    assert "3 of them there before" in CliRunner().invoke(app, arguments).output


def test_conversions_do_not_mix(sets, tmp_path):
    convert(sets[SMALL], tmp_path / "p", rows=1000)
    for source, rows, words in ((sets[LARGE], 1000, "another source"), (sets[SMALL], 500, "other options")):
        with pytest.raises(UserError, match=words):
            convert(source, tmp_path / "p", rows=rows)
    (tmp_path / "p/part-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000.parquet is not there"):
        convert(sets[SMALL], tmp_path / "p", rows=1000)
    (tmp_path / "p/part-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file"):
        drain(read_records(tmp_path / "p"))
    out = {"messages": [{"role": "user", "content": "<image>"}], "images": ["../../etc/a.png"]}
    (tmp_path / "out.jsonl").write_text(json.dumps(out) + "\n")
    with pytest.raises(UserError, match=r"out.jsonl:1: image path '../../etc/a.png' leaves"):
        convert(tmp_path / "out.jsonl", tmp_path / "r", image_root=tmp_path)
    assert not list((tmp_path / "r").glob("*.parquet*"))
    (tmp_path / "bad.jsonl").write_text('{"messages": 1}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: 'messages'"):
        convert(tmp_path / "bad.jsonl", tmp_path / "q")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["convert.json"]


# ---- records that are broken in ways only other people's files are


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000], ids=["nested", "digits"])
def test_records_that_python_cannot_hold_are_named(tmp_path, suffix, value):
    path = tmp_path / f"items{suffix}"
    lines = ['{"a": 1}', f'{{"a": {value}}}']
    path.write_text("[\n" + ",\n".join(lines) + "\n]" if suffix == ".json" else "\n".join(lines))
    with pytest.raises(UserError, match=rf"items{suffix}:{3 if suffix == '.json' else 2}: not a record"):
        list(read_records(path))


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "LARGEST_RECORD", 1 << 20)
    path = tmp_path / "items.jsonl"
    path.write_text('{"a": "' + "x" * (3 << 20))
    with pytest.raises(UserError, match=r"items.jsonl:1: a line of over 1 MB"):
        list(read_records(path))


def test_half_a_surrogate_pair_is_written_as_it_was_read(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "\\ud83d é"}]}\n')
    write_items(tmp_path / "out.jsonl", read_items(path))
    assert list(read_items(tmp_path / "out.jsonl")) == list(read_items(path))
    with pytest.raises(UserError, match=r"items.jsonl:1: .*half a character"):
        convert(path, tmp_path / "parquet")


def test_broken_entries_of_an_array_are_reported_and_skipped(tmp_path):
    path = tmp_path / "items.json"
    path.write_bytes(b'[{"a": 1},\n {"a":\n "caf\xe9"},\n {"a": 3}]')
    first, broken, last = scan(path)
    assert (first.value, last.value) == ({"a": 1}, {"a": 3})
    assert broken == Unreadable(f"{path}:3", "byte 0xe9 is not UTF-8; save the file as UTF-8")
