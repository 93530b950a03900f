"""Crops of an item compared with the region calls that asked for them: which disagree, and what they should be.

Calls and crops are paired in order of appearance. Without the image, a crop is compared with its call in its own scale:
on each axis its edges leave few sides that the image can have (`_sides`), and where the region reaches the last cell,
only one. In an item of nested looks (built with `max_looks` over 1) a further call counts cells of the crop before it,
and is judged once that one is right. The names of faults are rows of `relook.data.faults`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from relook.data.images import ImageFacts, split_ref, turned_cells
from relook.data.items import Item
from relook.data.settings import built_settings
from relook.looks import ANSWER_PREFIX, parse_calls, write_call, x_token, y_token
from relook.regions import Box, Cells, cells_in, cells_to_box, join_crop_suffix, widen

GLYPH = 4 * 6  # pixels of the smallest legible character, 3 x 5 and a gap

FactsOf = Callable[[str], ImageFacts | None]  # the facts of an image file; None where it was not looked at


@dataclass(frozen=True)
class Region:
    """A region call: its turn, its place in the turn's text, and its cells as written (they may reach one too far)."""

    turn: int
    span: tuple[int, int]
    cells: Cells

    def clamped(self, grid: int) -> Cells:
        """The cells on the grid."""
        x0, y0, x1, y1 = (min(cell, grid - 1) for cell in self.cells)
        return x0, y0, x1, y1


@dataclass(frozen=True)
class Crop:
    """A crop of an item: its number among `images`, its file and box, its call, and the facts of its file.

    before  the crop whose view the cells of its call count in, widened by `margin`; None: the whole image
    """

    index: int
    file: str
    box: Box
    region: Region | None
    facts: ImageFacts | None
    grid: int
    before: Crop | None = None
    margin: int = 0

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the upright image where it is at hand."""
        return self.facts.size if self.facts is not None and self.facts.problem is None else None

    @property
    def too_far(self) -> bool:
        """Whether the call names a cell beyond the last."""
        return self.region is not None and max(self.region.cells) >= self.grid

    def fault(self) -> tuple[str, str] | None:
        """(row of the table, what was seen), or None."""
        if self.before is not None and self.before.fault() is not None:
            return None
        x1, y1, x2, y2 = self.box
        name, size, region = join_crop_suffix(self.file, self.box), self.size, self.region
        if x1 > x2 or y1 > y2:
            return "crop-swapped", f"{name} has min and max swapped"
        if self._as_stored():
            assert self.facts is not None
            turn = self.facts.orientation
            return "exif-rotation", f"{name} was cut before EXIF orientation {turn} turned the image"
        if x1 == x2 or y1 == y2 or min(x1, y1) < 0:
            return "crop-outside", f"{name} is empty or starts outside the image"
        if size is not None and (x2 > size[0] or y2 > size[1]):
            return "crop-outside", f"{name} leaves the image of {size[0]} x {size[1]} pixels"
        if region is None or self._fits(region.cells, size):
            return None
        if self.too_far and self._fits(region.clamped(self.grid), size):
            return None  # the label alone reaches too far
        image = f" of an image of {size[0]} x {size[1]}" if size else ""
        if (expected := self.nested) is not None and self.before is not None:
            image = f" of the view {_text(self.before.box)} in turn {region.turn + 1}; expected {_text(expected)}"
        return "crop-region", f"{name} is not the region {region.cells}{image}"

    @property
    def view(self) -> Box | None:
        """The view that its call counts in; None where that is the whole image, or a crop before that shows nothing."""
        x1, y1, x2, y2 = (0, 0, 0, 0) if self.before is None else self.before.box
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None

    @property
    def nested(self) -> Box | None:
        """What its call, cut back to the grid, shows of the view before; None where there is none."""
        if self.view is None or self.region is None:
            return None
        return cells_in(self.region.clamped(self.grid), self.view, self.grid, self.margin)

    def mended(self, rule: str) -> Box | None:
        """The box that the crop should have; None where that takes an image that is not at hand."""
        x1, y1, x2, y2 = self.box
        size, region, grid = self.size, self.region, self.grid
        if rule == "crop-swapped":
            return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        if self.nested is not None:
            return self.nested
        if size is None:
            return self.on_the_grid() if region is not None and self._fits(region.cells, None) else None
        if rule == "exif-rotation" and region is not None and self.facts is not None:
            margin = _margin(self.box, region.cells, self.facts.stored, grid) or 0
            return cells_to_box(widen(self.turned(), margin, grid), size, grid)
        if region is not None:
            return cells_to_box(region.clamped(grid), size, grid)
        box = max(x1, 0), max(y1, 0), min(x2, size[0]), min(y2, size[1])
        return box if box[0] < box[2] and box[1] < box[3] else None

    def turned(self) -> Cells:
        """The cells of a call on the picture as stored, as those of the upright one."""
        assert self.region is not None and self.facts is not None
        return turned_cells(self.region.cells, self.facts.orientation, self.grid)

    def on_the_grid(self) -> Box | None:
        """The crop of a call that reaches one cell too far, cut back to the last cell; as it is where it need not be.

        None where several boxes are possible: from the first cell to one after the last, only the image can tell.
        """
        if self.region is None or not self.too_far:
            return self.box
        cells, grid = self.region.clamped(self.grid), self.grid
        if self.before is not None:
            return self.nested or self.box  # the crop before is mended first
        if self.size is not None:
            return cells_to_box(cells, self.size, grid)
        axes: list[tuple[int, int]] = []
        for low, high in ((0, 2), (1, 3)):
            near, far = self.box[low], self.box[high]
            written = _sides(near, far, self.region.cells[low], self.region.cells[high], grid)
            edges = {_edges(side, cells[low], cells[high], grid) for side in written}
            if _sides(near, far, cells[low], cells[high], grid):  # cut right, and only the label is wrong
                edges.add((near, far))
            if len(edges) > 1:
                return None
            axes += edges
        if len(axes) == 2:
            return axes[0][0], axes[1][0], axes[0][1], axes[1][1]
        return self.box if self._fits(cells, None) else None

    def _as_stored(self) -> bool:
        """Whether the crop is right for the picture as stored and wrong for the one that EXIF makes of it.

        Without a call nothing shows it.
        """
        facts, (x1, y1, x2, y2) = self.facts, self.box
        if facts is None or self.region is None or self.size is None or not facts.sideways or self.before is not None:
            return False
        if facts.stored == facts.size or not (0 <= x1 < x2 <= facts.stored[0] and 0 <= y1 < y2 <= facts.stored[1]):
            return False
        return self._fits(self.region.cells, facts.stored) and not self._fits(self.region.cells, facts.size)

    def _fits(self, cells: Cells, size: tuple[int, int] | None) -> bool:
        """Whether the box is that of `cells`, widened or not, in an image of this size, or of any where it is None."""
        if self.before is not None:
            return max(cells) < self.grid and self.box == self.nested
        if size is not None:
            return _margin(self.box, cells, size, self.grid) is not None
        return any(
            all(_sides(self.box[axis], self.box[axis + 2], wide[axis], wide[axis + 2], self.grid) for axis in (0, 1))
            for wide in _widenings(cells, self.grid)
        )


def region_calls(item: Item, grid: int) -> list[Region]:
    """The region calls of an item whose cells can be read, `<|x_8|>` on 8 cells included."""
    said = ((n, t.content) for n, t in enumerate(item.messages) if t.role == "assistant" and "<|" in t.content)
    return [Region(number, span, cells) for number, text in said for cells, span in _regions(text, grid)]


@lru_cache(maxsize=1 << 14)  # a set of any size has few distinct calls: 1296 regions on 8 x 8 cells
def _regions(content: str, grid: int) -> tuple[tuple[Cells, tuple[int, int]], ...]:
    too_far = x_token(grid) in content or y_token(grid) in content
    calls = parse_calls(content, grid + 1 if too_far else grid)
    return tuple((c.cells, c.span) for c in calls if c.look == "region" and c.cells is not None and c.problem is None)


def crops_of(item: Item, grid: int, facts_of: FactsOf, settings: Mapping[str, Any]) -> tuple[list[Crop], int]:
    """The crops of an item, each with its call where there are as many of them; and the number of calls.

    Args:
        settings: with which the item was built (`data.settings`), as far as it does not say so itself.
    """
    known = {**settings, **built_settings(item.extra)}
    refs = [(i, *split_ref(ref)) for i, ref in enumerate(item.images["images"]) if isinstance(ref, str) and "," in ref]
    found = [(i, file, box) for i, file, box in refs if box is not None]
    regions = region_calls(item, grid)
    paired: list[Region | None] = [*regions] if len(regions) == len(found) else [None] * len(found)
    crops: list[Crop] = []
    for (i, file, box), region in zip(found, paired, strict=True):
        before = _before(crops, region, item) if known.get("max_looks", 1) > 1 else None
        crops.append(Crop(i, file, box, region, facts_of(file), grid, before, known.get("margin", 0)))
    return crops, len(regions)


def _before(crops: list[Crop], region: Region | None, item: Item) -> Crop | None:
    """The crop shown last when a call was made, of those before it, unless a question was answered in between."""
    shown = [(crop, crop.region.turn) for crop in crops if crop.region and region and crop.region.turn < region.turn]
    return shown[-1][0] if region is not None and shown and _goes_on(item, shown[-1][1], region.turn) else None


def begins(item: Item, calls: Sequence[Region], call: Region) -> bool:
    """Whether a call is of the first turn of region calls of its answer, which count in the whole image."""
    before = max((each.turn for each in calls if each.turn < call.turn), default=None)
    return before is None or not _goes_on(item, before, call.turn)


def _goes_on(item: Item, turn: int, later: int) -> bool:
    """Whether a call's turn and a later one are of one answer: no question was answered in between."""
    return all(parse_calls(each.content) for each in item.messages[turn:later] if each.role == "assistant")


def crop_faults(item: Item, grid: int, facts_of: FactsOf, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(row of the table, what was seen): one fault at most for each crop, and one where calls and crops do not pair.

    Calls that cannot be read are another row's fault, and are counted as calls.
    """
    found, calls = crops_of(item, grid, facts_of, settings)
    crops = len(found) + sum(isinstance(ref, tuple) for ref in item.images["images"])  # of images in memory
    if calls != crops:
        said = (call for turn in item.messages if turn.role == "assistant" for call in parse_calls(turn.content, grid))
        if crops != sum(call.look == "region" for call in said):
            yield "crop-region", f"{calls} region calls that can be read for {crops} crops"
    yield from filter(None, (crop.fault() for crop in found))


def mend_crops(item: Item, grid: int, facts_of: FactsOf, rule: str, settings: Mapping[str, Any]) -> Item | None:
    """The item with every crop that shows fault `rule` as it should be; None where that cannot be known."""
    found, calls = crops_of(item, grid, facts_of, settings)
    if rule == "crop-region" and calls != len(found):
        return None
    if rule == "exif-rotation" and any(crop.before for crop in found):
        return None  # the cells of nested calls would have to turn as well
    images, turns = list(item.images["images"]), list(item.messages)
    for crop in reversed(found):  # from the back, so that spans in front stay where they are
        fault = crop.fault()
        if rule != "off-edge" and (fault is None or fault[0] != rule):
            continue
        box = crop.on_the_grid() if rule == "off-edge" else crop.mended(rule)
        if box is None:
            return None
        if rule == "exif-rotation" and crop.region is not None:
            turn, (start, end) = turns[crop.region.turn], crop.region.span
            text = turn.content[:start] + write_call("region", crop.turned(), grid) + turn.content[end:]
            turns[crop.region.turn] = replace(turn, content=text)
        images[crop.index] = join_crop_suffix(crop.file, box)
    return replace(item, messages=tuple(turns), images=item.images | {"images": tuple(images)})


def answer_room(item: Item, grid: int) -> Iterator[str]:
    """Where the answer has more characters than fit into the item's crops, however small they are set.

    Of crops that nest, into the last ones, which lie in those before.
    """
    text = re.sub(r"\s+", " ", item.messages[-1].content.removeprefix(ANSWER_PREFIX)).strip()
    crops = crops_of(item, grid, lambda file: None, {})[0]
    around = {crop.before.index for crop in crops if crop.before is not None}
    boxes = [crop.box for crop in crops if crop.index not in around]
    area = sum(abs(x2 - x1) * abs(y2 - y1) for x1, y1, x2, y2 in boxes)
    if boxes and len(text) * GLYPH > area:
        yield f"an answer of {len(text)} characters for crops of {area} pixels, which hold {area // GLYPH} at most"


def _text(box: Box) -> str:
    return ",".join(map(str, box))


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
