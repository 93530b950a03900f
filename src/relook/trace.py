"""The record of what happened: one typed shape that library, command line, server and evaluation share.

Images are PIL, attention maps NumPy; importing this module imports neither. Drawing is in `relook.render`, loaded when
a picture is drawn.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.errors import UserError
from relook.regions import GRID, Box, Cells, upright

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass
class Look:
    """One second look, taken, or (with a `problem`) called but not taken.

    kind        region | clip | detection | seg
    cells       (x0, y0, x1, y1) grid cells as the model wrote them, both ends inclusive; None except for a region
    box         (x1, y1, x2, y2) pixels of the upright original that were looked at, after widening; x2, y2 exclusive
    image       what was seen: the crop, or the view that was encoded again
    attention   (h, w) <F_i, c> of every token of a re-encoding look, laid over `image` (row 0 at its top); None where
                the look has no condition
    problem     None, or why nothing was looked at, for people
    frame       (x1, y1, x2, y2) pixels of the original: the view that `cells` count in, of which `grid` a side lie over
                it; the whole image unless regions nest. None where there are no cells
    turn        number of the assistant's turn that called it, from 0 among those of the answer that call some
    """

    kind: str
    cells: Cells | None = None
    box: Box | None = None
    image: "Image.Image | None" = field(default=None, repr=False, compare=False)
    attention: "np.ndarray | None" = field(default=None, repr=False, compare=False)
    problem: str | None = None
    frame: Box | None = None
    turn: int = field(default=0, compare=False)

    def to_dict(self, images: bool = False) -> dict[str, Any]:
        """JSON-able; the image as its size, and as a base64 PNG too with `images`."""
        return {
            "kind": self.kind,
            **{name: _whole(getattr(self, name)) for name in ("cells", "frame", "box")},
            "image": _image_dict(self.image, images),
            "attention": None if self.attention is None else [[_number(v) for v in row] for row in self.attention],
            "problem": self.problem,
            "turn": self.turn,
        }


@dataclass
class Usage:
    """What an answer cost, counted exactly; `a + b` adds two up, stage by stage.

    lm_positions      token positions run through the language model (real tokens, all forwards together)
    sequence_length   tokens of the final conversation
    vision_patches    patches run through vision encoders (each distinct view once)
    generated_tokens  tokens the model chose or was made to write
    seconds           wall time per stage
    cached_tokens     tokens whose keys and values a server had kept from an earlier request: not in lm_positions
    """

    lm_positions: int = 0
    sequence_length: int = 0
    vision_patches: int = 0
    generated_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        if not isinstance(other, Usage):
            return NotImplemented
        stages = {**self.seconds, **other.seconds}
        seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in _COUNTS}, seconds=seconds)

    def to_dict(self) -> dict[str, Any]:
        seconds = {stage: _number(value) for stage, value in self.seconds.items()}
        return {**{name: int(getattr(self, name)) for name in _COUNTS}, "seconds": seconds}


_COUNTS = ("lm_positions", "sequence_length", "vision_patches", "generated_tokens", "cached_tokens")


@dataclass(frozen=True)
class Token:
    """A token that the model chose: its text, and its natural log probability among all tokens (temperature 1).

    top   (text, log probability) of the most probable tokens in its place, the best first
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass
class Turn:
    """One turn of the conversation: control tokens kept, every run of image pads shown as its placeholder.

    sampled   True when the model wrote it, False when it was given (system, user, a forced call)
    """

    role: str
    text: str
    sampled: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Answer:
    """The answer to one question about an image, and how it came about.

    image      the upright original, the frame of every look's `box`; None when the answer had no image
    warnings   plain sentences to read before believing the text, such as what a small model was trained on
    grid       cells a side that the looks' `cells` count in
    finish     why it ends: "stop" (the model ended it, or a stop text came), "length" (max_new_tokens), "look" (whoever
               asked takes the regions in `looks` and asks on)
    tokens     of the text, where their probabilities were asked for
    """

    text: str
    looks: list[Look] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    transcript: list[Turn] = field(default_factory=list)
    question: str = ""
    image: "Image.Image | None" = field(default=None, repr=False, compare=False)
    model: str = ""
    warnings: list[str] = field(default_factory=list)
    grid: int = GRID
    finish: str = "stop"
    tokens: list[Token] = field(default_factory=list, repr=False, compare=False)

    def to_dict(self, images: bool = False) -> dict[str, Any]:
        """JSON-able, key for key as the fields, but `tokens`; images as sizes, and as base64 PNGs too with `images`."""
        return {
            "question": self.question,
            "text": self.text,
            "model": self.model,
            "grid": self.grid,
            "image": _image_dict(self.image, images),
            "looks": [look.to_dict(images) for look in self.looks],
            "usage": self.usage.to_dict(),
            "transcript": [turn.to_dict() for turn in self.transcript],
            "warnings": list(self.warnings),
            "finish": self.finish,
        }

    def nests(self, look: Look) -> bool:
        """Whether the look's cells count in a view before it, and not in the whole image."""
        return look.frame is not None and self.image is not None and look.frame != (0, 0, *self.image.size)

    def picture(self) -> "Image.Image":
        """One RGB picture: question and answer, the image with grid and boxes, every look's crop or attention map."""
        from relook.render import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Write `picture()` to `path`, in the format of its suffix (PNG without one). Raises UserError if it cannot."""
        path = Path(path)
        form = picture_format(path)
        try:
            self.picture().save(path, format=form)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {str(path)!r}: {reason}; choose a file in a folder that exists") from error
        return path

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows for an answer."""
        return None if self.image is None else _png(self.picture())


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's text, as it is written, with its tokens where their probabilities were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()

    def to_dict(self, images: bool = False) -> dict[str, Any]:
        return {"event": "text", "text": self.text}


@dataclass(frozen=True)
class LookTaken:
    """A look, once its view has entered the conversation (or, with a `problem`, once it is known that none will)."""

    look: Look

    def to_dict(self, images: bool = False) -> dict[str, Any]:
        return {"event": "look", "look": self.look.to_dict(images)}


@dataclass(frozen=True)
class Finished:
    """The last event of a stream: the same `Answer` that `ask` returns."""

    answer: Answer

    def to_dict(self, images: bool = False) -> dict[str, Any]:
        return {"event": "finished", "answer": self.answer.to_dict(images)}


Event = TextDelta | LookTaken | Finished


def region_turns(looks: Sequence[Look], nested: bool) -> list[list[Look]]:
    """The region looks of an answer that were taken, by turn.

    Args:
        nested: whether regions count in the view before them. Else all are taken as of one turn.
    """
    turns: list[list[Look]] = []
    for look in looks:
        if look.problem is None and look.cells is not None:
            if not turns or (nested and look.turn != turns[-1][-1].turn):
                turns.append([])
            turns[-1].append(look)
    return turns


def picture_format(path: Path) -> str:
    """The format ("PNG", ...) a picture saved under this name has. Raises UserError where Pillow writes none."""
    from PIL import Image

    formats = {"": "PNG", **Image.registered_extensions()}
    form = formats.get(path.suffix.lower())
    if form is None or form not in Image.SAVE:
        raise UserError(f"cannot save a picture as {path.name!r}: expected a name ending in .png, .jpg or .webp")
    return form


def _image_dict(image: "Image.Image | None", with_pixels: bool) -> dict[str, Any] | None:
    if image is None:
        return None
    size: dict[str, Any] = {"width": image.width, "height": image.height}
    if with_pixels:
        size["png"] = base64.b64encode(_png(image)).decode("ascii")
    return size


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    upright(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _whole(values: Cells | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]


def _number(value: Any) -> float | None:
    """A float that JSON has (NaN and infinities become null), to six significant digits."""
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
