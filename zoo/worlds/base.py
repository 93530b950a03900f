"""Types of a synthetic dataset: a seed and an index give a page, its questions, and the position of every mark.

Boxes are (x1, y1, x2, y2) in pixels of `Page.image`, origin top left, x2 and y2 exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class QA:
    """A question on a page, its answer, and the boxes that must be read to answer it."""

    question: str
    answer: str
    boxes: tuple[Box, ...]
    field: str = ""  # the queried field ("total", "red"): a row of the accuracy table


@dataclass(frozen=True)
class Glyph:
    """One printed character and its box."""

    char: str
    box: Box


@dataclass(frozen=True)
class Area:
    """A labeled part of the page (a red box, the address block) that the first look should detect."""

    label: str
    box: Box


@dataclass(frozen=True)
class Page:
    """An RGB image, its questions, and the printed characters and areas (for dense supervision)."""

    image: Image.Image
    qas: tuple[QA, ...]
    glyphs: tuple[Glyph, ...] = ()
    areas: tuple[Area, ...] = ()
    meta: dict[str, object] = field(default_factory=dict)


class World(Protocol):
    """A distribution over pages. `World(seed).sample(i)` returns the same page on every call and every machine."""

    name: str
    seed: int
    charset: str  # every character a Glyph may hold
    labels: tuple[str, ...]  # every label an Area may hold

    def __init__(self, seed: int) -> None: ...

    def sample(self, index: int) -> Page: ...

    @classmethod
    def phrases(cls) -> tuple[str, ...]:
        """Question texts of the dataset, whose words a small tokenizer should contain whole."""
        ...
