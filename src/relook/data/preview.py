"""A page to look at a set of items: each sampled item with its image, grid, regions, crops, turns and faults.

One HTML file with everything inside it: pictures as data, no script, nothing fetched. Its frame is `preview.html`.
"""

from __future__ import annotations

import base64
import io
import random
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from relook.data.crops import Crop, crops_of
from relook.data.faults import Context, found_faults
from relook.data.images import FactsBelow, place_image, split_ref
from relook.data.items import IMAGE_KEYS, PLACEHOLDERS, Item
from relook.data.reader import Record, folder_of, read_records
from relook.errors import UserError
from relook.io import replacing
from relook.regions import GRID, Box, cells_to_box
from relook.views import load_item_image

if TYPE_CHECKING:
    from PIL import Image

SIDE, CROP_SIDE = 640, 300  # longest side in pixels of pictures in the page
COLORS = ("#e6541c", "#00897b", "#5e35b1", "#c2185b", "#0277bd", "#797900")
_CONTROL = re.compile(r"(<\|[^<>|\s]*\|>)")
_MARKS = re.compile("(" + "|".join(re.escape(mark) for mark in PLACEHOLDERS.values()) + ")")


def preview(
    path: str | Path,
    page: str | Path,
    *,
    n: int = 24,
    seed: int = 0,
    grid: int = GRID,
    image_root: str | Path | None = None,
) -> str:
    """Write `page` with `n` items drawn from the whole set (all where there are fewer), in the file's order."""
    path = Path(path)
    if Path(page).resolve() == path.resolve():
        raise UserError(f"{page} is the set itself; give another place for the page")
    drawn, total = _sampled(read_records(path), n, seed)
    if not total:
        raise UserError(f"{path}: holds no items; build some with `relook data build`")
    root = str(image_root if image_root is not None else folder_of(path))
    context = Context(grid=grid, root=root, strict=image_root is not None)
    context.facts = FactsBelow(root, context.strict).__getitem__
    title = f"{escape(path.name)}: {len(drawn)} of {total} items"
    template = Path(__file__).with_name("preview.html").read_text(encoding="utf-8").replace("$title", title)
    head, _, foot = template.partition("$articles")
    with replacing(page) as file:
        file.write(head)
        for number, record in drawn:
            context.number = number
            file.write(_article(record, number, context))
        file.write(foot)
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


def _article(record: Record, number: int, context: Context) -> str:
    head = f"<h2>item {number} <small>line {record.line}</small></h2>"
    try:
        item = Item.from_dict(record.value, record.where)
    except UserError as error:
        why = escape(str(error).removeprefix(f"{record.where}: "))
        return f'<article>{head}<ul class="faults"><li><b>form</b> {why}</li></ul></article>\n'
    rows = "".join(f"<li><b>{name}</b> {_text(detail)}</li>" for name, detail in found_faults(item, context))
    listed = f'<ul class="faults">{rows}</ul>' if rows else ""
    turns = "".join(_turn(turn.role, turn.content) for turn in item.messages)
    shown = f'{_pictures(item, context)}<div class="turns">{turns}</div>'
    return f'<article>{head}{listed}<div class="item">{shown}</div></article>\n'


def _turn(role: str, content: str) -> str:
    parts = [
        f'<code class="call">{escape(part[2:-2])}</code>' if i % 2 else _text(part)
        for i, part in enumerate(_CONTROL.split(content))
    ]
    body = "".join(parts) or '<em class="none">nothing</em>'
    return f'<div class="turn {role}"><span>{role}</span><p>{body}</p></div>'


def _text(text: str) -> str:
    """Escaped, placeholders marked, half characters replaced (a page is UTF-8)."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(
        f'<code class="mark">{escape(part)}</code>' if i % 2 else escape(part)
        for i, part in enumerate(_MARKS.split(whole))
    )


# ---- pictures


def _pictures(item: Item, context: Context) -> str:
    """Every image of the item once with its grid and regions, then every crop, then the images encoded again."""
    numbered = list(enumerate(crops_of(item, context.grid, context.facts)[0]))
    number = {crop.index: i for i, crop in numbered}
    figures = []
    for index, ref in enumerate(item.images["images"]):
        if index in number:
            i = number[index]
            figures.append(_figure(str(ref), context, f"region {i}", CROP_SIDE, color=COLORS[i % len(COLORS)]))
        else:
            shown = [(i, crop) for i, crop in numbered if crop.file == ref]
            figures.append(_figure(str(ref), context, "image", SIDE, shown))
    for key in IMAGE_KEYS[1:]:
        what = f"encoded again ({key.removesuffix('_images')})"
        figures += [_figure(str(ref), context, what, CROP_SIDE) for ref in item.images[key]]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _figure(
    ref: str, context: Context, what: str, side: int, shown: list[tuple[int, Crop]] | None = None, color: str = ""
) -> str:
    """One picture with its caption; grid and numbered crops are drawn over a whole image (`shown` is not None)."""
    file, box = split_ref(ref)
    style = f' style="--c:{color}"' if color else ""
    kind = "part" if shown is None else "whole"
    where = "" if box is None else f" {','.join(map(str, box))}"
    caption = f"<figcaption><b>{escape(what)}</b>{where} {_text(Path(file).name)}</figcaption>"
    try:
        image = load_item_image(place_image(ref, context.root, strict=context.strict))
    except UserError as error:
        why = str(error).partition(";")[0]
        return f'<figure class="{kind} missing"{style}><p>{_text(why)}</p>{caption}</figure>'
    overlay = "" if shown is None else _overlay(image.size, shown, context.grid)
    width, height = image.size
    picture = f'<img width="{width}" height="{height}" alt="{escape(what)}" src="{_data(image, side)}">'
    return f'<figure class="{kind}"{style}><div class="frame">{picture}{overlay}</div>{caption}</figure>'


def _data(image: Image.Image, side: int) -> str:
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def _overlay(size: tuple[int, int], shown: list[tuple[int, Crop]], grid: int) -> str:
    """Grid, cells and numbered crops as lines over a picture, in its own pixels."""
    width, height = size
    lines = "".join(f"M{i * width / grid:.1f} 0V{height}M0 {i * height / grid:.1f}H{width}" for i in range(1, grid))
    shapes = [f'<path class="grid" d="{lines}"/>']
    unit = max(width, height) / 100
    for i, crop in shown:
        x1, y1, x2, y2 = crop.box
        color, box = COLORS[i % len(COLORS)], (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        if crop.region is not None and not crop.too_far:
            shapes.append(_rectangle("cells", cells_to_box(crop.region.cells, size, grid), color))
        shapes.append(_rectangle("crop", box, color))
        x, y = min(max(box[0], 0), width), min(max(box[1], 0), height)
        shapes.append(
            f'<g class="badge"><rect x="{x:.1f}" y="{y:.1f}" width="{3.4 * unit:.1f}" height="{3.8 * unit:.1f}" '
            f'fill="{color}"/><text x="{x + 1.7 * unit:.1f}" y="{y + 2.9 * unit:.1f}" font-size="{2.8 * unit:.1f}">'
            f"{i}</text></g>"
        )
    return f'<svg viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'


def _rectangle(kind: str, box: Box, color: str) -> str:
    x1, y1, x2, y2 = box
    return f'<rect class="{kind}" x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}" stroke="{color}"/>'
