"""What a synthetic world is: a seed and an index in, a page with questions and the truth about every mark out.

Knows the types only: not how a page is drawn (each world's own module), not models, not tokens.

Frames: every box is (x1, y1, x2, y2) in pixels of `Page.image`, origin top left, x2 and y2 exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class QA:
    """A question a page can answer, and where: `boxes` cover all that must be read to answer it."""

    question: str
    answer: str
    boxes: tuple[Box, ...]
    field: str = ""  # what is asked for ("total", "red"): the row of an accuracy table


@dataclass(frozen=True)
class Glyph:
    """One printed character and the box of its cell or ink."""

    char: str
    box: Box


@dataclass(frozen=True)
class Area:
    """A labelled part of the page (a red box, the address block): what the first look should make out."""

    label: str
    box: Box


@dataclass(frozen=True)
class Page:
    """An RGB image, what can be asked about it, and what is printed where (for dense supervision)."""

    image: Image.Image
    qas: tuple[QA, ...]
    glyphs: tuple[Glyph, ...] = ()
    areas: tuple[Area, ...] = ()
    meta: dict[str, object] = field(default_factory=dict)


class World(Protocol):
    """A distribution over pages. `World(seed).sample(i)` is the same page on every call and every machine."""

    name: str
    seed: int
    charset: str  # every character a Glyph may hold
    labels: tuple[str, ...]  # every label an Area may hold

    def __init__(self, seed: int) -> None: ...

    def sample(self, index: int) -> Page: ...

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        """Sentences in which the world asks: what a small tokenizer should know by whole words."""
        ...
