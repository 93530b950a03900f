"""Region geometry: cells, pixels and crops, for images from 1 x 1 to 20:1 and grids from 1 to 16.

Expected boxes come from the published conversations (crop suffixes beside region tokens) and from counting pixels;
properties are tested with hypothesis.
"""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from support import TESTS

from relook.errors import UserError
from relook.looks import parse_calls
from relook.regions import (
    box_to_cells,
    cells_in,
    cells_of,
    cells_to_box,
    chain,
    clamp_box,
    covered,
    crop,
    iou,
    join_crop_suffix,
    split_crop_suffix,
    token_area,
    upright,
    widen,
)

PUBLISHED = json.loads((TESTS / "fixtures/parity/data/data_pipeline.json").read_text())
ORIENTATION = 0x0112  # the EXIF tag

GRIDS = st.integers(1, 16)
SIDES = st.one_of(st.integers(1, 24), st.integers(1, 5000))
# 1-pixel sides and 20:1 strips are drawn often, not by luck
SIZES = st.one_of(
    st.tuples(SIDES, SIDES),
    st.integers(1, 300).flatmap(lambda n: st.sampled_from([(n, 1), (1, n), (20 * n, n), (n, 20 * n)])),
)


@st.composite
def cells_on(draw: st.DrawFn, grid: int) -> tuple[int, int, int, int]:
    x0, y0 = draw(st.integers(0, grid - 1)), draw(st.integers(0, grid - 1))
    return x0, y0, draw(st.integers(x0, grid - 1)), draw(st.integers(y0, grid - 1))


@st.composite
def a_region(draw: st.DrawFn) -> tuple[int, tuple[int, int], tuple[int, int, int, int]]:
    """(grid, size, cells)"""
    grid = draw(GRIDS)
    return grid, draw(SIZES), draw(cells_on(grid))


@st.composite
def a_box(draw: st.DrawFn) -> tuple[int, tuple[int, int], tuple[int, int, int, int]]:
    """(grid, size, box of at least one pixel inside the image)"""
    width, height = size = draw(SIZES)
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return draw(GRIDS), size, (x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height)))


def inside(box: tuple, outer: tuple) -> bool:
    return outer[0] <= box[0] < box[2] <= outer[2] and outer[1] <= box[1] < box[3] <= outer[3]


# -- what was published ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "margin"), [("region", 0), ("two_regions", 1)])
def test_published_regions_and_crops_agree_in_both_directions(name: str, margin: int) -> None:
    """The region calls of the published conversations, against the crops that their data names (one widened)."""
    sample = next(s["sample"] for s in PUBLISHED["samples"] if s["name"] == name)
    calls = [c for m in sample["messages"] if m["role"] == "assistant" for c in parse_calls(m["content"])]
    boxes = [box for _, box in map(split_crop_suffix, sample["images"]) if box is not None]
    for call, box in zip(calls, boxes, strict=True):
        assert call.cells is not None
        cells = widen(call.cells, margin)
        assert cells_to_box(cells, (640, 400)) == box  # wide.png
        assert box_to_cells(box, (640, 400)) == cells


@given(a_region())
def test_edges_are_those_of_the_spec_truncated(region: tuple) -> None:
    grid, (width, height), (x0, y0, x1, y1) = region
    exact = [Fraction(v * side, grid) for v, side in ((x0, width), (y0, height), (x1 + 1, width), (y1 + 1, height))]
    box = cells_to_box((x0, y0, x1, y1), (width, height), grid)
    assert box[:2] == (int(exact[0]), int(exact[1]))
    assert box[2:] == (max(int(exact[2]), box[0] + 1), max(int(exact[3]), box[1] + 1))


# -- the properties ----------------------------------------------------------------------------------


@given(a_region())
def test_cells_to_pixels_to_cells_is_the_identity_where_every_cell_has_a_pixel(region: tuple) -> None:
    grid, (width, height), cells = region
    size = (max(width, grid), max(height, grid))
    assert box_to_cells(cells_to_box(cells, size, grid), size, grid) == cells


@given(a_region())
def test_below_a_pixel_a_cell_boxes_are_still_the_same_after_a_round_trip(region: tuple) -> None:
    grid, size, cells = region
    box = cells_to_box(cells, size, grid)
    assert inside(box, (0, 0, *size))
    assert inside(box, cells_to_box(box_to_cells(box, size, grid), size, grid))


@given(a_box())
@example((8, (10, 10), (3, 3, 4, 4)))  # where floor(pixel * grid / side) names the cell before
def test_a_box_lies_inside_its_own_cells_and_they_are_the_fewest(case: tuple) -> None:
    grid, size, box = case
    x0, y0, x1, y1 = cells = box_to_cells(box, size, grid)
    assert 0 <= x0 <= x1 < grid and 0 <= y0 <= y1 < grid
    assert inside(box, cells_to_box(cells, size, grid))
    for fewer in [(x0 + 1, y0, x1, y1), (x0, y0 + 1, x1, y1), (x0, y0, x1 - 1, y1), (x0, y0, x1, y1 - 1)]:
        if fewer[0] <= fewer[2] and fewer[1] <= fewer[3]:
            smaller = cells_to_box(fewer, size, grid)
            # a side under `grid` pixels has cells that share a pixel: there one cell more or less changes nothing
            assert not inside(box, smaller) or min(size) < grid


@given(GRIDS, st.integers(1, 60))
def test_every_pixel_belongs_to_one_cell_and_cells_never_go_back(grid: int, side: int) -> None:
    owners = [box_to_cells((p, 0, p + 1, 1), (side, 1), grid)[0] for p in range(side)]
    assert owners == sorted(owners) and owners[-1] == grid - 1
    if side >= grid:
        assert set(owners) == set(range(grid))


@pytest.mark.parametrize("size", [(640, 400), (333, 777), (8, 8), (1, 1)])
def test_an_edge_on_the_border_never_names_the_cell_after_the_last(size: tuple) -> None:
    """The published labels hold `<|x_8|>` here."""
    assert box_to_cells((0, 0, *size), size)[2:] == (7, 7)
    assert box_to_cells((size[0] - 1, size[1] - 1, *size), size)[2:] == (7, 7)


@given(a_region(), st.integers(0, 20))
def test_widening_grows_by_whole_cells_and_stays_on_the_grid(region: tuple, margin: int) -> None:
    grid, size, cells = region
    wide = widen(cells, margin, grid)
    assert 0 <= wide[0] <= cells[0] and cells[2] <= wide[2] < grid and wide[1] >= 0 and wide[3] < grid
    for before, after, border in zip(cells, wide, (0, 0, grid - 1, grid - 1), strict=True):
        assert abs(after - before) == min(margin, abs(border - before))
    if min(size) >= grid:  # where a cell is less than a pixel, its box is moved to hold one
        assert inside(cells_to_box(cells, size, grid), cells_to_box(wide, size, grid))


def test_boxes_are_cut_to_the_image_and_fractions_of_pixels_count_whole() -> None:
    assert clamp_box((-5, -5, 1000, 1000), (64, 32)) == (0, 0, 64, 32)
    assert clamp_box((10.2, 3.9, 11.1, 4.0), (64, 32)) == (10, 3, 12, 4)
    assert clamp_box((200, 200, 300, 300), (64, 32)) == (63, 31, 64, 32)  # beside the image: its nearest pixel
    assert box_to_cells((20, 20, 20, 20), (64, 64)) == (2, 2, 2, 2)  # empty: one pixel


@pytest.mark.parametrize(
    "call",
    [
        lambda: cells_to_box((0, 0, 8, 7), (10, 10)),
        lambda: cells_to_box((2, 0, 1, 7), (10, 10)),
        lambda: cells_to_box((0, 0, 1), (10, 10)),  # type: ignore[arg-type]
        lambda: cells_to_box((0, 0, 1.5, 2), (10, 10)),  # type: ignore[arg-type]
        lambda: cells_to_box((0, 0, 1, 1), (0, 10)),
        lambda: box_to_cells((5, 5, 4, 6), (10, 10)),
        lambda: box_to_cells((5, 5, float("nan"), 6), (10, 10)),
        lambda: box_to_cells((5, 5, 6), (10, 10)),
        lambda: widen((0, 0, 1, 1), -1),
    ],
)
def test_geometry_that_makes_no_sense_is_the_users_error(call) -> None:
    with pytest.raises(UserError) as error:
        call()
    assert "expected" in str(error.value) and "\n" not in str(error.value)


# -- overlaps ----------------------------------------------------------------------------------------


@given(a_box(), a_box())
def test_overlaps_count_shared_pixels(first: tuple, second: tuple) -> None:
    a, b = (tuple(v % 12 for v in box) for box in (first[2], second[2]))
    pixels = [{(x, y) for x in range(q[0], q[2]) for y in range(q[1], q[3])} for q in (a, b)]
    shared, either = len(pixels[0] & pixels[1]), len(pixels[0] | pixels[1])
    assert covered(a, b) == pytest.approx(shared / len(pixels[1]) if pixels[1] else 0)
    assert iou(a, b) == pytest.approx(shared / either if either else 0)


# -- crops -------------------------------------------------------------------------------------------


def numbered(width: int, height: int) -> Image.Image:
    """An image whose pixel at (x, y) has the colour (x % 256, y % 256, x // 256 + 16 * (y // 256))."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x % 256, y % 256, x // 256 + 16 * (y // 256)) for y in range(height) for x in range(width)])
    return image


SMALL = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 15).flatmap(lambda n: st.sampled_from([(n, 1), (1, n), (20 * n, n), (n, 20 * n)])),
)


@given(SMALL, st.data(), GRIDS, st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]))
def test_a_crop_is_a_positive_part_of_the_upright_image(
    size: tuple, data: st.DataObject, grid: int, margin: int, orientation: int
) -> None:
    cells = data.draw(cells_on(grid))
    straight = numbered(*size)
    # how a camera stores an image that should be seen as `straight`: the inverse of what the tag asks for
    stored = {
        1: straight,
        2: straight.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: straight.transpose(Image.Transpose.ROTATE_180),
        4: straight.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: straight.transpose(Image.Transpose.TRANSPOSE),
        6: straight.transpose(Image.Transpose.ROTATE_90),
        7: straight.transpose(Image.Transpose.TRANSVERSE),
        8: straight.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    if orientation > 1:
        stored.getexif()[ORIENTATION] = orientation
    assert upright(stored).tobytes() == straight.tobytes() and upright(stored).size == size
    part, box = crop(stored, cells, grid=grid, margin=margin)
    assert inside(box, (0, 0, *size))
    assert part.size == (box[2] - box[0], box[3] - box[1]) and part.mode == "RGB"
    assert part.getpixel((0, 0)) == straight.getpixel((box[0], box[1]))
    assert part.getpixel((part.width - 1, part.height - 1)) == straight.getpixel((box[2] - 1, box[3] - 1))
    assert box == cells_to_box(widen(cells, margin, grid), size, grid)


def test_exif_of_a_file_is_followed(tmp_path: Path) -> None:
    stored = Image.new("RGB", (60, 20), "white")
    stored.paste("red", (0, 0, 30, 20))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned a quarter clockwise: what is stored left is seen on top
    stored.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        seen = upright(image)
    assert seen.size == (20, 60)
    assert seen.getpixel((10, 5)) == (255, 0, 0) and seen.getpixel((10, 55)) == (255, 255, 255)


def test_upright_makes_every_mode_rgb_without_losing_what_can_be_seen() -> None:
    rgb = Image.new("RGB", (2, 2), (10, 20, 30))
    assert upright(rgb) is rgb
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    assert [upright(clear).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    deep = Image.new("I;16", (2, 1), 0)
    deep.putpixel((0, 0), 40000)
    assert upright(deep).getpixel((0, 0)) == (156, 156, 156)  # 40000 / 256
    assert upright(Image.new("L", (1, 1), 77)).getpixel((0, 0)) == (77, 77, 77)
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"):
        seen = upright(Image.new(mode, (3, 5)))
        assert (seen.mode, seen.size) == ("RGB", (3, 5)), mode


# -- crop suffixes -----------------------------------------------------------------------------------


@given(st.text(min_size=1), st.sampled_from([".jpg", ".PNG", ".jpeg", ".b_c"]), st.tuples(*[st.integers(-9, 9999)] * 4))
def test_a_crop_suffix_is_split_off_and_joined_again(stem: str, suffix: str, box: tuple) -> None:
    path = stem + suffix
    assert split_crop_suffix(join_crop_suffix(path, box)) == (path, box)


@pytest.mark.parametrize(
    "path",
    [
        "a.jpg",
        "a_1,2,3,4.jpg",
        "a_1,2,3,4",
        "a.jpg_1,2,3",
        "a.jpg_1,2,3,4,5",
        "a.jpg_1,2,3,x",
        "d.e/a_1,2,3,4",
        "",
        "_",
    ],
)
def test_other_paths_are_left_alone(path: str) -> None:
    assert split_crop_suffix(path) == (path, None)


# -- where an encoder's tokens lie -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extent", "size", "area"),
    [
        ("whole", (640, 400), (0, 0, 640, 400)),
        ("centre", (640, 400), (145, 25, 495, 375)),  # shortest side 400 -> 256, of which 224: 350 pixels
        ("centre", (256, 512), (16, 144, 240, 368)),
        ("padded", (640, 400), (0, 0, 640, 640)),  # black below the image
        ("padded", (100, 300), (0, 0, 300, 300)),
    ],
)
def test_token_area(extent: str, size: tuple, area: tuple) -> None:
    assert token_area(extent, size) == area


# -- regions inside regions


@st.composite
def a_frame(draw: st.DrawFn) -> tuple[int, tuple[int, int, int, int], tuple[int, int, int, int]]:
    """(grid, frame, cells): a box of an original somewhere, and cells of a grid over it"""
    grid, (width, height), cells = draw(a_region())
    left, top = draw(st.integers(0, 3000)), draw(st.integers(0, 3000))
    return grid, (left, top, left + width, top + height), cells


@given(a_frame(), st.integers(0, 2))
def test_cells_of_a_frame_are_those_of_the_frame_cut_out(given, margin):
    """Cut the frame out, cut the cells out of that: the pixels of the box that `cells_in` names."""
    grid, frame, cells = given
    size, (left, top) = (frame[2] - frame[0], frame[3] - frame[1]), frame[:2]
    x1, y1, x2, y2 = cells_to_box(widen(cells, margin, grid), size, grid)
    assert cells_in(cells, frame, grid, margin) == (left + x1, top + y1, left + x2, top + y2)
    assert cells_in(cells, (0, 0, *size), grid, margin) == (x1, y1, x2, y2)
    if min(size) >= grid:
        assert cells_of(cells_in(cells, frame, grid), frame, grid) == cells
    assert covered(cells_in(cells_of(frame, frame, grid), frame, grid), frame) == 1


def test_cells_of_a_crop_by_hand():
    """An image whose pixels say where they are: the crop of a crop, cut by Pillow, shows the pixels of the box."""
    image = Image.new("RGB", (160, 120))
    image.putdata([(x, y, 0) for y in range(120) for x in range(160)])
    first, second = (2, 1, 5, 4), (1, 6, 3, 7)  # 20 x 15 px a cell; then 10 x 7.5 px a cell of 80 x 60
    view = image.crop((40, 15, 120, 75))
    by_hand = view.crop((10, 45, 40, 60))
    frame = cells_in(first, (0, 0, 160, 120))
    box = cells_in(second, frame)
    assert frame == (40, 15, 120, 75) and box == (50, 60, 80, 75)
    assert image.crop(box).tobytes() == by_hand.tobytes()
    assert cells_of(box, frame) == second


@given(a_box(), st.integers(0, 2), st.integers(1, 4))
@example((16, (904, 1280), (600, 700, 640, 712)), 1, 3)
def test_every_view_of_a_chain_covers_the_box_in_half_the_area(given, margin, looks):
    grid, size, box = given
    calls, views = chain(box, size, grid, margin, looks), [(0, 0, *size)]
    assert calls[0] == box_to_cells(box, size, grid) and 1 <= len(calls) <= looks
    for cells in calls:
        views.append(cells_in(cells, views[-1], grid, margin))
        assert covered(views[-1], box) == 1 and covered(views[-2], views[-1]) == 1
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in views]
    assert all(2 * after <= before for before, after in pairwise(areas[1:]))
    if len(calls) < looks:  # it ends because nothing is gained
        x1, y1, x2, y2 = cells_in(cells_of(box, views[-1], grid), views[-1], grid, margin)
        assert 2 * (x2 - x1) * (y2 - y1) > areas[-1]
    assert chain(box, size, grid, margin) == [box_to_cells(box, size, grid)]


def test_a_chain_refuses_what_is_no_box():
    for box in ((4, 4, 2, 8), (1, 2, 3), (1, 2, 3, float("nan"))):
        with pytest.raises(UserError, match="box"):
            chain(box, (40, 40), looks=2)
