"""An image is opened in one way: the same pixels through every door, transparency and depth as the file says."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image
from support.small_processors import processor_of

from relook.errors import UserError
from relook.processing import load_item_image, open_image

PAD = "<|vision_start|><|image_pad|><|vision_end|>"
GREY = np.linspace(0, 65535, 48 * 64).reshape(48, 64)


def saved(image, form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def ink() -> Image.Image:
    """Black letters (alpha 255) on black of alpha 0, as a screenshot tool writes a page."""
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[20:30, 8:50, 3] = 255
    return Image.fromarray(pixels)


def seen_ink() -> np.ndarray:
    return np.where(np.asarray(ink())[:, :, 3:] == 255, 0, 255).repeat(3, 2)


def chunked(depth: int, color: int, row: bytes, named: bytes) -> bytes:
    """A PNG of 4 x 1 pixels in a depth that Pillow does not write, with a transparent color."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, color, 0, 0, 0)) + chunk(b"tRNS", named)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        chunked(1, 0, bytes([0b01010000]), b"\0\0"),
        chunked(2, 0, bytes([0b10111011]), b"\0\2"),
        chunked(4, 0, b"\x7f\x7f", b"\0\7"),
        chunked(8, 0, b"\7\xff\7\xff", b"\0\7"),
        chunked(16, 0, b"\x12\x34\xff\xff" * 2, b"\x12\x34"),
    ],
    ids=["1 bit", "2 bits", "4 bits", "8 bits", "16 bits"],
)
def test_a_named_transparent_color_is_white_in_every_depth(data):
    for source in (data, Image.open(io.BytesIO(data))):
        assert (np.asarray(open_image(source)) == 255).all()


def noted(image: Image.Image, named) -> Image.Image:
    image.info["transparency"] = named
    return image


def test_the_callers_image_and_its_notes_stay_as_they_are():
    image = Image.open(io.BytesIO(chunked(4, 0, b"\x7f\x7f", b"\0\7")))
    assert (np.asarray(open_image(image)) == 255).all() and image.info["transparency"] == 7
    assert np.array_equal(
        np.asarray(open_image(f"DATA:image/png;BASE64,{base64.b64encode(saved(ink())).decode()}")), seen_ink()
    )


def keyed(mode: str) -> Image.Image:
    """`seen_ink` without an alpha channel: the file names the transparent color, which is not white."""
    rgb = Image.fromarray(np.where(seen_ink() == 255, 7, 0).astype(np.uint8))
    return rgb.convert(mode)


FILES = {
    "RGBA": (saved(ink()), seen_ink()),
    "LA": (saved(ink().convert("LA")), seen_ink()),
    "palette": (saved(ink().quantize(4)), seen_ink()),
    "gif": (saved(ink(), "GIF"), seen_ink()),
    "RGB with tRNS": (saved(keyed("RGB"), transparency=(7, 7, 7)), seen_ink()),
    "L with tRNS": (saved(keyed("L"), transparency=7), seen_ink()),
    "I;16 with tRNS": (
        saved(Image.fromarray(np.where(seen_ink()[:, :, 0] == 255, 700, 0).astype(np.uint16)), transparency=700),
        seen_ink(),
    ),
    "I;16": (saved(Image.fromarray(GREY.astype(np.uint16))), (GREY.astype(int) // 256)[..., None].repeat(3, 2)),
    "float TIFF": (
        saved(Image.fromarray((GREY / 65535).astype(np.float32)), "TIFF"),
        np.round(GREY / 257)[..., None].repeat(3, 2),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_the_same_pixels_through_every_door(tmp_path, name):
    data, expected = FILES[name]
    path = tmp_path / "page"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{encoded}"
    for source in (path, str(path), data, Image.open(path), url):
        assert np.array_equal(np.asarray(open_image(source)), expected), source
        assert np.array_equal(np.asarray(load_item_image(source)), expected)
    processor = processor_of(first_look=None)
    wanted = processor(images=[open_image(path)], text=[PAD], return_tensors="np")["pixel_values"]
    assert wanted.std() > 0.5
    for source in (str(path), url, encoded, [[str(path)]], Image.open(path)):
        found = processor(images=source, text=[PAD], return_tensors="np")["pixel_values"]
        assert np.array_equal(found, wanted)
    options = dict(tokenize=True, return_dict=True, return_tensors="np")
    for part in ({"path": str(path)}, {"url": url}, {"base64": encoded}, {"image": Image.open(path)}):
        chat = [{"role": "user", "content": [{"type": "image", **part}]}]
        assert np.array_equal(processor.apply_chat_template(chat, **options)["pixel_values"], wanted)
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    assert np.array_equal(processor.apply_chat_template(chat, **options)["pixel_values"], wanted)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "pixels of float32 leave 0..1"),
        (Image.fromarray(np.full((4, 4), 200, np.float32)), "pixels of float32 leave 0..1"),
        (saved(Image.fromarray(np.full((4, 4), 200, np.float32)), "TIFF"), "bytes: pixels of float32 leave 0..1"),
        (np.full((4, 4, 3), np.nan), "leave 0..1"),
        ("data:image/png;base64,not base64!", "data URL .* holds no data"),
        ("data:image/png;base64", "data URL .* holds no data"),
        ("data:,", "data URL .* holds no data"),
        ("data:text/plain,hello", "data URL .* not an image"),
        ("http://localhost/a.png", "addresses are not fetched; download the image"),
        ("x" * 5000, "name too long"),
        (".", r"^\.: not a file; give the path of an image$"),
        ("HTTPS://localhost/a.png", "addresses are not fetched"),
        (chunked(16, 2, b"\0\5\0\6\0\7" * 4, b"\0\5\0\6\0\7"), "16 bits of RGB with a transparent color"),
        (noted(Image.new("L", (4, 4)), b"\0"), "image cannot be read"),
        (noted(Image.new("RGB", (4, 4)), "red"), "image cannot be read"),
        ("a\0b", "null byte"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(source, message):
    with pytest.raises(UserError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_addresses_are_fetched_as_transformers_does_and_opened_as_files_are():
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if "page" in self.path else 404)
            self.end_headers()
            self.wfile.write(FILES["RGB with tRNS"][0])

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(open_image(f"{place}/page.png", fetch=True)), seen_ink())
        processor = processor_of(first_look=None)
        wanted = processor(images=[open_image(FILES["RGBA"][0])], text=[PAD], return_tensors="np")["pixel_values"]
        found = processor(images=f"{place}/page.png", text=[PAD], return_tensors="np")["pixel_values"]
        assert np.array_equal(found, wanted)
        with pytest.raises(UserError, match=r"cannot be fetched .*404"):
            open_image(f"{place}/else.png", fetch=True)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="cannot be fetched"):
        open_image(f"{place}/page.png", fetch=True)
