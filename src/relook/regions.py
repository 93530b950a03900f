"""Region geometry: grid cells and pixels, and crops. Pure arithmetic.

Frames, the same everywhere in relook:

    Cells   (x0, y0, x1, y1)   whole grid cells 0..grid-1, both ends INCLUSIVE; x to the right, y down, (0, 0) top left
    Box     (x1, y1, x2, y2)   whole pixels of the upright original image; x2 and y2 are EXCLUSIVE edges
    size    (width, height)    pixels

A 640 x 400 image on the published 8 x 8 grid has cells of 80 x 50 pixels, so cells (1, 2, 3, 4) are the box
(80, 100, 320, 250): three columns wide, because both ends count.

An image narrower than `grid` pixels has cells without a pixel of their own. Their box is still one pixel wide (the
pixel at their left or upper edge), several cells share it, and going back from pixels gives the last cell that starts
in that pixel: cells -> pixels -> cells is the identity only where every cell has a pixel; pixels -> cells -> pixels
always covers the box.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from relook.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GRID = 8  # cells a side in the published models

Cells: TypeAlias = tuple[int, int, int, int]
Box: TypeAlias = tuple[int, int, int, int]


def check_cells(cells: Sequence[float], grid: int = GRID) -> Cells:
    """`cells` as plain ints. Raises UserError unless 0 <= x0 <= x1 < grid and 0 <= y0 <= y1 < grid."""
    wanted = f"expected x0,y0,x1,y1 with 0 <= x0 <= x1 <= {grid - 1} and 0 <= y0 <= y1 <= {grid - 1}"
    if len(cells) != 4 or any(int(value) != value for value in cells):
        raise UserError(f"region {tuple(cells)} is not four whole numbers: {wanted}")
    x0, y0, x1, y1 = (int(value) for value in cells)
    if not (0 <= x0 <= x1 < grid and 0 <= y0 <= y1 < grid):
        raise UserError(f"region {(x0, y0, x1, y1)} does not fit the {grid} x {grid} grid: {wanted}")
    return x0, y0, x1, y1


def cells_to_box(cells: Cells, size: tuple[int, int], grid: int = GRID) -> Box:
    """Pixel box of `cells` in an image of `size`: edges truncated to whole pixels (spec.md, 3), at least 1 px a side.

    >>> cells_to_box((1, 2, 3, 4), (640, 400))
    (80, 100, 320, 250)
    >>> cells_to_box((7, 7, 7, 7), (100, 3))  # 12.5 px and 3/8 px a cell
    (87, 2, 100, 3)
    """
    x0, y0, x1, y1 = check_cells(cells, grid)
    width, height = _check_size(size)
    left, top = x0 * width // grid, y0 * height // grid
    right, bottom = (x1 + 1) * width // grid, (y1 + 1) * height // grid
    return left, top, max(right, left + 1), max(bottom, top + 1)


def box_to_cells(box: Sequence[float], size: tuple[int, int], grid: int = GRID) -> Cells:
    """Smallest cells whose pixels cover `box`; what leaves the image is cut off, and an empty box counts as one pixel.

    x2 and y2 are exclusive, so a box that ends on the image's border names the last cell, never the one after it.
    Fractions of a pixel count as the whole pixel. Raises UserError for a box that runs backwards or is no four numbers.

    >>> box_to_cells((80, 100, 320, 250), (640, 400))
    (1, 2, 3, 4)
    >>> box_to_cells((80, 100, 321, 250), (640, 400))
    (1, 2, 4, 4)
    """
    width, height = _check_size(size)
    left, top, right, bottom = clamp_box(box, size)
    return (
        _cell_of_pixel(left, width, grid),
        _cell_of_pixel(top, height, grid),
        _cell_of_pixel(right - 1, width, grid),
        _cell_of_pixel(bottom - 1, height, grid),
    )


def _cell_of_pixel(pixel: int, length: int, grid: int) -> int:
    """The last cell whose first pixel, ``cell * length // grid``, is not after `pixel`.

    Not ``pixel * grid // length``: with 10 pixels the cells start at 0, 1, 2, 3, 5, 6, 7, 8, so pixel 3 is in cell 3,
    where plain division says 2, whose box ends before that pixel.
    """
    return ((pixel + 1) * grid - 1) // length


def clamp_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """`box` in whole pixels (grown outwards), cut to the image, at least 1 px a side. Raises as `box_to_cells` does."""
    width, height = _check_size(size)
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        raise UserError(f"box {tuple(box)} is not four numbers: expected x1,y1,x2,y2 in pixels")
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        raise UserError(f"box {tuple(box)} runs backwards: expected x1,y1,x2,y2 with x1 <= x2 and y1 <= y2")
    left, top = _clamp(math.floor(x1), 0, width - 1), _clamp(math.floor(y1), 0, height - 1)
    return left, top, _clamp(math.ceil(x2), left + 1, width), _clamp(math.ceil(y2), top + 1, height)


def check_box(box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    """`box`, which lies in an image of `size` up to a pixel. Raises UserError for others, with what they look like."""
    wanted = f"expected x1,y1,x2,y2 in pixels of the upright image of {size[0]} x {size[1]}"
    x1, y1, x2, y2 = box
    if min(size) > 1 and all(0 <= value <= 1 for value in box):  # (0, 0, 1, 1), too: no one asks for a pixel
        raise UserError(f"box {tuple(box)} looks like fractions of the image's sides; {wanted}: multiply them")
    if x2 < x1 or y2 < y1:
        raise UserError(f"box {tuple(box)} runs backwards; if it is x, y, width, height, add them: {wanted}")
    if x1 <= -1 or y1 <= -1 or x2 >= size[0] + 1 or y2 >= size[1] + 1:
        raise UserError(f"box {tuple(box)} leaves the image; {wanted}")
    return x1, y1, x2, y2


def widen(cells: Cells, margin: int, grid: int = GRID) -> Cells:
    """`cells` grown by `margin` cells on each side, kept on the grid. Published: 1 at evaluation, 0 in training."""
    x0, y0, x1, y1 = check_cells(cells, grid)
    if margin < 0:
        raise UserError(f"margin {margin} is negative: expected 0 or more cells")
    last = grid - 1
    return max(x0 - margin, 0), max(y0 - margin, 0), min(x1 + margin, last), min(y1 + margin, last)


def cells_in(cells: Cells, frame: Box, grid: int = GRID, margin: int = 0) -> Box:
    """Box of the original for `cells`, widened by `margin`, of the grid over `frame`, a box of the original.

    >>> cells_in((1, 2, 3, 4), (0, 0, 640, 400))  # the whole image: as `cells_to_box`
    (80, 100, 320, 250)
    >>> cells_in((0, 4, 1, 7), (80, 100, 320, 260), margin=1)  # cells of 30 x 20 px
    (80, 160, 170, 260)
    """
    left, top, right, bottom = frame
    x1, y1, x2, y2 = cells_to_box(widen(cells, margin, grid), (right - left, bottom - top), grid)
    return left + x1, top + y1, left + x2, top + y2


def cells_of(box: Sequence[float], frame: Box, grid: int = GRID) -> Cells:
    """The inverse of `cells_in`: smallest cells of the grid over `frame` that cover `box`, less what leaves the frame.

    >>> cells_of((85, 185, 135, 255), (80, 100, 320, 260))
    (0, 4, 1, 7)
    """
    inside = [value - frame[i % 2] for i, value in enumerate(box)]
    return box_to_cells(inside, (frame[2] - frame[0], frame[3] - frame[1]), grid)


def closer(box: Sequence[float], frame: Box, grid: int = GRID, margin: int = 0) -> Cells | None:
    """The cells of the grid over `frame` that show `box`; None where they, widened, have over half of its area.

    >>> closer((900, 500, 950, 520), (800, 480, 960, 640))  # shows 900,500 to 960,520
    (5, 1, 7, 1)
    >>> closer((810, 490, 950, 630), (800, 480, 960, 640)) is None
    True
    """
    cells = cells_of(box, frame, grid)
    return cells if 2 * _area(cells_in(cells, frame, grid, margin)) <= _area(frame) else None


def chain(
    box: Sequence[float], size: tuple[int, int], grid: int = GRID, margin: int = 0, looks: int = 1
) -> list[Cells]:
    """The region calls that lead to `box` in an image of `size`, where a call counts cells of the view before it.

    The first counts cells of the whole image; a `closer` one follows while there is one and fewer than `looks` were
    made. Every view covers the box.

    >>> chain((900, 500, 950, 520), (1280, 1280), looks=3)  # seen: 800,480 to 960,640, then 900,500 to 960,520
    [(5, 3, 5, 3), (5, 1, 7, 1)]
    >>> chain((900, 500, 950, 520), (1280, 1280)) == [box_to_cells((900, 500, 950, 520), (1280, 1280))]
    True
    """
    box = clamp_box(box, size)
    calls = [box_to_cells(box, size, grid)]
    seen = cells_in(calls[0], (0, 0, *size), grid, margin)
    while len(calls) < looks and (cells := closer(box, seen, grid, margin)) is not None:
        calls.append(cells)
        seen = cells_in(cells, seen, grid, margin)
    return calls


@dataclass(frozen=True)
class Frame:
    """The view that region calls count in: the whole image or, where regions nest, what the last one has shown.

    Attributes:
        box: of the view, pixels of the original.
        grid: cells a side over it.
        margin: cells by which a region is widened.
        nested: whether the next calls count in what these show.
    """

    box: Box
    grid: int = GRID
    margin: int = 0
    nested: bool = False

    @classmethod
    def of(cls, processor: Any, size: tuple[int, int]) -> "Frame":
        """That of the first call about an image of `size`, by the settings of a processor."""
        return cls((0, 0, *size), processor.grid_size, processor.region_margin, processor.region_of == "last")

    def shown(self, cells: Cells) -> Box:
        """What the region `cells` shows, pixels of the original."""
        return cells_in(cells, self.box, self.grid, self.margin)

    def cells(self, box: Sequence[float]) -> Cells:
        """The cells that show `box`, pixels of the original. Raises UserError for one that lies outside the view."""
        cells, (x1, y1, x2, y2) = cells_of(box, self.box, self.grid), box
        if self.nested and not _overlap((x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)), self.box):
            raise UserError(f"box {tuple(box)} lies outside {self.box}, which was seen last: regions lie inside it")
        return cells

    def after(self, boxes: Sequence[Box]) -> "Frame":
        """That of the next turn's calls, when a turn has shown `boxes`."""
        return replace(self, box=boxes[-1]) if self.nested and boxes else self


def covered(box: Sequence[float], other: Sequence[float]) -> float:
    """Share 0..1 of `other`'s area that `box` covers: how much of an annotated box a region shows. 0 if it is empty."""
    area = _area(other)
    return _overlap(box, other) / area if area else 0.0


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0..1; 0 when both are empty."""
    shared = _overlap(a, b)
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def union(boxes: Sequence[tuple[int, int, int, int]]) -> Box:
    """The least box around all: `union([(0, 0, 1, 1), (4, 2, 5, 3)])` is (0, 0, 5, 3)."""
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


def crop(image: "Image.Image", cells: Cells, *, grid: int = GRID, margin: int = 0) -> tuple["Image.Image", Box]:
    """The part of `image` under `cells`, widened by `margin` cells, cut from the original pixels; and its box.

    The frame is the upright image: EXIF rotation is undone first, and the crop is RGB.
    """
    whole = upright(image)
    box = cells_to_box(widen(cells, margin, grid), whole.size, grid)
    return whole.crop(box), box


def upright(image: "Image.Image") -> "Image.Image":
    """`image` as people see it: turned as its EXIF tag says, RGB, transparent parts white, deep grey scaled to 8 bits.

    Returns the very same object when there is nothing to do. Raises UserError for floats outside 0..1 and integers over
    16 bits.
    """
    from PIL import Image, ImageOps

    orientation_tag = 0x0112
    try:
        turned = image.getexif().get(orientation_tag, 1) != 1
    except SyntaxError:  # how Pillow reports an EXIF block that is not one
        turned = False
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips
        return Image.fromarray(_deep_grey(image)).convert("RGB")
    if image.has_transparency_data:  # an alpha channel, or a transparent color that the file names
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: "Image.Image") -> "np.ndarray":
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F":
        return eight_bits(values)
    values = values.astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() < 2**16:
        raise UserError(f"pixels from {values.min()} to {values.max()}; expected 0 to 65535, or floats in 0..1")
    shift = 8 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 0
    grey = np.clip(values >> shift, 0, 255)
    return np.where(values == image.info.get("transparency", -1), 255, grey).astype(np.uint8)


def eight_bits(values: "np.ndarray") -> "np.ndarray":
    """Pixels as uint8, from uint8, bool, or floats in 0..1. Raises UserError for others."""
    import numpy as np

    if values.dtype == bool or np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError(f"pixels of {values.dtype} leave 0..1; expected floats in 0..1, or uint8")
        return np.round(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise UserError(f"pixels of {values.dtype}; expected uint8, or floats in 0..1")
    return values


def token_area(extent: str, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) pixels of a view of `size` over which an encoder's tokens lie; `LookSpec.extent` names how.

    whole   the view, stretched
    centre  a centred square of 224/256 of the shorter side (DINOv2: shortest side 256, centre crop 224)
    padded  a square on the longer side, from the top left, so it may reach beyond the view (SAM)

    >>> token_area("centre", (640, 400))
    (145.0, 25.0, 495.0, 375.0)
    """
    width, height = _check_size(size)
    if extent == "centre":
        side = min(size) * 224 / 256
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side
    side = max(size)
    return (0.0, 0.0, float(side), float(side)) if extent == "padded" else (0.0, 0.0, float(width), float(height))


_CROP_SUFFIX = re.compile(r"(?P<path>.*\.[^./\\]+)_(?P<box>-?[0-9]{1,9}(?:,-?[0-9]{1,9}){3})", re.DOTALL)


def split_crop_suffix(path: str) -> tuple[str, Box | None]:
    """Path and crop box of the published data's file names; the box is as written, it may leave the image.

    >>> split_crop_suffix("dir/a.jpg_80,100,320,250")
    ('dir/a.jpg', (80, 100, 320, 250))
    >>> split_crop_suffix("dir/a_1,2,3,4.jpg")
    ('dir/a_1,2,3,4.jpg', None)
    """
    match = _CROP_SUFFIX.fullmatch(path)
    if match is None:
        return path, None
    x1, y1, x2, y2 = (int(value) for value in match["box"].split(","))
    return match["path"], (x1, y1, x2, y2)


def join_crop_suffix(path: str, box: Box) -> str:
    """The inverse of `split_crop_suffix`: ``("a.jpg", (80, 100, 320, 250))`` -> ``"a.jpg_80,100,320,250"``."""
    return f"{path}_{','.join(str(value) for value in box)}"


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width < 1 or height < 1:
        raise UserError(f"image of {width} x {height} pixels: expected at least 1 x 1")
    return width, height


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
