"""Crops of an item held against the calls that asked for them: which disagree, and what they should be.

Calls and crops are paired in order of appearance. Without the image, a crop is held against its call in its own
scale: on each axis its edges leave few sides that the image can have (`_sides`), and where the region reaches the last
cell, only one. This module knows grid and pixels; what a fault is called is the table's (`relook.data.faults`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from relook.data.images import ImageFacts, split_ref, turned_cells
from relook.data.items import Item, Message
from relook.looks import ANSWER_PREFIX, Call, parse_calls, write_call, x_token, y_token
from relook.regions import Box, Cells, cells_to_box, join_crop_suffix, widen

if TYPE_CHECKING:
    from relook.data.faults import Context

GLYPH = 4 * 6  # pixels of the smallest legible character, 3 x 5 and a gap


@dataclass(frozen=True)
class Region:
    """A region call: its turn, its place in the turn's text, and its cells as written (they may reach one too far)."""

    turn: int
    span: tuple[int, int]
    cells: Cells


@dataclass(frozen=True)
class Crop:
    """A crop of an item: its number among `images`, its file and box, its call, and the facts of its file."""

    index: int
    file: str
    box: Box
    region: Region | None
    facts: ImageFacts | None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the upright image where it is at hand."""
        return self.facts.size if self.facts is not None and self.facts.problem is None else None


def region_calls(item: Item, grid: int) -> list[Region]:
    """The region calls of an item whose cells can be read, `<|x_8|>` on 8 cells included."""
    found = []
    for number, turn in enumerate(item.messages):
        if turn.role == "assistant" and "<|" in turn.content:
            found += [Region(number, span, cells) for cells, span in _regions(turn.content, grid)]
    return found


@lru_cache(maxsize=1 << 14)  # a set of any size has few distinct calls: 1296 regions on 8 x 8 cells
def _regions(content: str, grid: int) -> tuple[tuple[Cells, tuple[int, int]], ...]:
    far = x_token(grid) in content or y_token(grid) in content
    calls = parse_calls(content, grid + 1 if far else grid)
    return tuple((call.cells, call.span) for call in calls if _reads_as_region(call))  # type: ignore[misc]


def _reads_as_region(call: Call) -> bool:
    return call.look == "region" and call.cells is not None and call.problem is None


def crops(item: Item, context: Context) -> tuple[list[Crop], int]:
    """The crops of an item, each with its call where there are as many of them; and the number of calls."""
    found: list[tuple[int, str, Box, ImageFacts | None]] = []
    for index, ref in enumerate(item.images["images"]):
        file, box = split_ref(ref) if isinstance(ref, str) else ("", None)
        if box is not None:
            found.append((index, file, box, context.facts(file)))
    regions = region_calls(item, context.grid)
    paired = len(regions) == len(found)
    together = [
        Crop(index, file, box, regions[i] if paired else None, facts)
        for i, (index, file, box, facts) in enumerate(found)
    ]
    return together, len(regions)


def crop_faults(item: Item, context: Context) -> Iterator[tuple[str, str]]:
    """(row of the table, what was seen): one fault at most for each crop, and one where calls and crops do not pair."""
    if not any(isinstance(ref, str) and "," in ref for ref in item.images["images"]) and not region_calls(
        item, context.grid
    ):
        return
    found, calls = crops(item, context)
    if calls != len(found) != _written_regions(item, context.grid):
        yield "crop-region", f"{calls} region calls that can be read for {len(found)} crops"
    for crop in found:
        fault = _fault(crop, context.grid)
        if fault is not None:
            yield fault


def _written_regions(item: Item, grid: int) -> int:
    """Region calls of an item, whether they can be read or not: those that cannot are another row's fault."""
    said = (turn.content for turn in item.messages if turn.role == "assistant")
    return sum(call.look == "region" for text in said for call in parse_calls(text, grid))


def _fault(crop: Crop, grid: int) -> tuple[str, str] | None:
    x1, y1, x2, y2 = crop.box
    name = join_crop_suffix(crop.file, crop.box)
    if x1 > x2 or y1 > y2:
        return "crop-swapped", f"{name} has min and max swapped"
    if _as_stored(crop, grid):
        assert crop.facts is not None
        return "exif-rotation", f"{name} was cut before EXIF orientation {crop.facts.orientation} turned the image"
    far = crop.region is not None and max(crop.region.cells) >= grid
    if x1 == x2 or y1 == y2 or min(x1, y1) < 0:
        return "crop-outside", f"{name} is empty or starts outside the image"
    if crop.size is not None and (x2 > crop.size[0] or y2 > crop.size[1]):
        return "crop-outside", f"{name} leaves the image of {crop.size[0]} x {crop.size[1]} pixels"
    if crop.region is not None and not _fits(crop.box, crop.region.cells, crop.size, grid):
        if far and _fits(crop.box, _clamped(crop.region.cells, grid), crop.size, grid):
            return None  # the label alone reaches too far
        image = f" of an image of {crop.size[0]} x {crop.size[1]}" if crop.size else ""
        return "crop-region", f"{name} is not the region {crop.region.cells}{image}"
    return None


def mend_crops(item: Item, context: Context, rule: str) -> Item | None:
    """The item with every crop that shows fault `rule` as it should be; None where that cannot be known."""
    found, calls = crops(item, context)
    if rule == "crop-region" and calls != len(found):
        return None
    images, turns = list(item.images["images"]), list(item.messages)
    for crop in reversed(found):  # from the back, so that spans in front stay where they are
        fault = _fault(crop, context.grid)
        if rule == "off-edge":
            box = _inside(crop, context.grid)
        elif fault is None or fault[0] != rule:
            continue
        else:
            box = _mended(crop, rule, context.grid)
        if box is None:
            return None
        if rule == "exif-rotation" and crop.region is not None and crop.facts is not None:
            cells = turned_cells(crop.region.cells, crop.facts.orientation, context.grid)
            turn, (start, end) = turns[crop.region.turn], crop.region.span
            text = turn.content[:start] + write_call("region", cells, context.grid) + turn.content[end:]
            turns[crop.region.turn] = Message(turn.role, text)
        images[crop.index] = join_crop_suffix(crop.file, box)
    return replace(item, messages=tuple(turns), images=item.images | {"images": tuple(images)})


def _mended(crop: Crop, rule: str, grid: int) -> Box | None:
    """The box that the crop should have; None where that takes an image that is not at hand."""
    x1, y1, x2, y2 = crop.box
    if rule == "crop-swapped":
        return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    if crop.size is None:
        return (
            _inside(crop, grid) if crop.region is not None and _fits(crop.box, crop.region.cells, None, grid) else None
        )
    if rule == "exif-rotation" and crop.region is not None and crop.facts is not None:
        margin = _margin(crop.box, crop.region.cells, crop.facts.stored, grid) or 0
        cells = turned_cells(crop.region.cells, crop.facts.orientation, grid)
        return cells_to_box(widen(cells, margin, grid), crop.size, grid)
    if crop.region is not None:
        return cells_to_box(_clamped(crop.region.cells, grid), crop.size, grid)
    box = max(x1, 0), max(y1, 0), min(x2, crop.size[0]), min(y2, crop.size[1])
    return box if box[0] < box[2] and box[1] < box[3] else None


def _inside(crop: Crop, grid: int) -> Box | None:
    """The crop of a call that reaches one cell too far, cut back to the last cell; as it is where it need not be."""
    if crop.region is None or max(crop.region.cells) < grid:
        return crop.box
    cells = _clamped(crop.region.cells, grid)
    if crop.size is not None:
        return cells_to_box(cells, crop.size, grid)
    axes: list[tuple[int, int]] = []
    for low, high in ((0, 2), (1, 3)):
        near, far = crop.box[low], crop.box[high]
        written = _sides(near, far, crop.region.cells[low], crop.region.cells[high], grid)
        edges = {_edges(side, cells[low], cells[high], grid) for side in written}
        if _sides(near, far, cells[low], cells[high], grid):  # cut right, and only the label is wrong
            edges.add((near, far))
        if len(edges) > 1:
            return None  # from the first cell to one after the last: both readings fit, and only the image can tell
        axes += edges
    if len(axes) == 2:
        return axes[0][0], axes[1][0], axes[0][1], axes[1][1]
    return crop.box if _fits(crop.box, cells, None, grid) else None


def answer_room(item: Item, context: Context) -> Iterator[str]:
    """Where the answer has more characters than fit into the item's crops, however small they are set."""
    text = re.sub(r"\s+", " ", item.messages[-1].content.removeprefix(ANSWER_PREFIX)).strip()
    found, _ = crops(item, context)
    area = sum(abs(crop.box[2] - crop.box[0]) * abs(crop.box[3] - crop.box[1]) for crop in found)
    if found and len(text) * GLYPH > area:
        yield f"an answer of {len(text)} characters for crops of {area} pixels, which hold {area // GLYPH} at most"


def _as_stored(crop: Crop, grid: int) -> bool:
    """Whether the crop is right for the picture as stored and wrong for the one that EXIF makes of it."""
    facts = crop.facts
    if facts is None or crop.size is None or not facts.sideways or facts.stored == facts.size:
        return False
    x1, y1, x2, y2 = crop.box
    inside = 0 <= x1 < x2 <= facts.stored[0] and 0 <= y1 < y2 <= facts.stored[1]
    if crop.region is None:  # without a call, only a crop that leaves the upright image shows it
        return False
    cells = crop.region.cells
    return inside and _fits(crop.box, cells, facts.stored, grid) and not _fits(crop.box, cells, facts.size, grid)


def _fits(box: Box, cells: Cells, size: tuple[int, int] | None, grid: int) -> bool:
    """Whether `box` is the region `cells`, widened or not, of an image of this size, or of any where it is None."""
    if size is not None:
        return _margin(box, cells, size, grid) is not None
    return any(
        all(_sides(box[axis], box[axis + 2], wide[axis], wide[axis + 2], grid) for axis in (0, 1))
        for wide in _widenings(cells, grid)
    )


def _margin(box: Box, cells: Cells, size: tuple[int, int], grid: int) -> int | None:
    """The margin at which `cells` give `box` in an image of `size`; None where none does."""
    for margin, wide in enumerate(_widenings(cells, grid)):
        if all(_edges(size[axis], wide[axis], wide[axis + 2], grid) == box[axis::2] for axis in (0, 1)):
            return margin
    return None


def _widenings(cells: Cells, grid: int) -> Iterator[Cells]:
    """`cells` widened by 0, 1, 2, ... on each side, as builders do; those that reach one too far only as they are."""
    return iter([cells]) if max(cells) >= grid else (widen(cells, margin, grid) for margin in range(grid))


def _sides(near: int, far: int, low: int, high: int, grid: int) -> list[int]:
    """Sides in pixels of an image in which cells low..high of an axis run from pixel `near` to `far`.

    The far edge e = (high+1)*W/k truncated leaves W in [e*k/(high+1), (e+1)*k/(high+1)); one of those W must also
    give the near edge. For k = 8, cells 1..3 and the crop 80..320: W is 640..641, and 1*640/8 = 80 fits.
    """
    sides = range(far * grid // (high + 1), (far + 1) * grid // (high + 1) + 2)
    return [side for side in sides if side > 0 and _edges(side, low, high, grid) == (near, far)]


def _edges(side: int, low: int, high: int, grid: int) -> tuple[int, int]:
    """Near and far pixel edge of cells low..high on an axis of `side` pixels (as `regions.cells_to_box`)."""
    near = low * side // grid
    return near, max((high + 1) * side // grid, near + 1)


def _clamped(cells: Cells, grid: int) -> Cells:
    x0, y0, x1, y1 = (min(cell, grid - 1) for cell in cells)
    return x0, y0, x1, y1
