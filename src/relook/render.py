"""The saved picture of an answer: question, answer, the image with its grid and boxes, and what every look saw.

Draws a `trace.Answer` with Pillow. Two layouts: looks stand in a column beside a tall image, or in rows below a wide
one. Positions are pixels of the picture, (0, 0) top left.
Pillow and NumPy are imported inside functions, so that importing relook stays quick.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from relook.looks import LOOKS
from relook.regions import Box, cells_to_box, token_area, upright
from relook.trace import Answer, Look

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

Color = tuple[int, int, int]

PAPER: Color = (246, 247, 250)
INK: Color = (24, 29, 44)
SOFT: Color = (98, 107, 128)
WARN: Color = (186, 38, 38)
DIM = (24, 30, 52, 64)  # laid over what no look saw
GRID_LINE = (72, 104, 170, 96)
ACCENTS: tuple[Color, ...] = ((230, 84, 28), (0, 137, 123), (94, 53, 177), (194, 24, 91), (2, 119, 189), (121, 121, 0))
# perceptually even from dark to bright (anchors of matplotlib's "magma")
HEAT = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))

MARGIN, GAP, AXIS = 32, 28, 22
TALL_PANEL, WIDE_PANEL = (620, 860), (1120, 620)  # room for the image: beside its looks, above its looks
COLUMN = 460  # width of a look beside the image
LEAST_WIDTH = 700  # of the picture, so that a question has room
MOST_ENLARGED = 8
MOST_LOOKS = 6
MOST_LINES = 10  # of any one text


@dataclass
class _Card:
    """One look, ready to be placed. `source` is its box in pixels of the image, None when it has none of its own."""

    view: "Image.Image | None"
    caption: list[tuple[str, Color, int]]  # text, color, font size
    accent: Color
    source: Box | None = None


def render(answer: Answer) -> "Image.Image":
    """The picture of `answer`, RGB, up to about 1200 pixels wide; at least the text when there is no image."""
    from PIL import Image

    image = None if answer.image is None else upright(answer.image)
    beside = image is None or image.width <= 1.35 * image.height
    shown = answer.looks[:MOST_LOOKS]
    room = TALL_PANEL if beside else WIDE_PANEL
    panel, scale = (None, 1.0) if image is None else _panel(answer, image, shown, room)
    width_left = (panel.width + AXIS if panel else 0) + (GAP + COLUMN if shown and beside else 0)
    width = max(LEAST_WIDTH, width_left) + 2 * MARGIN

    head = _head(answer, width - 2 * MARGIN)
    top = MARGIN + head.height + GAP
    left = MARGIN + (AXIS if panel else 0)
    panel_top = top + (AXIS if panel else 0)
    panel_bottom = panel_top + panel.height if panel else top
    if beside:
        x = left + panel.width + GAP if panel else MARGIN
        seen = sum(look.problem is None for look in shown) or 1
        untaken = 90 * (len(shown) - seen)  # about the text of a look that was not taken
        height = max((panel_bottom - panel_top - untaken - GAP * (seen - 1)) // seen, 150)
        places = _column(_cards(answer, image, shown, (width - MARGIN - x, height)), x, panel_top)
    else:
        across = min(len(shown), 3) or 1
        room = ((width - 2 * MARGIN - GAP * (across - 1)) // across, 420)
        places = _rows(_cards(answer, image, shown, room), across, room[0], panel_bottom + GAP)
    bottom = max([panel_bottom, *(y + _card_height(card) for card, _, y in places)])
    foot = _foot(answer, width - 2 * MARGIN)

    canvas = Image.new("RGB", (width, bottom + GAP + foot.height + MARGIN), PAPER)
    canvas.paste(head, (MARGIN, MARGIN))
    if panel is not None:
        canvas.paste(panel, (left, panel_top))
        _axes(canvas, (left, panel_top), panel.size, answer.grid)
        if beside:
            _beams(canvas, places, (left, panel_top), panel.width, scale)
    for card, x, y in places:
        _place(canvas, card, x, y)
    canvas.paste(foot, (MARGIN, bottom + GAP))
    return canvas


# -- the image with its grid and boxes -------------------------------------------------------------------------------


def _panel(
    answer: Answer, image: "Image.Image", looks: list[Look], room: tuple[int, int]
) -> tuple["Image.Image", float]:
    """The image scaled into `room` with grid, cells and boxes; and the scale."""
    from PIL import Image, ImageDraw

    scale = _scale(image.size, room)
    panel = _resized(image, scale).convert("RGBA")
    boxes = [(i, look, look.box) for i, look in enumerate(looks) if look.kind == "region" and look.box is not None]
    dim = Image.new("RGBA", panel.size, DIM if boxes else (0, 0, 0, 0))
    for _, _, box in boxes:
        left, top, right, bottom = _scaled(box, scale, panel.size)
        dim.paste((0, 0, 0, 0), (left, top, right + 1, bottom + 1))
    panel = Image.alpha_composite(panel, dim)
    layer = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for i in range(answer.grid + 1):
        x, y = (min(i * side // answer.grid, side - 1) for side in panel.size)
        draw.line((x, 0, x, panel.height), fill=GRID_LINE)
        draw.line((0, y, panel.width, y), fill=GRID_LINE)
    for i, look, box in boxes:
        accent = ACCENTS[i % len(ACCENTS)]
        left, top, right, bottom = _scaled(box, scale, panel.size)
        if look.cells is not None:
            own = _scaled(cells_to_box(look.cells, image.size, answer.grid), scale, panel.size)
            if own != (left, top, right, bottom):
                _dashed(draw, own, accent)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(255, 255, 255, 255))
        draw.rectangle((left, top, right, bottom), outline=(*accent, 255), width=4)
        _badge(layer, (left, top), str(i + 1), accent)
    return Image.alpha_composite(panel, layer).convert("RGB"), scale


def _axes(canvas: "Image.Image", corner: tuple[int, int], size: tuple[int, int], grid: int) -> None:
    """Cell numbers above and left of the panel, thinned out where cells are too narrow for them."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(canvas)
    for axis, length in enumerate(size):
        step = next((s for s in (1, 2, 4, 8, grid) if length * s / grid >= 18), grid)
        for i in range(0, grid, step):
            along = corner[axis] + int((i + 0.5) * length / grid)
            place = (along, corner[1] - AXIS // 2) if axis == 0 else (corner[0] - AXIS // 2, along)
            draw.text(place, str(i), font=_font(14), fill=SOFT, anchor="mm")


def _beams(
    canvas: "Image.Image", places: list[tuple[_Card, int, int]], corner: tuple[int, int], width: int, scale: float
) -> None:
    """A faint beam from each box to its crop beside the image, drawn between the two only."""
    from PIL import Image, ImageDraw

    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    for card, x, y in places:
        if card.source is None or card.view is None:
            continue
        right, top, bottom = (corner[0] + card.source[2] * scale, *(corner[1] + card.source[i] * scale for i in (1, 3)))
        draw.polygon([(right, top), (x, y), (x, y + card.view.height), (right, bottom)], fill=(*card.accent, 26))
    layer.paste((0, 0, 0, 0), (0, 0, corner[0] + width, canvas.height))
    canvas.paste(Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB"))


# -- looks -----------------------------------------------------------------------------------------------------------


def _cards(answer: Answer, image: "Image.Image | None", looks: list[Look], room: tuple[int, int]) -> list[_Card]:
    """A card for every look of `looks`, its view scaled into `room` less its caption; and one for what was left out."""
    cards = []
    for i, look in enumerate(looks):
        accent = ACCENTS[i % len(ACCENTS)]
        title = f"{i + 1}  {look.kind} look" + ("" if look.problem is None else ", not taken")
        lines = [(title, accent, 18)]
        if look.problem is not None:
            cards.append(_Card(None, [*lines, *_wrapped(look.problem, WARN, 16, room[0])], accent))
            continue
        lines += _wrapped(_description(look), SOFT, 15, room[0])
        view = _view(look, image)
        if view is not None:
            space = (room[0], max(room[1] - _text_height(lines) - 8, 90))
            view = _resized(view, _scale(view.size, space))
            if look.attention is not None:
                view = _heated(view, look)
        cards.append(_Card(view, lines, accent, look.box if look.kind == "region" else None))
    if len(answer.looks) > len(looks):
        cards.append(_Card(None, [(f"and {len(answer.looks) - len(looks)} more looks", SOFT, 16)], SOFT))
    return cards


def _description(look: Look) -> str:
    """What the look was of, in words, e.g. ``asked: cells x 1 to 3, y 2 · seen: pixels 0,50 to 400,200``."""
    parts = []
    if look.cells is not None:
        x0, y0, x1, y1 = look.cells
        parts.append(f"asked: cells x {_span(x0, x1)}, y {_span(y0, y1)}")
    if look.kind == "region" and look.box is not None:
        left, top, right, bottom = look.box
        parts.append(f"seen: pixels {left},{top} to {right},{bottom}")
    elif look.kind in LOOKS and LOOKS[look.kind].reencodes:
        parts.append("the whole image, encoded again")
    if look.attention is not None:
        height, width = look.attention.shape
        parts.append(f"bright: where it looked ({width} x {height} tokens)")
    return " · ".join(parts)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _view(look: Look, image: "Image.Image | None") -> "Image.Image | None":
    """What to draw of the look: a crop with its original pixels, else the view that the trace kept, or the image."""
    if image is not None and look.kind == "region" and look.box is not None:
        return image.crop(look.box)
    if look.image is not None:
        return upright(look.image)
    return image


def _heated(view: "Image.Image", look: Look) -> "Image.Image":
    """`view` under its attention map: |<F_i, c>|, since the sign says nothing (c and -c give the same output)."""
    import numpy as np
    from PIL import Image

    heat = np.abs(np.nan_to_num(np.asarray(look.attention, dtype=np.float32)))
    low, high = float(heat.min()), float(np.quantile(heat, 0.99))
    heat = np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)
    x1, y1, x2, y2 = token_area(LOOKS[look.kind].extent if look.kind in LOOKS else "whole", view.size)
    place = round(x1), round(y1), max(round(x2), round(x1) + 1), max(round(y2), round(y1) + 1)
    area = (place[2] - place[0], place[3] - place[1])
    spread = np.asarray(Image.fromarray(heat).resize(area, Image.Resampling.BICUBIC)).clip(0, 1)
    colors = np.dstack([_magma(spread), 255 * (0.3 + 0.4 * spread)]).astype(np.uint8)
    layer = Image.new("RGBA", view.size, (*PAPER, 150))  # what the tokens do not cover is faded
    layer.paste(Image.fromarray(colors, "RGBA"), place[:2])
    return Image.alpha_composite(view.convert("RGBA"), layer).convert("RGB")


def _magma(values: "np.ndarray") -> "np.ndarray":
    """Colors (h, w, 3) of values (h, w) in 0..1."""
    import numpy as np

    at = np.linspace(0, 1, len(HEAT))
    return np.stack([np.interp(values, at, [color[i] for color in HEAT]) for i in range(3)], axis=-1)


def _column(cards: list[_Card], x: int, y: int) -> list[tuple[_Card, int, int]]:
    places = []
    for card in cards:
        places.append((card, x, y))
        y += _card_height(card) + GAP
    return places


def _rows(cards: list[_Card], across: int, width: int, y: int) -> list[tuple[_Card, int, int]]:
    places = []
    for start in range(0, len(cards), across):
        row = cards[start : start + across]
        places += [(card, MARGIN + i * (width + GAP), y) for i, card in enumerate(row)]
        y += max(_card_height(card) for card in row) + GAP
    return places


def _card_height(card: _Card) -> int:
    return _text_height(card.caption) + (card.view.height + 8 if card.view is not None else 0)


def _place(canvas: "Image.Image", card: _Card, x: int, y: int) -> None:
    """Draw `card` with its top left corner at (x, y): the view in a frame of its color, the caption under it."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(canvas)
    if card.view is not None:
        canvas.paste(card.view, (x, y))
        draw.rectangle((x, y, x + card.view.width - 1, y + card.view.height - 1), outline=card.accent, width=3)
        y += card.view.height + 8
    _write(canvas, card.caption, (x, y))


# -- text ------------------------------------------------------------------------------------------------------------


def _head(answer: Answer, width: int) -> "Image.Image":
    """The question, and under it the answer, large."""
    answered = answer.text.strip() or "(no answer)"
    lines = _wrapped(answer.question, SOFT, 22, width)
    lines += _wrapped(answered, INK, 34 if len(answered) <= 120 else 22, width)
    return _text_image(lines, width)


def _foot(answer: Answer, width: int) -> "Image.Image":
    """Model and cost, and any warnings."""
    usage = answer.usage
    parts = [answer.model] if answer.model else []
    if not answer.looks:
        parts.append("answered without a second look")
    if usage.sequence_length:
        parts.append(f"{usage.lm_positions} LM positions")
        parts.append(f"{usage.vision_patches} image patches")
    if usage.seconds:
        parts.append(f"{sum(usage.seconds.values()):.2f} s")
    lines = _wrapped(" · ".join(parts), SOFT, 15, width)
    for warning in answer.warnings:
        lines += _wrapped(warning, WARN, 15, width)
    return _text_image(lines, width)


def _wrapped(text: str, color: Color, size: int, width: int) -> list[tuple[str, Color, int]]:
    """The first MOST_LINES lines of `text`, each at most `width` pixels; "…" where it goes on."""
    lines = list(islice(_lines(text, _font(size), width), MOST_LINES + 1))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES - 1 :] = [lines[MOST_LINES - 1].rstrip(" .,")[:-1] + "…"]
    return [(line, color, size) for line in lines]


def _lines(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> Iterator[str]:
    """`text` broken at blanks, and inside a word only when a line cannot hold it.

    A character is at least a pixel wide, so more than `width` of them are never measured: a run of 10,000 stays cheap.
    """
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if len(longer) <= width and font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            while len(word) > 1 and font.getlength(word[:width]) > width:
                cut = 1
                while font.getlength(word[: cut + 1]) <= width:
                    cut += 1
                yield word[:cut]
                word = word[cut:]
            line = word
        if line:
            yield line


def _line_height(size: int) -> int:
    return round(size * 1.35)


def _text_height(lines: list[tuple[str, Color, int]]) -> int:
    return sum(_line_height(size) for _, _, size in lines)


def _text_image(lines: list[tuple[str, Color, int]], width: int) -> "Image.Image":
    from PIL import Image

    image = Image.new("RGB", (width, max(_text_height(lines), 1)), PAPER)
    _write(image, lines, (0, 0))
    return image


def _write(image: "Image.Image", lines: list[tuple[str, Color, int]], corner: tuple[int, int]) -> None:
    from PIL import ImageDraw

    draw, (x, y) = ImageDraw.Draw(image), corner
    for text, color, size in lines:
        bold = 0 if color is SOFT else 0.5 if size > 20 else 0.3
        draw.text((x, y), text, font=_font(size), fill=color, stroke_width=bold)
        y += _line_height(size)


def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)


# -- small shapes ----------------------------------------------------------------------------------------------------


def _scale(size: tuple[int, int], room: tuple[int, int]) -> float:
    """The factor that fits `size` into `room`; small images grow, up to MOST_ENLARGED times."""
    return min(room[0] / size[0], room[1] / size[1], MOST_ENLARGED)


def _resized(image: "Image.Image", scale: float) -> "Image.Image":
    """`image` scaled; few pixels made many stay visible as squares, so nobody takes them for detail."""
    from PIL import Image

    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    return image.resize(size, Image.Resampling.NEAREST if scale >= 5 else Image.Resampling.LANCZOS)


def _scaled(box: Box, scale: float, size: tuple[int, int]) -> Box:
    """`box` in pixels of a panel of `size`, its last pixel inclusive, as ImageDraw wants it."""
    left, top = min(round(box[0] * scale), size[0] - 1), min(round(box[1] * scale), size[1] - 1)
    right, bottom = min(round(box[2] * scale), size[0]) - 1, min(round(box[3] * scale), size[1]) - 1
    return left, top, max(right, left), max(bottom, top)


def _dashed(draw, box: Box, color: Color, dash: int = 7) -> None:
    left, top, right, bottom = box
    for x in range(left, right, 2 * dash):
        for y in (top, bottom):
            draw.line((x, y, min(x + dash, right), y), fill=(*color, 255), width=2)
    for y in range(top, bottom, 2 * dash):
        for x in (left, right):
            draw.line((x, y, x, min(y + dash, bottom)), fill=(*color, 255), width=2)


def _badge(layer: "Image.Image", corner: tuple[int, int], text: str, color: Color) -> None:
    """A number on a filled square at the top left corner of a box."""
    from PIL import ImageDraw

    draw, (x, y), side = ImageDraw.Draw(layer), corner, 24
    draw.rectangle((x, y, x + side, y + side), fill=(*color, 255))
    draw.text((x + side / 2 + 0.5, y + side / 2 + 0.5), text, font=_font(16), fill=(255, 255, 255, 255), anchor="mm")
