"""The saved picture of an answer: question, answer, the image with its grid and boxes, and what every look saw.

Draws a `trace.Answer` with Pillow. Looks stand in a column beside a tall image, or in rows below a wide one.
Pillow and NumPy are imported inside functions, so that importing relook stays quick.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from relook.looks import LOOKS
from relook.regions import Box, cells_in, token_area, upright
from relook.trace import Answer, Look

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Color = tuple[int, int, int]
Line = tuple[str, Color, int]  # text, color, font size

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


def render(answer: Answer) -> "Image.Image":
    """The picture of `answer`, RGB, up to about 1200 pixels wide; at least the text when there is no image."""
    from PIL import ImageOps

    image = None if answer.image is None else upright(answer.image)
    beside = image is None or image.width <= 1.35 * image.height
    looks = answer.looks[:MOST_LOOKS]
    panel = [] if image is None else [_panel(answer, image, looks, TALL_PANEL if beside else WIDE_PANEL)]
    if beside:
        width = max(COLUMN, LEAST_WIDTH - sum(each.width + GAP for each in panel))
        seen = sum(look.problem is None for look in looks) or 1
        untaken = 90 * (len(looks) - seen)  # about the text of a look that was not taken
        height = (sum(each.height - AXIS for each in panel) - untaken - GAP * (seen - 1)) // seen
        cards = _cards(answer, image, looks, (width, max(height, 150)))
        column = ImageOps.expand(_stack(cards, down=True), (0, AXIS if panel else 0, 0, 0), PAPER)
        body = _stack([*panel, column], down=False)
    else:
        across = min(len(looks), 3) or 1
        width = (max(panel[0].width, LEAST_WIDTH) - GAP * (across - 1)) // across
        cards = _cards(answer, image, looks, (width, 420))
        rows = [_stack(cards[i : i + across], down=False) for i in range(0, len(cards), across)]
        body = _stack([*panel, *rows], down=True)
    width = max(LEAST_WIDTH, body.width)
    pieces = [_text_image(_head(answer, width), width), body, _text_image(_foot(answer, width), width)]
    return ImageOps.expand(_stack(pieces, down=True), MARGIN, PAPER)


def _stack(pieces: Sequence["Image.Image"], down: bool) -> "Image.Image":
    """Pictures one below the other, or side by side, with a gap between."""
    from PIL import Image

    pieces = [piece for piece in pieces if piece.height > 1]
    across, along = [[piece.size[axis] for piece in pieces] for axis in ((0, 1) if down else (1, 0))]
    size = max(across, default=1), max(sum(along) + GAP * (len(pieces) - 1), 1)
    canvas, at = Image.new("RGB", size if down else size[::-1], PAPER), 0
    for piece, length in zip(pieces, along, strict=True):
        canvas.paste(piece, (0, at) if down else (at, 0))
        at += length + GAP
    return canvas


# -- the image with its grid and boxes -------------------------------------------------------------------------------


def _panel(answer: Answer, image: "Image.Image", looks: list[Look], room: tuple[int, int]) -> "Image.Image":
    """The image scaled into `room` with grid, cells and boxes; cell numbers above and left of it."""
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
    whole = (0, 0, *image.size)
    frames = [look.frame for _, look, _ in boxes if look.frame is not None]
    for frame in dict.fromkeys([whole, *frames]):
        left, top, right, bottom = _scaled(frame, scale, panel.size)
        for i in range(answer.grid + 1):
            x, y = (a + min(i * (b + 1 - a) // answer.grid, b - a) for a, b in ((left, right), (top, bottom)))
            draw.line((x, top, x, bottom), fill=GRID_LINE)
            draw.line((left, y, right, y), fill=GRID_LINE)
    for i, look, box in boxes:
        accent = ACCENTS[i % len(ACCENTS)]
        left, top, right, bottom = _scaled(box, scale, panel.size)
        if look.cells is not None:  # before they were widened
            own = _scaled(cells_in(look.cells, look.frame or whole, answer.grid), scale, panel.size)
            draw.rectangle(own, outline=(*accent, 160), width=1)
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(255, 255, 255, 255))
        draw.rectangle((left, top, right, bottom), outline=(*accent, 255), width=4)
        draw.rectangle((left, top, left + 24, top + 24), fill=(*accent, 255))
        draw.text((left + 12.5, top + 12.5), str(i + 1), font=_font(16), fill=(255, 255, 255, 255), anchor="mm")
    canvas = Image.new("RGB", (panel.width + AXIS, panel.height + AXIS), PAPER)
    canvas.paste(Image.alpha_composite(panel, layer).convert("RGB"), (AXIS, AXIS))
    draw = ImageDraw.Draw(canvas)
    for axis, length in enumerate(panel.size):
        step = next((s for s in (1, 2, 4, 8, answer.grid) if length * s / answer.grid >= 18), answer.grid)
        for i in range(0, answer.grid, step):
            along = AXIS + int((i + 0.5) * length / answer.grid)
            place = (along, AXIS // 2) if axis == 0 else (AXIS // 2, along)
            draw.text(place, str(i), font=_font(14), fill=SOFT, anchor="mm")
    return canvas


# -- looks -----------------------------------------------------------------------------------------------------------


def _cards(
    answer: Answer, image: "Image.Image | None", looks: list[Look], room: tuple[int, int]
) -> list["Image.Image"]:
    """Every look with its caption, its view scaled into `room` less the caption; and a line for what was left out."""
    from PIL import ImageDraw

    cards = []
    for i, look in enumerate(looks):
        accent = ACCENTS[i % len(ACCENTS)]
        lines = [(f"{i + 1}  {look.kind} look" + ("" if look.problem is None else ", not taken"), accent, 18)]
        if look.problem is not None:
            cards.append(_text_image([*lines, *_wrapped(look.problem, WARN, 16, room[0])], room[0]))
            continue
        caption = _text_image([*lines, *_wrapped(_description(look, answer.nests(look)), SOFT, 15, room[0])], room[0])
        view = _view(look, image)
        if view is None:
            cards.append(caption)
            continue
        view = _resized(view, _scale(view.size, (room[0], max(room[1] - caption.height - 8, 90))))
        if look.attention is not None:
            view = _heated(view, look)
        ImageDraw.Draw(view).rectangle((0, 0, view.width - 1, view.height - 1), outline=accent, width=3)
        card = caption.crop((0, -view.height - 8, room[0], caption.height))
        card.paste(PAPER, (0, 0, room[0], view.height + 8))
        card.paste(view, (0, 0))
        cards.append(card)
    if len(answer.looks) > len(looks):
        cards.append(_text_image([(f"and {len(answer.looks) - len(looks)} more looks", SOFT, 16)], room[0]))
    return cards


def _description(look: Look, nested: bool) -> str:
    """What the look was of, in words, e.g. ``asked: cells x 1 to 3, y 2 · seen: pixels 0,50 to 400,200``."""
    parts = []
    if look.cells is not None:
        x0, y0, x1, y1 = look.cells
        columns, rows = (str(a) if a == b else f"{a} to {b}" for a, b in ((x0, x1), (y0, y1)))
        parts.append(f"asked: cells x {columns}, y {rows}" + (" of the view before" if nested else ""))
    if look.kind == "region" and look.box is not None:
        left, top, right, bottom = look.box
        parts.append(f"seen: pixels {left},{top} to {right},{bottom}")
    elif look.kind in LOOKS and LOOKS[look.kind].reencodes:
        parts.append("the whole image, encoded again")
    if look.attention is not None:
        height, width = look.attention.shape
        parts.append(f"bright: where it looked ({width} x {height} tokens)")
    return " · ".join(parts)


def _view(look: Look, image: "Image.Image | None") -> "Image.Image | None":
    """What to draw of the look: a crop with its original pixels, else the view that the trace kept, or the image."""
    if image is not None and look.kind == "region" and look.box is not None:
        return image.crop(look.box)
    return image if look.image is None else upright(look.image)


def _heated(view: "Image.Image", look: Look) -> "Image.Image":
    """`view` under its attention map."""
    from PIL import Image

    return Image.alpha_composite(view.convert("RGBA"), heat_map(look, view.size)).convert("RGB")


def heat_map(look: Look, size: tuple[int, int]) -> "Image.Image":
    """A look's attention map as a transparent RGBA layer for an image of `size` (width, height).

    It shows |<F_i, c>|, since the sign says nothing (c and -c give the same output).
    """
    import numpy as np
    from PIL import Image

    heat = np.abs(np.nan_to_num(np.asarray(look.attention, dtype=np.float32)))
    low, high = float(heat.min()), float(np.quantile(heat, 0.99))
    heat = np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)
    x1, y1, x2, y2 = token_area(LOOKS[look.kind].extent if look.kind in LOOKS else "whole", size)
    area = max(round(x2) - round(x1), 1), max(round(y2) - round(y1), 1)
    spread = np.asarray(Image.fromarray(heat).resize(area, Image.Resampling.BICUBIC)).clip(0, 1)
    at = np.linspace(0, 1, len(HEAT))
    magma = [np.interp(spread, at, [color[i] for color in HEAT]) for i in range(3)]
    colors = np.dstack([*magma, 255 * (0.3 + 0.4 * spread)]).astype(np.uint8)
    layer = Image.new("RGBA", size, (*PAPER, 150))  # what the tokens do not cover is faded
    layer.paste(Image.fromarray(colors, "RGBA"), (round(x1), round(y1)))
    return layer


# -- text ------------------------------------------------------------------------------------------------------------


def _head(answer: Answer, width: int) -> list[Line]:
    """The question, and under it the answer, large."""
    answered = answer.text.strip() or "(no answer)"
    size = 34 if len(answered) <= 120 else 22
    return [*_wrapped(answer.question, SOFT, 22, width), *_wrapped(answered, INK, size, width)]


def _foot(answer: Answer, width: int) -> list[Line]:
    """Model and cost, and any warnings."""
    usage = answer.usage
    parts = [answer.model] if answer.model else []
    if not answer.looks:
        parts.append("answered without a second look")
    if usage.sequence_length:
        parts += [f"{usage.lm_positions} LM positions", f"{usage.vision_patches} image patches"]
    if usage.seconds:
        parts.append(f"{sum(usage.seconds.values()):.2f} s")
    lines = _wrapped(" · ".join(parts), SOFT, 15, width)
    return lines + [line for warning in answer.warnings for line in _wrapped(warning, WARN, 15, width)]


def _wrapped(text: str, color: Color, size: int, width: int) -> list[Line]:
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


def _text_image(lines: Sequence[Line], width: int) -> "Image.Image":
    from PIL import Image, ImageDraw

    heights = [round(size * 1.35) for _, _, size in lines]
    image, y = Image.new("RGB", (width, max(sum(heights), 1)), PAPER), 0
    for (text, color, size), height in zip(lines, heights, strict=True):
        bold = 0 if color is SOFT else 0.5 if size > 20 else 0.3
        ImageDraw.Draw(image).text((0, y), text, font=_font(size), fill=color, stroke_width=bold)
        y += height
    return image


def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size)


# -- sizes -----------------------------------------------------------------------------------------------------------


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
