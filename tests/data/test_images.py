"""Image sets of a source: where the images are, and whether they are complete."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image
from support.source_files import (
    BOXED,
    call,
    picture,
    refused,
    write,
)

from relook.data import Question, build_item, read_items
from relook.data.collate import opened
from relook.data.images import ImageFinder, check_copy, file_size, place_image, read_facts
from relook.data.items import Item
from relook.data.published import IMAGE_SETS, Archive, ImageSet, dataset_of
from relook.data.remap import remap
from relook.errors import UserError
from relook.regions import split_crop_suffix


def test_the_deepest_telling_folder_names_the_set():
    for path, name in [
        ("/root/autodl/COCO2017/train2017/0001.jpg", "coco"),
        ("cot/gqa/1.jpg", "gqa"),
        ("/data/coco/vsr/1.jpg", "vsr"),
        ("D:\\vg\\VG_100K_2\\1.jpg", "vg"),
        ("/somewhere/1.jpg", None),
    ]:
        assert dataset_of(path) == name


def test_files_are_found_by_name_and_longest_agreeing_folders(tmp_path):
    for path in (
        "VG_100K/1.jpg",
        "VG_100K_2/1.jpg",
        "VG_100K_2/2.jpg",
        "a/3.jpg",
        "b/3.jpg",
        "covers/9.jpg",
        "000042.jpg",
    ):
        picture(tmp_path / path, (8, 8))
    finder = ImageFinder({name: tmp_path for name in ("vg", "ocrvqa", "coco")})
    assert finder.find("/x/vg/VG_100K_2/1.jpg") == str(tmp_path / "VG_100K_2/1.jpg")
    assert finder.find("/x/vg/images/2.jpg") == str(tmp_path / "VG_100K_2/2.jpg")
    assert finder.find("/x/vg/3.jpg") is None  # two of that name, neither more like it
    assert finder.find("/x/ocr_vqa/9.gif") == str(tmp_path / "covers/9.jpg")
    assert finder.find("/x/coco/val2014/COCO_val2014_000042.jpg") == str(tmp_path / "000042.jpg")
    assert finder.find("/x/gqa/1.jpg") is None and finder.find("/x/vg/none.jpg") is None


@pytest.fixture
def published(tmp_path) -> Path:
    """Four items with somebody else's paths: two of GQA (one missing), one of COCO, one of no known set."""
    picture(tmp_path / "my/gqa/images/7.jpg")
    picture(tmp_path / "my/coco/train2017/1.jpg")
    rows = []
    for path in (
        "/root/x/gqa/images/7.jpg",
        "/root/x/gqa/images/8.jpg",
        "/root/x/COCO2017/train2017/1.jpg",
        "/root/y/1.jpg",
    ):
        rows.append(build_item(Question.from_dict(BOXED | {"image": path})).to_dict())
    return write(tmp_path / "published.json", *rows)


def test_remap_refuses_above_the_share_and_lists_what_is_missing(tmp_path, published):
    out, missing = tmp_path / "out/items.json", tmp_path / "missing.txt"
    folders = [f"gqa={tmp_path}/my/gqa", f"coco={tmp_path}/my/coco"]
    line = refused("data", "remap", published, out, "--images", *folders, "--missing", missing)
    assert "2 of 4 items" in line and "gqa 1 of 2" in line and not out.exists()
    assert missing.read_text() == "(no known set)\t/root/y/1.jpg\ngqa\t/root/x/gqa/images/8.jpg\n"
    assert not list(tmp_path.glob("out/*"))

    result = call("data", "remap", published, out, "--images", *folders, "--max-missing", 0.5)
    assert "4 items, 2 left out" in result.stdout
    items = list(read_items(out))
    assert len(items) == 2
    for item, name in zip(items, ("gqa/images/7.jpg", "coco/train2017/1.jpg"), strict=True):
        whole, crop = item.images["images"]
        assert (out.parent / whole).samefile(tmp_path / "my" / name)
        assert split_crop_suffix(crop) == (whole, (80, 100, 320, 250))
    assert [item.messages for item in items] == [item.messages for item in islice(read_items(published), 0, 4, 2)]


def test_remap_says_which_folders_were_not_given(tmp_path, published):
    assert "coco 1 of 1 (no folder given)" in refused(
        "data", "remap", published, tmp_path / "o.json", "--images", f"gqa={tmp_path}/my/gqa"
    )
    assert "is not a folder" in refused("data", "remap", published, tmp_path / "o.json", "--images", "gqa=/none")
    assert "expected NAME=FOLDER" in refused("data", "remap", published, tmp_path / "o.json", "--images", str(tmp_path))
    with pytest.raises(UserError, match="the source itself"):
        remap(published, published, {})


def test_a_copy_is_held_against_the_manifest(tmp_path, monkeypatch):
    good, bad = hashlib.md5(b"good").hexdigest(), "0" * 32
    archives = (
        Archive("a.zip", bytes=4, checksum=f"md5:{good}"),
        Archive("b.zip", checksum=f"md5:{bad}"),
        Archive("c.zip"),
    )
    row = ImageSet("tiny", "Tiny", "https://example.org", archives, ("tiny",), images=2)
    monkeypatch.setitem(IMAGE_SETS, "tiny", row)
    assert "no a.zip" in " ".join(check_copy("tiny", tmp_path).faults)
    for name in "abc":
        (tmp_path / f"{name}.zip").write_bytes(b"good")
    picture(tmp_path / "x/1.jpg", (8, 8))
    found = check_copy("tiny", tmp_path)
    assert (found.images, found.archives) == (1, 3) and found.unknown == ("c.zip: no checksum is published",)
    assert (
        len(found.faults) == 2 and "b.zip sums to md5:" in found.faults[0] and found.faults[1] == "1 image files of 2"
    )
    assert "1 image files of 2" in call("data", "images", f"tiny={tmp_path}", code=1).stdout
    (tmp_path / "a.zip").write_bytes(b"good?")
    assert "a.zip has 5 bytes, 4 are published" in check_copy("tiny", tmp_path).faults[0]
    assert "none of the image sets" in refused("data", "images", f"mine={tmp_path}")


def test_the_manifest_says_what_is_not_published():
    rows = json.loads(call("data", "images", "--json").stdout)
    assert {row["name"] for row in rows} == set(IMAGE_SETS)
    for row in rows:
        for archive in row["archives"]:
            assert archive["by"] or archive["size"] is archive["bytes"] is archive["checksum"] is None
    assert "checksum not published" in call("data", "images").stdout


def test_a_data_url_is_an_image(tmp_path):
    """In items, through checks and lengths: read like a file, and not joined with the folder."""
    stream = io.BytesIO()
    Image.new("RGB", (60, 20)).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    assert place_image(url, tmp_path, strict=True) == url
    assert file_size(url) == (60, 20) and read_facts(url).size == (60, 20)
    assert read_facts("data:image/png;base64,?").problem == "unreadable"
    item = Item.from_dict({"messages": [{"role": "user", "content": "<image>"}], "images": [url]})
    assert opened(item).images["images"][0].size == (60, 20)
