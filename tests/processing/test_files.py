"""What people hold: tensors, open files, image columns, pages of PDFs and TIFFs, HEIC. Pixels as Pillow or NumPy has
them; files are written by Pillow, pillow-heif or by hand from the format's description."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from support.scripted_model import picture
from support.small_processors import page, processor_of

from relook.cli.app import app
from relook.data.images import file_size, read_facts
from relook.errors import UserError
from relook.files import split_page
from relook.perceive.batch import ask_file
from relook.trace import Answer
from relook.views import load_item_image, open_image

PIXELS = np.asarray(page())
RECEIPTS = Path(__file__).parents[3] / "shared/data/receipts"


def saved(image, form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(source, **options) -> np.ndarray:
    return np.asarray(open_image(source, **options))


# -- tensors and arrays


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_first", [True, False])
def test_a_tensor_is_the_picture_it_was_made_of(dtype, channels_first):
    tensor = torch.tensor(PIXELS)
    tensor = tensor if dtype == torch.uint8 else tensor.to(dtype) / 255
    tensor = tensor.permute(2, 0, 1) if channels_first else tensor
    off = np.abs(pixels(tensor).astype(int) - PIXELS)
    assert off.max() <= (1 if dtype == torch.bfloat16 else 0)
    assert np.array_equal(
        pixels(tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor), pixels(tensor)
    )


def test_grey_alpha_and_numpys_channels_first():
    grey = torch.tensor(PIXELS[:, :, 0])
    for source in (grey, grey[None], grey[..., None], grey.numpy()[None], grey / 255):
        assert np.array_equal(pixels(source), np.asarray(Image.fromarray(PIXELS[:, :, 0]).convert("RGB")))
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    assert (pixels(torch.tensor(clear).permute(2, 0, 1)) == 255).all()
    assert np.array_equal(pixels(PIXELS.transpose(2, 0, 1)), PIXELS)
    narrow = np.zeros((3, 20, 3), np.uint8)
    assert open_image(narrow).size == (20, 3) and open_image(torch.tensor(narrow)).size == (3, 20), (
        "as each library has it"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.full((3, 8, 8), 200.0), "pixels of float32 leave 0..1"),
        (torch.randn(3, 8, 8), "pixels of float32 leave 0..1"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "pixels of int64; expected uint8, or floats"),
        (torch.zeros(2, 3, 8, 8), r"shape \(2, 3, 8, 8\) .* several images are given as a list"),
        (torch.zeros(2, 8, 8), r"shape \(2, 8, 8\)"),
        (torch.zeros(3, 0, 8), r"0"),
        (torch.zeros(3, 8, 8, device="meta"), "Tensor cannot be read"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "pixels from 70000 to 70000; expected 0 to 65535"),
        (saved(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"), "bytes: pixels from -5 to -5"),
        (saved(Image.fromarray(np.full((4, 4), 255, np.float32)), "TIFF"), "bytes: pixels of float32 leave 0..1"),
    ],
)
def test_what_is_no_picture_is_refused(source, message):
    with pytest.raises(UserError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


def test_deep_tiffs_are_scaled():
    """A 0-1 float TIFF was read as black once."""
    grey = np.linspace(0, 1, 48 * 64).reshape(48, 64)
    for values in (grey.astype(np.float32), (grey * 65535).astype(np.uint16), (grey * 65535).astype(np.int32)):
        found = pixels(saved(Image.fromarray(values), "TIFF"))
        assert np.abs(found[:, :, 0] - 255 * grey).max() <= 1 and found.max() == 255


# -- open files and image columns


def test_open_files_are_read_from_their_beginning(tmp_path):
    data = saved(page())
    (tmp_path / "a.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", data)

    class Socket:
        """Cannot go back, as a response of an HTTP client."""

        def read(self):
            return data

    stream = io.BytesIO(data)
    stream.seek(100)
    with (
        open(tmp_path / "a.png", "rb") as file,
        zipfile.ZipFile(tmp_path / "a.zip").open("a.png") as member,
        tempfile.SpooledTemporaryFile() as spooled,
    ):
        spooled.write(data)
        for source in (file, file, stream, spooled, member, Socket(), bytearray(data), memoryview(data)):
            assert np.array_equal(pixels(source), PIXELS)
    with pytest.raises(UserError, match=r"cannot be read .*closed"):
        open_image(file)
    with (
        open(tmp_path / "a.png", encoding="latin-1") as text,
        pytest.raises(UserError, match=r"gave a str; .*binary mode"),
    ):
        open_image(text)
    with pytest.raises(UserError, match="not an image"):
        open_image(io.BytesIO(b"hello"))


def test_an_image_column_of_datasets(tmp_path):
    import datasets

    page().save(tmp_path / "a.png")
    images = [str(tmp_path / "a.png"), {"bytes": saved(page()), "path": None}]
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image(decode=False)}))
    for row in rows:
        assert np.array_equal(pixels(row["image"]), PIXELS)
    assert np.array_equal(pixels(rows.cast_column("image", datasets.Image())[1]["image"]), PIXELS)
    with pytest.raises(UserError, match=r"gone.png: no such file"):
        open_image({"bytes": None, "path": "gone.png"})
    with pytest.raises(UserError, match="image is a dict; expected a path"):
        open_image({"url": "a.png"})


def test_every_kind_can_be_asked_and_stays_as_it_was_given(tiny_vlm):
    vlm = tiny_vlm(("region",))
    options = {"region": (2, 2, 4, 4), "max_new_tokens": 3}
    expected = vlm.ask(page(), "What?", **options)
    tensor = torch.tensor(PIXELS)
    kinds = [tensor, tensor.permute(2, 0, 1), io.BytesIO(saved(page())), {"bytes": saved(page()), "path": None}]
    for answer in vlm.ask_many([(kind, "What?") for kind in kinds], **options):
        assert answer.text == expected.text and answer.looks[0].image.tobytes() == expected.looks[0].image.tobytes()
    chat = vlm.chat(tensor)
    tensor.fill_(0)
    assert chat.ask("What?", **options).looks[0].image.tobytes() == expected.looks[0].image.tobytes()


# -- pages


def pages(count: int = 3) -> list[Image.Image]:
    return [picture(seed, (200, 120)) for seed in range(count)]


@pytest.fixture
def folder(tmp_path) -> Path:
    first, *others = pages()
    first.save(tmp_path / "scan.tif", save_all=True, append_images=others)
    first.save(tmp_path / "scan.pdf", save_all=True, append_images=others, resolution=200, quality=95)
    first.save(tmp_path / "one.pdf", resolution=200, quality=95)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a/scan.pdf#page=2", ("a/scan.pdf", 2, None)),
        ("scan.pdf#page=12&dpi=72", ("scan.pdf", 12, 72)),
        ("scan.pdf#dpi=72", ("scan.pdf", None, 72)),
        ("data:application/pdf;base64,AA==#page=2", ("data:application/pdf;base64,AA==", 2, None)),
        *(
            (name, (name, None, None))
            for name in ("a.png", "a#1.png", "a#page=", "a#page=2dpi=3", "a#&dpi=3", "a#page=-1")
        ),
    ],
)
def test_the_page_of_a_path(name, split):
    path, which = split_page(name)
    assert (path, which.number, which.dpi) == split


def test_a_file_that_is_called_so_is_meant(tmp_path):
    page().save(tmp_path / "a.png#page=2", "PNG")
    assert np.array_equal(pixels(tmp_path / "a.png#page=2"), PIXELS)


def test_a_page_of_a_tiff(folder):
    url = "data:image/tiff;base64," + base64.b64encode((folder / "scan.tif").read_bytes()).decode()
    for number, image in enumerate(pages(), 1):
        for source in (
            f"{folder}/scan.tif#page={number}",
            Path(f"{folder}/scan.tif#page={number}"),
            f"{url}#page={number}",
        ):
            assert np.array_equal(pixels(source), np.asarray(image))
    held = Image.open(folder / "scan.tif")
    held.seek(2)
    assert np.array_equal(pixels(held), np.asarray(pages()[2])), "the one that it stands at"
    for source in (
        folder / "scan.tif",
        (folder / "scan.tif").read_bytes(),
        url,
        {"bytes": None, "path": f"{folder}/scan.tif"},
    ):
        with pytest.raises(UserError, match=r"has 3 pages, of which one can be shown: add #page=1 to #page=3"):
            open_image(source)
    with pytest.raises(UserError, match=r"scan.tif: has no page 4; expected #page=1 to #page=3"):
        open_image(f"{folder}/scan.tif#page=4")
    with pytest.raises(UserError, match=r"dpi=72 is for a PDF, and this is TIFF"):
        open_image(f"{folder}/scan.tif#page=1&dpi=72")


def test_smaller_copies_and_masks_of_a_tiff_are_no_pages(tmp_path):
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "a.tif"), True) as file:
        for size, kind in (((20, 12), 1), ((200, 120), 0), ((200, 120), 4)):  # NewSubfileType of TIFF 6.0
            Image.new("RGB", size, (200, 9, 9)).save(file, "TIFF", tiffinfo={254: kind})
            file.newFrame()
    assert open_image(tmp_path / "a.tif").size == file_size(str(tmp_path / "a.tif")) == (200, 120)
    assert open_image(f"{tmp_path}/a.tif#page=1").size == (200, 120)


def test_an_animation_shows_its_first_picture_or_the_one_named(tmp_path):
    first, *others = (Image.new("L", (20, 10), shade) for shade in (0, 100, 255))
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    assert pixels(tmp_path / "a.gif").max() == 0 and pixels(f"{tmp_path}/a.gif#page=3").min() == 255
    page().save(tmp_path / "b.png")
    assert np.array_equal(pixels(f"{tmp_path}/b.png#page=1"), PIXELS)
    with pytest.raises(UserError, match=r"has no page 2; expected #page=1$"):
        open_image(f"{tmp_path}/b.png#page=2")


def near(found, image, most=12):
    found, wanted = (np.asarray(one.convert("RGB"), np.int64) for one in (found, image))
    return found.shape == wanted.shape and np.abs(found - wanted).mean() < most


def test_a_page_of_a_pdf(folder):
    pytest.importorskip("pypdfium2")
    for number, image in enumerate(pages(), 1):
        assert near(open_image(f"{folder}/scan.pdf#page={number}"), image)
        assert file_size(f"{folder}/scan.pdf#page={number}") == image.size
    assert near(open_image(folder / "one.pdf"), pages()[0]) and near(
        open_image((folder / "one.pdf").read_bytes()), pages()[0]
    )
    assert open_image(f"{folder}/one.pdf#dpi=100").size == (100, 60) == file_size(f"{folder}/one.pdf#dpi=100")
    crop = load_item_image("scan.pdf#page=2_20,10,120,90", folder)
    assert near(crop, pages()[1].crop((20, 10, 120, 90)))
    for name, said in (
        ("scan.pdf", "scan.pdf: has 3 pages, of which one can be shown"),
        ("scan.pdf#page=0", "scan.pdf: has no page 0; expected #page=1 to #page=3"),
        ("one.pdf#page=1&dpi=0", "dpi=0 draws nothing"),
        ("one.pdf#dpi=99999", "pixels at 99999 dpi; ask for fewer"),
        ("gone.pdf#page=2", "gone.pdf: no such file"),
    ):
        with pytest.raises(UserError, match=said):
            open_image(f"{folder}/{name}")
    (folder / "cut.pdf").write_bytes((folder / "one.pdf").read_bytes()[:300])
    with pytest.raises(UserError, match=r"cut.pdf: is a damaged PDF|no page") as caught:
        open_image(folder / "cut.pdf")
    assert "\n" not in str(caught.value)


def pdf(*more: bytes, turn: int = 0, content: bytes = b"", trailer: bytes = b"", root: bytes = b"", own: bytes = b""):
    """A page of 72 x 36 points, by hand from ISO 32000: without a table of objects, which readers then make."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R%s>>" % root,
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 36]/Rotate %d/Contents 4 0 R%s>>" % (turn, own),
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        *more,
    ]
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % pair for pair in enumerate(objects, 1))
    return b"%PDF-1.4\n" + body + b"trailer<</Root 1 0 R/Size 9" + trailer + b">>\n%%EOF"


def test_a_pdf_is_drawn_on_white_and_turned_as_it_says():
    pytest.importorskip("pypdfium2")
    black = b"0 0 18 36 re f"  # the left quarter
    upright = pixels(pdf(content=black))
    assert upright.shape == (100, 200, 3)
    assert (upright[:, :49] == 0).all() and (upright[:, 51:] == 255).all()
    turned = pixels(pdf(content=black, turn=90))
    assert turned.shape == (200, 100, 3) and (turned[:49] == 0).all() and (turned[51:] == 255).all()


def test_what_was_filled_into_a_form_is_drawn():
    pytest.importorskip("pypdfium2")
    form = b"/AcroForm<</Fields[5 0 R]/DR<</Font<</F 6 0 R>>>>/DA(/F 12 Tf 0 g)>>"
    field = b"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/Rect[4 4 68 32]/P 3 0 R/F 4/DA(/F 12 Tf 0 g)%s>>"
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    empty, filled = (
        pixels(pdf(field % value, font, root=form, own=b"/Annots[5 0 R]")).astype(int) for value in (b"", b"/V(ACME)")
    )
    assert (filled.sum(2) < 150).sum() > 100 > (empty.sum(2) < 150).sum()


def test_a_locked_pdf_says_so():
    """Encrypted by hand after ISO 32000, 7.6.3 (revision 2): a password that nobody gave."""
    pytest.importorskip("pypdfium2")
    fill = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")

    def rc4(key: bytes, data: bytes) -> bytes:
        box, j, out = list(range(256)), 0, bytearray()
        for i in range(256):
            j = (j + box[i] + key[i % len(key)]) % 256
            box[i], box[j] = box[j], box[i]
        i = j = 0
        for byte in data:
            i = (i + 1) % 256
            j = (j + box[i]) % 256
            box[i], box[j] = box[j], box[i]
            out.append(byte ^ box[(box[i] + box[j]) % 256])
        return bytes(out)

    def padded(word: bytes) -> bytes:
        return (word + fill)[:32]

    owner = rc4(hashlib.md5(padded(b"owner")).digest()[:5], padded(b"secret"))
    key = hashlib.md5(padded(b"secret") + owner + (-4).to_bytes(4, "little", signed=True) + b"id").digest()[:5]
    locks = (owner.hex().encode(), rc4(key, fill).hex().encode())
    locked = b"/ID[<6964><6964>]/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>" % locks
    with pytest.raises(UserError, match=r"bytes: is locked with a password; save it without"):
        open_image(pdf(trailer=locked))


@pytest.mark.skipif(not RECEIPTS.is_dir(), reason="the receipts are not at hand")
def test_a_real_receipt_in_a_pdf(tmp_path):
    pytest.importorskip("pypdfium2")
    scan = Image.open(RECEIPTS / "images/000.jpg")
    scan.save(tmp_path / "receipt.pdf", resolution=200)
    assert near(open_image(tmp_path / "receipt.pdf"), scan, 3)


def test_transformers_doors_take_pages_tensors_and_columns(folder):
    processor, (_, second, _) = processor_of(first_look=None), pages()
    pad, options = (
        "<|vision_start|><|image_pad|><|vision_end|>",
        dict(tokenize=True, return_dict=True, return_tensors="np"),
    )
    wanted = processor(images=[second], text=[pad], return_tensors="np")["pixel_values"]
    tensor, column = torch.tensor(np.asarray(second)).permute(2, 0, 1), {"bytes": saved(second), "path": None}
    for source in (f"{folder}/scan.tif#page=2", tensor, tensor[None], [column], io.BytesIO(saved(second))):
        found = processor(images=source, text=[pad], return_tensors="np")["pixel_values"]
        assert np.array_equal(found, wanted)
    for part in ({"path": f"{folder}/scan.tif#page=2"}, {"image": tensor}, {"image": column}):
        chat = [{"role": "user", "content": [{"type": "image", **part}]}]
        assert np.array_equal(processor.apply_chat_template(chat, **options)["pixel_values"], wanted)
    item = {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]}
    for source in ("scan.tif#page=2", tensor, (tensor, (0, 0, 200, 120))):
        found = processor.encode_item(item | {"images": [source]}, image_root=folder)["pixel_values"]
        assert np.array_equal(found, wanted)


# -- HEIC


def test_a_heic_photo_is_upright(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    photo = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    photo.paste((220, 30, 30), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show", as a phone held upright writes it
    heif.from_pillow(photo).save(tmp_path / "photo.heic", quality=95)
    assert near(open_image(tmp_path / "photo.heic"), photo, 4)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    heif.register_heif_opener()
    turned.save(tmp_path / "turned.heic", quality=95, exif=exif.tobytes())
    assert near(open_image(tmp_path / "turned.heic"), photo, 4)
    assert file_size(str(tmp_path / "turned.heic")) == photo.size == read_facts(str(tmp_path / "turned.heic")).size


@pytest.mark.parametrize(
    ("module", "data", "said"),
    [
        ("pypdfium2", pdf(), r"a PDF, which needs pypdfium2, which is not installed; pip install 'relook\[files\]'"),
        (
            "pillow_heif",
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
            "a HEIC image, which needs pillow-heif, which is",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path, monkeypatch, module, data, said):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "relook.pdf", raising=False)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError, match=f"a: is {said}") as caught:
        open_image(tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert read_facts(str(tmp_path / "a")).problem == "unreadable"


# -- in data, and from the shell


@pytest.mark.parametrize("name", ["scan.tif", "scan.pdf"])
def test_pages_in_a_file_of_questions(folder, name, capsys):
    """Built, checked, shown: each page an image of its own."""
    pytest.importorskip("pypdfium2")
    lines = [
        {"image": f"{name}#page={n}", "question": "What?", "answer": f"page {n}", "bboxs": [[10, 10, 60, 50]]}
        for n in (1, 2, 3)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = [str(folder / file) for file in ("q.jsonl", "items.json", "items.html")]
    for command in (["build", *where[:2]], ["check", where[1]], ["preview", *where[1:]]):
        assert app(["data", *command], standalone_mode=False) in (0, None), capsys.readouterr()
    items = json.loads((folder / "items.json").read_text())
    assert items[1]["images"][0] == f"{name}#page=2" and "#page=2_" in items[1]["images"][1]
    command = ["build", where[0], str(folder / "stored.json"), "--units", "stored"]  # which reads every file's turn
    assert app(["data", *command], standalone_mode=False) in (0, None), capsys.readouterr()
    assert [item["images"] for item in json.loads((folder / "stored.json").read_text())] == [i["images"] for i in items]
    assert len({read_facts(f"{folder}/{name}#page={n}").digest for n in (1, 2, 3)}) == 3
    assert read_facts(f"{folder}/{name}#page=3").size == (200, 120)
    assert "has 3 pages" in read_facts(f"{folder}/{name}").detail


class Eyes:
    """Answers with the size of what it is shown."""

    name = "eyes"

    def ask_many(self, pairs, batch_size, **options):
        sizes = [open_image(pair["image"]).size for pair in pairs]
        return [Answer(str(size), [], question=pair["question"]) for pair, size in zip(pairs, sizes, strict=True)]


def test_a_batch_of_pages_and_of_a_table_that_holds_its_images(folder):
    import datasets

    pytest.importorskip("pypdfium2")
    (folder / "q.csv").write_text("image,question\nscan.pdf#page=2,What?\none.pdf#dpi=100,What?\nscan.tif,What?\n")
    assert ask_file(Eyes(), folder / "q.csv", folder / "a.jsonl") == (3, 1)
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert [line.get("answer") for line in lines] == ["(200, 120)", "(100, 60)", None]
    assert lines[0]["image"] == "scan.pdf#page=2" and "has 3 pages" in lines[2]["error"]
    images = [{"bytes": saved(page()), "path": None}, {"bytes": saved(page()), "path": "b.png"}]
    rows = {"image": images, "question": ["What?"] * 2}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "q.parquet")
    assert ask_file(Eyes(), folder / "q.parquet", folder / "b.jsonl") == (2, 0)
    assert ask_file(Eyes(), folder / "q.parquet", folder / "b.jsonl") == (2, 0)
    lines = [json.loads(line) for line in (folder / "b.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["(64, 48)"] * 2
    assert [line["image"] for line in lines] == [hashlib.sha256(images[0]["bytes"]).hexdigest(), "b.png"]
