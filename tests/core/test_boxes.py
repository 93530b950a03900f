"""Boxes as others write them, there and back, against what draws, turns, resizes and converts them elsewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from transformers.image_transforms import center_to_corners_format, corners_to_center_format
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from relook.boxes import BOX_FORMS, ORDERS, parse_units, read_box, write_box
from relook.errors import UserError
from relook.regions import box_to_cells, cells_to_box, crop

SIDES = st.one_of(st.integers(1, 24), st.integers(1, 5000))
SIZES = st.one_of(
    st.tuples(SIDES, SIDES),
    st.integers(1, 300).flatmap(lambda n: st.sampled_from([(n, 1), (1, n), (20 * n, n), (n, 20 * n)])),
)
ORIENTATION = 0x0112  # the EXIF tag
PIXELS = [name for name in BOX_FORMS if name != "cells"]  # units that lose nothing


@st.composite
def sized_box(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    size = draw(SIZES)
    (x1, x2), (y1, y2) = (sorted(draw(st.integers(0, side)) for _ in range(2)) for side in size)
    return size, (x1, y1, x2, y2)


@given(sized_box(), SIZES, st.integers(1, 8))
def test_written_boxes_come_back(given_: tuple, view: tuple[int, int], turn: int) -> None:
    """In every unit and order; of scales also where whoever reads them scales as Qwen-Agent does and then truncates."""
    size, box = given_
    for units in PIXELS:
        for order in ORDERS:
            written = write_box(box, size, units, order, view=view, turn=turn)
            assert read_box(written, size, units, order, view=view, turn=turn) == box
        side = BOX_FORMS[units].side
        if side is not None:
            written = write_box(box, size, units)
            scaled = [v / side * n for v, n in zip(written, (*size, *size), strict=True)]
            assert tuple(map(round, scaled)) == tuple(map(int, scaled)) == box
            whole = write_box(box, size, units, "xywh", whole=True)
            left, top, right, bottom = read_box(whole, size, units, "xywh")
            assert all(isinstance(v, int) for v in whole)
            assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]


@given(sized_box(), st.integers(1, 16))
def test_cells_are_those_of_regions(given_: tuple, grid: int) -> None:
    size, box = given_
    for order in ORDERS:
        written = write_box(box, size, "cells", order, grid=grid)
        assert read_box(written, size, "cells", order, grid=grid) == cells_to_box(
            box_to_cells(box, size, grid), size, grid
        )
    with pytest.raises(UserError, match="does not fit the"):
        read_box((0, 0, grid, 0), size, "cells", grid=grid)


def test_centres_are_those_of_transformers() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((20, 2, 2)), axis=1).reshape(20, 4)
    for box, centre in zip(corners, corners_to_center_format(corners), strict=True):
        assert read_box(centre, (1, 1), "pixels", "cxcywh") == pytest.approx(box)
        assert ORDERS["cxcywh"][1](*box) == pytest.approx(centre)
    assert center_to_corners_format(np.array([write_box((10, 20, 30, 60), (100, 100), "0-1", "cxcywh")])) == (
        pytest.approx(np.array([[0.1, 0.2, 0.3, 0.6]]), abs=2e-6)
    )


@pytest.mark.parametrize("turn", range(1, 9))
def test_boxes_of_the_stored_file_are_where_exif_turns_them(turn: int) -> None:
    stored, drawn = Image.new("RGB", (60, 40)), (5, 10, 20, 16)
    ImageDraw.Draw(stored).rectangle((5, 10, 19, 15), "white")
    exif = stored.getexif()
    exif[ORIENTATION] = turn
    stored.info["exif"] = exif.tobytes()
    upright = ImageOps.exif_transpose(stored)
    seen = read_box(drawn, upright.size, "stored", turn=turn)
    assert seen == upright.getbbox()
    assert write_box(tuple(map(int, seen)), upright.size, "stored", turn=turn) == list(drawn)


def test_boxes_of_the_resized_view_are_scaled_back() -> None:
    size = (1080, 1920)
    height, width = smart_resize(size[1], size[0], 28, min_pixels=56 * 56, max_pixels=1280 * 28 * 28)
    box = read_box((width / 2, height / 4, width, height), size, "resized", view=(width, height))
    assert box == pytest.approx((540, 480, 1080, 1920))
    with pytest.raises(UserError, match="resized_width"):
        read_box((0, 0, 1, 1), size, "resized")


def test_a_box_shows_the_same_pixels_in_every_dialect() -> None:
    image = Image.effect_noise((300, 200), 80)
    box = (30, 50, 120, 150)
    for units in PIXELS:
        for order in ORDERS:
            numbers = write_box(box, image.size, units, order, view=(280, 196))
            seen = tuple(map(int, read_box(numbers, image.size, units, order, view=(280, 196))))
            assert image.crop(seen).tobytes() == image.crop(box).tobytes()
    cells = write_box(box, image.size, "cells", grid=10)
    assert crop(image, tuple(cells), grid=10)[1] == read_box(cells, image.size, "cells", grid=10)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("0-1000 xywh", ("0-1000", "xywh")),
        ("xywh", ("pixels", "xywh")),
        ("percent", ("percent", "xyxy")),
        ("cxcywh, 0-1", ("0-1", "cxcywh")),
    ],
)
def test_dialects_are_said_in_words(words: str, found: tuple[str, str]) -> None:
    assert parse_units(words) == found


@pytest.mark.parametrize("words", ["", "0-1001", "0-1 0-1000", "xywh xyxy", "coco"])
def test_other_words_are_refused(words: str) -> None:
    with pytest.raises(UserError, match="expected one of 0-1000, 0-1, pixels"):
        parse_units(words)
