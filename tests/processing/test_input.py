"""Image input from paths, URLs, bytes and arrays; every invalid input gives a one-sentence error."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_processors import page, processor_of, region_item

from relook.errors import UserError
from relook.processing import View, expand, load_item_image, open_image


def encoded_page(kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    page().save(stream, kind, **options)
    return stream.getvalue()


def test_images_from_anywhere(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded_page())
    pixels = np.asarray(page())
    for source in (path, str(path), path.read_bytes(), Image.open(path), pixels, pixels / 255.0):
        assert np.array_equal(np.asarray(open_image(source)), pixels)
    assert open_image(pixels[:, :, 0]).mode == "RGB"
    assert open_image(pixels[:, :, 0] > 9).getextrema()[0] == (0, 255)


def test_exif_rotation_is_undone():
    turned = page().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show"
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    assert np.array_equal(np.asarray(open_image(stream.getvalue())), np.asarray(page()))


def test_crop_suffixes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded_page())
    crop = load_item_image("a.png_8,4,24,40", tmp_path)
    assert np.array_equal(np.asarray(crop), np.asarray(page())[4:40, 8:24])
    assert load_item_image("a.png_40,0,999,48", tmp_path).size == (24, 48)  # the image ends at 64
    (tmp_path / "a.png_1,1,2,2").write_bytes(encoded_page())
    (tmp_path / "a.png").unlink()
    assert load_item_image("a.png_1,1,2,2", tmp_path).size == (64, 48)  # a file that is really called so


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"hello, not an image", "not an image"),
        (encoded_page("JPEG")[:700], "damaged or cut short"),
        (encoded_page("PNG")[:5000], "damaged or cut short"),
        (encoded_page("PNG")[:20], "damaged or cut short|not an image"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "x.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_image(path)
    assert "x.jpg" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Path("."), "not a file"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((5, 8, 8), np.uint8), r"shape \(5, 8, 8\)"),
        (np.full((4, 4), 7.0), "leave 0..1"),
        (np.zeros((4, 4), np.int32), "int32"),
        (b"", "not an image"),
        (7, "is a int; expected a path"),
        (None, "expected a path"),
    ],
)
def test_what_is_no_image(source, message):
    with pytest.raises(UserError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)


def test_numbers_of_images_and_placeholders_must_agree():
    processor = processor_of()
    with pytest.raises(UserError, match=r"2 <image> placeholders but 1 entries in 'images'"):
        processor.encode_item(region_item(images=[page()]))
    with pytest.raises(UserError, match=r"0 <clip_image> placeholders but 1 entries in 'clip_images'"):
        processor.encode_item(region_item(clip_images=[page()]))
    with pytest.raises(UserError, match=r"1 <\|image_pad\|> but 2 images were given"):
        processor(text="<|image_pad|>", images=[page(), page()])
    with pytest.raises(UserError, match=r"1 <\|clip_image_pad\|> but 0 clip_images"):
        processor(text="<|clip_image_pad|>")
    with pytest.raises(UserError, match="more <image> than images"):
        expand("<image><image>", {"image": [3]})


def test_other_mistakes():
    with pytest.raises(UserError, match="zoom unknown; expected some of region, clip, detection, seg"):
        processor_of(looks=["zoom"])
    with pytest.raises(UserError, match="resample='cubic'"):
        View(512, "cubic")
    with pytest.raises(UserError, match="unknown setting"):
        View.of({"longest": 3})
    with pytest.raises(UserError, match="longest_side=0"):
        View.of(0)
    with pytest.raises(UserError, match="min_pixels=0"):
        View(min_pixels=0)
    with pytest.raises(UserError, match="max_scale=0"):
        View(max_scale=0)
    with pytest.raises(UserError, match="region_of='first' is unknown; expected whole or last"):
        processor_of(region_of="first")
    with pytest.raises(UserError, match="max_looks=0"):
        processor_of(max_looks=0)
    with pytest.raises(UserError, match="turns by user, user"):
        processor_of().encode_item({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]})
    with pytest.raises(UserError, match="turns by nobody"):
        processor_of().encode_item({"messages": []})
    with pytest.raises(UserError, match="stage 'third' is unknown"):
        processor_of().view(page(), "third")
    with pytest.raises(UserError, match="holds no pixel of the 64 x 48 image"):
        load_item_image((page(), (70, 0, 90, 10)))
    with pytest.raises(UserError, match="videos are not supported"):
        processor_of()(text="a", videos=[1])


def test_sides_are_cut_to_whole_pixels():
    assert View(512).target((1000, 400)) == (512, 204) and View(512).target((400, 1000)) == (204, 512)
