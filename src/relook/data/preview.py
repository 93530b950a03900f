"""A page to look at a set of items: each sampled item with its image, grid, regions, crops, turns and faults.

One HTML file with everything inside it: pictures as data, no script, nothing fetched. The page is the
template `preview.html.jinja`.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from relook.data.build import BuildReport, as_item
from relook.data.crops import Crop, crops_of
from relook.data.faults import Context, found_faults
from relook.data.forms import Source
from relook.data.images import FactsBelow, place_image, split_ref
from relook.data.items import IMAGE_KEYS, PLACEHOLDERS, Item, item_question
from relook.data.reader import Record, folder_of, readable
from relook.data.rules import BuildOptions
from relook.errors import UserError
from relook.io import replacing
from relook.regions import GRID, cells_in, join_crop_suffix, upright
from relook.views import load_item_image

if TYPE_CHECKING:
    from PIL import Image

SIDE, CROP_SIDE = 640, 300  # longest side in pixels of pictures in the page
COLORS = ("#e6541c", "#00897b", "#5e35b1", "#c2185b", "#0277bd", "#797900")
ANNOTATED, FOUND = "#2e7d32", {"ocr": "#f9a825", "detector": "#8e24aa"}  # of a question's boxes, by what found them
_CONTROL = re.compile(r"(<\|[^<>|\s]*\|>)")
_MARKS = re.compile("(" + "|".join(re.escape(mark) for mark in PLACEHOLDERS.values()) + ")")


def preview(
    path: str | Path,
    page: str | Path,
    *,
    n: int = 24,
    seed: int = 0,
    grid: int | None = None,
    image_root: str | Path | None = None,
    **reading: Any,
) -> str:
    """Write `page` with `n` items drawn from the whole set (all where there are fewer), in the file's order.

    Args:
        path: items, or a source of any form, of whose questions items are made as training does.
        reading: of `forms.Source`: format, columns, ask, split, units.
    """
    from jinja2 import Environment, FileSystemLoader

    path = Path(path)
    if Path(page).resolve() == path.resolve():
        raise UserError(f"{page} is the set itself; give another place for the page")
    source = Source(path, image_root=image_root, **reading)
    drawn, total = _sampled(map(readable, source.scan()), n, seed)
    if not total:
        raise UserError(f"{path}: holds no items; build some with `relook data build`")
    root = str(image_root if image_root is not None else folder_of(path))
    settings = source.settings()
    grid = grid or settings.get("grid", GRID)
    context = Context(grid=grid, root=root, strict=image_root is not None, settings={**settings, "grid": grid})
    context.facts = FactsBelow(root, context.strict).__getitem__
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"marked": _MARKS.split, "controls": _CONTROL.split}
    template = environment.get_template("preview.html.jinja")
    title = f"{path.name}: {len(drawn)} of {total} items"
    with TemporaryDirectory() as folder, replacing(page) as file:
        items = (_shown(record, n, context, source, Path(folder)) for n, record in drawn)
        for text in template.generate(title=title, grid=grid, items=items):
            file.write(text.encode("utf-8", "replace").decode())  # half characters
        source.fit.refuse(path)
    return f"{page}: {len(drawn)} of {total} items"


def _sampled(records: Iterable[Record], n: int, seed: int) -> tuple[list[tuple[int, Record]], int]:
    """`n` records drawn from all, each with its number (from 1), in their order; and how many there are."""
    draw, total = random.Random(seed), 0
    held: list[tuple[int, Record]] = []
    for total, record in enumerate(records, start=1):
        at = total - 1 if total <= n else draw.randrange(total)
        if at < n:
            held[at : at + 1] = [(total, record)]
    return sorted(held, key=lambda pair: pair[0]), total


def _shown(record: Record, number: int, context: Context, source: Source, folder: Path) -> dict[str, Any]:
    """What the template shows of a record: its number, faults, pictures and turns."""
    shown: dict[str, Any] = {"number": number, "line": record.line}
    context.number = number
    try:
        item = _in_files(
            as_item(source.thing(record), BuildOptions(**context.settings), context, BuildReport(fit=source.fit)),
            folder,
            number,
        )
    except UserError as error:
        return shown | {"faults": [("form", str(error).removeprefix(f"{record.where}: "))]}
    turns = [(turn.role, turn.content) for turn in item.messages]
    return shown | {"faults": list(found_faults(item, context)), "figures": _figures(item, context), "turns": turns}


def _in_files(item: Item, folder: Path, number: int) -> Item:
    """The item with its images in memory (of a dataset) written as files."""

    def written(ref: Any) -> Any:
        image, box = ref if isinstance(ref, tuple) else (ref, None)
        if not hasattr(image, "save"):
            return ref
        path = folder / f"{number}-{id(image)}.png"
        upright(image).save(path)
        return str(path) if box is None else join_crop_suffix(str(path), box)

    return item.map_images(written)


def _figures(item: Item, context: Context) -> Iterator[dict[str, Any]]:
    """Every image of the item once with its grid and regions, then every crop, then the images encoded again."""
    crops = crops_of(item, context.grid, context.facts, context.settings)[0]
    number = {crop.index: i for i, crop in enumerate(crops)}
    for index, ref in enumerate(item.images["images"]):
        if (i := number.get(index)) is not None:
            yield _figure(str(ref), context, f"region {i}") | {"color": COLORS[i % len(COLORS)]}
        else:
            shown = [(i, crop) for i, crop in enumerate(crops) if crop.file == ref]
            yield _figure(str(ref), context, "image", shown) | (_boxes(item) if index == 0 else {})
    for key in IMAGE_KEYS[1:]:
        yield from (_figure(str(ref), context, f"encoded again ({key[:-7]})") for ref in item.images[key])


def _boxes(item: Item) -> dict[str, Any]:
    """The boxes that the item keeps of its question, their color, and in words where they come from."""
    try:
        question = item_question(item) if item.extra.get("bboxs") else None
    except UserError:
        question = None
    if question is None:
        return {}
    said, color = "annotated", ANNOTATED
    if found := question.located:
        said = f"found by {found.get('by')} ({found.get('with')}), score {found.get('score')}"
        color = FOUND.get(str(found.get("by")), COLORS[0])
    return {"boxes": question.boxes, "source": said, "source_color": color}


def _figure(ref: str, context: Context, what: str, crops: list[tuple[int, Crop]] | None = None) -> dict[str, Any]:
    """One picture with its caption; `crops` are drawn over a whole image, with its grid."""
    file, box = split_ref(ref)
    where = "" if box is None else f" {','.join(map(str, box))}"
    figure: dict[str, Any] = {"kind": "part" if crops is None else "whole", "what": what, "where": where}
    figure["name"] = Path(file).name
    try:
        image = load_item_image(place_image(ref, context.root, strict=context.strict))
    except UserError as error:
        return figure | {"problem": str(error).partition(";")[0]}
    overlay = [_overlay(i, crop, image.size, context.grid) for i, crop in crops or ()]
    data = _data(image, CROP_SIDE if crops is None else SIDE)
    return figure | {"width": image.width, "height": image.height, "data": data, "crops": overlay}


def _overlay(number: int, crop: Crop, size: tuple[int, int], grid: int) -> dict[str, Any]:
    """A numbered crop, the cells of its call and the view that they count in, in pixels of the picture."""
    x1, y1, x2, y2 = crop.box
    box = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    view = crop.view
    region = None if crop.too_far or (crop.before is not None and view is None) else crop.region
    cells = None if region is None else cells_in(region.cells, view or (0, 0, *size), grid)
    at = min(max(box[0], 0), size[0]), min(max(box[1], 0), size[1])
    return {"number": number, "color": COLORS[number % len(COLORS)], "box": box, "cells": cells, "view": view, "at": at}


def _data(image: Image.Image, side: int) -> str:
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
