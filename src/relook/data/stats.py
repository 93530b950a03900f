"""What a set holds, in numbers: looks, regions and their sizes, the cells they use, lengths.

One pass over the items; what is kept is counts of small whole numbers, so memory does not grow with the set. No image
is decoded and no model asked: sizes are in cells and shares of the image, lengths in characters.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.data.build import as_item
from relook.data.crops import begins, region_calls
from relook.data.faults import Context
from relook.data.forms import Source
from relook.data.images import file_size, place_image
from relook.data.items import IMAGE_KEYS, PLACEHOLDERS, Item, Question
from relook.data.reader import folder_of
from relook.data.rules import BuildOptions
from relook.data.settings import built_settings
from relook.errors import UserError
from relook.io import replacing_file
from relook.looks import ANSWER_PREFIX, LOOKS, parse_calls, strip_calls
from relook.regions import GRID

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHADES = " ░▒▓█"
_BAR = 30  # characters of the longest bar


@dataclass
class Stats:
    """Counts of a set.

    looks      items by the looks they ask for ("region", "clip + region", "none")
    regions    region calls of an item -> items
    sizes      (width, height) of a region in cells -> regions; as `cells` of regions that count in the whole image
    cells      [row][column] -> regions that hold the cell; (0, 0) is the top left
    lengths    "question", "answer" (characters), "turns", "images" -> length -> items
    unread     region calls that cannot be placed on the grid
    """

    path: str
    grid: int = GRID
    items: int = 0
    unread: int = 0
    looks: Counter[str] = field(default_factory=Counter)
    regions: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    cells: list[list[int]] = field(default_factory=list)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cells = self.cells or [[0] * self.grid for _ in range(self.grid)]
        self.lengths = self.lengths or {what: Counter() for what in ("question", "answer", "turns", "images")}

    def add(self, item: Item) -> None:
        """Count one more item."""
        self.items += 1
        said = [turn.content for turn in item.messages if turn.role == "assistant"]
        calls = [call for text in said if "<|" in text for call in parse_calls(text, self.grid)]
        asked = {call.look for call in calls}
        self.looks[" + ".join(look for look in LOOKS if look in asked) or "none"] += 1
        named = region_calls(item, self.grid)
        regions = [region for region in named if max(region.cells) < self.grid]
        nested = built_settings(item.extra).get("max_looks", 1) > 1
        for x0, y0, x1, y1 in (each.cells for each in regions if not nested or begins(item, named, each)):
            self.sizes[x1 - x0 + 1, y1 - y0 + 1] += 1
            for row in self.cells[y0 : y1 + 1]:
                row[x0 : x1 + 1] = [count + 1 for count in row[x0 : x1 + 1]]
        self.regions[len(regions)] += 1
        self.unread += sum(call.look == "region" for call in calls) - len(regions)
        question = next((turn.content for turn in item.messages if turn.role == "user"), "")
        for mark in PLACEHOLDERS.values():
            question = question.replace(mark, "")
        answer = strip_calls(said[-1], self.grid).removeprefix(ANSWER_PREFIX) if said else ""
        images = sum(len(item.images[key]) for key in IMAGE_KEYS)
        lengths = (len(question.strip()), len(answer.strip()), len(item.messages), images)
        for counts, length in zip(self.lengths.values(), lengths, strict=True):
            counts[length] += 1

    def areas(self) -> Counter[int]:
        """Regions by their share of the image, in whole percent."""
        areas: Counter[int] = Counter()
        for (width, height), count in self.sizes.items():
            areas[round(100 * width * height / self.grid**2)] += count
        return areas

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "items": self.items,
            "looks": dict(self.looks.most_common()),
            "regions_per_item": dict(sorted(self.regions.items())),
            "region_sizes": [[*size, count] for size, count in sorted(self.sizes.items())],
            "region_area_percent": _spread(self.areas()),
            "regions_not_on_the_grid": self.unread,
            "cells": self.cells,
            "lengths": {what: _spread(counts) for what, counts in self.lengths.items()},
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.items} items", "", "looks"]
        top = max(self.looks.values(), default=1)
        for look, count in self.looks.most_common():
            lines.append(f"  {look:<22}{count:>9} {100 * count / self.items:5.1f} %  {'█' * (_BAR * count // top)}")
        lines += ["", f"{'':<22}{'least':>9}{'median':>9}{'95 %':>9}{'most':>9}"]
        units = {"question": "question (characters)", "answer": "answer (characters)"}
        rows = {units.get(what, what): counts for what, counts in self.lengths.items()}
        for what, counts in (
            rows | {"regions of an item": self.regions, "region, % of the image": self.areas()}
        ).items():
            if counts:
                least, median, high, most = _spread(counts).values()
                lines.append(f"  {what:<22}{least:>7}{median:>9}{high:>9}{most:>9}")
        if regions := sum(self.sizes.values()):
            off_grid = f" ({self.unread} calls are not on the grid)" if self.unread else ""
            lines += ["", f"cells used by {regions} regions, % of them{off_grid}"]
            top = max(map(max, self.cells))
            for row in self.cells:
                shades = (_SHADES[min(cell * len(_SHADES) // top, len(_SHADES) - 1)] for cell in row)
                lines.append("  " + "".join(f"{s}{100 * c / regions:3.0f} " for s, c in zip(shades, row)).rstrip())  # noqa: B905
        return "\n".join(lines)


def stats(
    path: str | Path, grid: int | None = None, progress: Callable[[int], None] | None = None, **reading: Any
) -> Stats:
    """Count the items of a source of any form; of its questions, those that training makes of them.

    Raises:
        UserError: a record that cannot be used (file and line), or no items.
    """
    source = Source(path, **reading)
    settings = source.settings()
    found = Stats(str(path), grid or settings.get("grid", GRID))
    options = BuildOptions(**{**settings, "grid": found.grid})
    for thing in source.things():
        if isinstance(thing, Question) and thing.size is None and isinstance(thing.image, str):
            thing = replace(thing, size=file_size(place_image(thing.image, folder_of(source.path)), thing.where))
        found.add(as_item(thing, options, Context()))
        if progress is not None and found.items % 1000 == 0:
            progress(found.items)
    if not found.items:
        raise UserError(f"{path}: holds no items; build some with `relook data build`")
    return found


def plot(found: Stats, place: str | Path) -> None:
    """Draw the numbers as one picture (.png, .svg or .pdf), written aside and then renamed."""
    suffix = Path(place).suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg", "pdf"):
        raise UserError(f"--plot: {place} is no picture; give a name that ends in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib, which is not installed; pip install 'relook[train]'") from None
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    figure.suptitle(f"{Path(found.path).name}: {found.items} items", fontsize=13)
    _draw(figure, found)
    with replacing_file(place) as aside:
        figure.savefig(aside, format=suffix, dpi=130)


def _draw(figure: Figure, found: Stats) -> None:
    blue = "#33619e"
    (looks, sizes, cells), (regions, questions, answers) = figure.subplots(2, 3)
    names = [name for name, _ in found.looks.most_common()][::-1]
    looks.barh(names, [found.looks[name] for name in names], color=blue)
    looks.set(title="looks", xlabel="items")
    for axes, counts, title, unit, what in (
        (sizes, found.areas(), "region sizes", "% of the image", "regions"),
        (regions, found.regions, "regions of an item", "", "items"),
        (questions, found.lengths["question"], "questions", "characters", "items"),
        (answers, found.lengths["answer"], "answers", "characters", "items"),
    ):
        values = sorted(counts)
        last = _spread(counts)["most"] if values else 0
        bins = [edge - 0.5 for edge in range(last + 2)] if last <= 40 else 40
        axes.hist(values, bins=bins, weights=[counts[value] for value in values], color=blue)
        axes.set(title=title, xlabel=unit, ylabel=what)
        axes.locator_params(axis="x", integer=True)
    regions_drawn = sum(found.sizes.values())
    shares = [[100 * cell / max(regions_drawn, 1) for cell in row] for row in found.cells]
    image = cells.imshow(shares, cmap="magma", vmin=0)
    cells.set(title="cells used", xlabel="x", ylabel="y", xticks=range(found.grid), yticks=range(found.grid))
    figure.colorbar(image, ax=cells, label="% of regions")
    for axes in (looks, sizes, regions, questions, answers):
        axes.spines[["top", "right"]].set_visible(False)


def _spread(counts: Counter[int]) -> dict[str, int]:
    """Least, median, 95th percentile and most of counted numbers; {} for none."""
    if not counts:
        return {}
    values = sorted(counts)
    passed = list(accumulate(counts[value] for value in values))  # how many are no larger
    median, high = (values[bisect_left(passed, passed[-1] * share)] for share in (0.5, 0.95))
    return {"least": values[0], "median": median, "p95": high, "most": values[-1]}
