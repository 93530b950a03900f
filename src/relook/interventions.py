"""Interventions on region looks, for measuring: what a model is shown in place of the crop that it called.

All else is as without: the model writes its calls by itself, and goes on from what it was shown. A row of
`INTERVENTIONS` says which box is shown, with which pixels, and what of the look stays in the history: the `text` of the
assistant's turn that called it, the `image` of the turn that answers.

Where regions nest, every look of an answer is changed, and the cells of a call count in the view that was shown before
it. Re-encoding looks are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from relook.errors import UserError
from relook.regions import Box

if TYPE_CHECKING:
    from PIL import Image

Step = tuple[int, int]
STEPS: tuple[Step, ...] = ((1, 0), (-1, 0), (0, 1), (0, -1))  # cells to the right and down
GREY = (127, 127, 127)  # of a blank crop, where the mean that the model's processor subtracts is not known


@dataclass(frozen=True)
class Change:
    """One row.

    about   what was done to the crop, for people
    region  (the box called, the view it lies in, a cell's (width, height), a step) -> the box shown
    pixels  (intervention, the whole image, the box shown, the processor) -> the crop, as large as the box
    """

    name: str
    about: str
    region: Callable[[Box, Box, tuple[float, float], Step], Box] = lambda box, *_: box
    pixels: Callable[[Intervention, Image.Image, Box, Any], Image.Image] = lambda _, whole, box, __: whole.crop(box)
    text: bool = True
    image: bool = True


def moved(box: Box, view: Box, cell: tuple[float, float], step: Step = (1, 0)) -> Box:
    """`box`, as large as it is, one cell further on inside `view`; all in pixels of the original.

    Where the view ends before that: the other way; else along the other axis; a box that fits nowhere else stays.

    >>> moved((80, 100, 320, 250), (0, 0, 640, 400), (80, 50))
    (160, 100, 400, 250)
    >>> moved((400, 0, 640, 400), (0, 0, 640, 400), (80, 50))  # at the right edge: to the left
    (320, 0, 560, 400)
    """
    across, down = step
    for right, lower in (step, (-across, -down), (down, across), (-down, -across)):
        dx, dy = round(right * cell[0]), round(lower * cell[1])
        x1, y1, x2, y2 = box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy
        if view[0] <= x1 and view[1] <= y1 and x2 <= view[2] and y2 <= view[3]:
            return x1, y1, x2, y2
    return box


def box_in_other(box: Box, size: tuple[int, int], other: tuple[int, int]) -> Box:
    """The same share of another image, in whole pixels, at least 1 a side.

    >>> box_in_other((80, 100, 320, 250), (640, 400), (320, 800))
    (40, 200, 160, 500)
    """
    x1, x2 = (box[i] * other[0] // size[0] for i in (0, 2))
    y1, y2 = (box[i] * other[1] // size[1] for i in (1, 3))
    left, top = min(x1, other[0] - 1), min(y1, other[1] - 1)
    return left, top, max(x2, left + 1), max(y2, top + 1)


def _blank(change: Intervention, whole: Image.Image, box: Box, processor: Any) -> Image.Image:
    """Every pixel is the mean that the image processor subtracts: nearest to zero once normalized."""
    from PIL import Image

    images = getattr(processor, "image_processor", None)
    mean = GREY if images is None else tuple(round(255 * value) for value in images.image_mean)
    return Image.new("RGB", (box[2] - box[0], box[3] - box[1]), mean)


def _other(change: Intervention, whole: Image.Image, box: Box, processor: Any) -> Image.Image:
    """The same share of the other image, stretched to the crop's size, so that it is as many tokens."""
    from PIL import Image

    size, other = (box[2] - box[0], box[3] - box[1]), change.image
    assert other is not None  # checked when it was made
    return other.crop(box_in_other(box, whole.size, other.size)).resize(size, Image.Resampling.BICUBIC)


def _blurred(change: Intervention, whole: Image.Image, box: Box, processor: Any) -> Image.Image:
    """The pixels of the first look, enlarged: a 640 x 400 image that is seen first at 320 x 200 shows of the box
    80,100,320,250 what lies at 40,50,160,125 there, 120 x 75 pixels, at 240 x 150.

    Where the first look sees the image no smaller than it is, there is nothing to lose, and it is the crop.
    """
    from PIL import Image

    first = processor.view(whole, "first")
    if first.width >= whole.width and first.height >= whole.height:
        return whole.crop(box)
    across, down = first.width / whole.width, first.height / whole.height
    seen = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return first.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC, box=seen)


INTERVENTIONS: dict[str, Change] = {
    row.name: row
    for row in (
        Change("blank", "shown blank", pixels=_blank),
        Change("other", "cut from the image of another question", pixels=_other),
        Change("blurred", "shown with the pixels of the first look, enlarged", pixels=_blurred),
        Change("moved", "cut one cell beside what was called", region=moved),
        Change("image-only", "shown, and the words that called it left out", text=False),
        Change("text-only", "called and not shown", image=False),
    )
}


class Intervention:
    """A row of `INTERVENTIONS`, and what it takes for one question.

    Args:
        name: of the row.
        image: for "other": the upright image that crops are cut from, at the place of the region.
        step: for "moved": cells to the right and down, one of `STEPS`.

    Raises:
        UserError: no such row; "other" without an image, an image for another row; another step.
    """

    def __init__(self, name: str, image: Image.Image | None = None, step: Step = (1, 0)):
        if name not in INTERVENTIONS:
            raise UserError(f"intervention {name!r} is unknown; expected one of {', '.join(INTERVENTIONS)}")
        if (image is not None) != (name == "other"):
            raise UserError(f"intervention {name!r} with image={image}; 'other' takes one, and no other row does")
        if step not in STEPS:
            raise UserError(f"step={step}; expected one of {', '.join(map(str, STEPS))}")
        self.name, self.image, self.step = name, image, step

    @property
    def row(self) -> Change:
        return INTERVENTIONS[self.name]

    def region(self, box: Box, view: Box, grid: int) -> Box:
        """The box that is shown where `box`, in `view` with `grid` cells a side, was called."""
        cell = (view[2] - view[0]) / grid, (view[3] - view[1]) / grid
        return self.row.region(box, view, cell, self.step)

    def crop(self, whole: Image.Image, box: Box, processor: Any) -> Image.Image:
        """What is shown of `box`, at its size; the processor's view of a crop comes after."""
        return self.row.pixels(self, whole, box, processor)
