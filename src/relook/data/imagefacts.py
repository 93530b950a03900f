"""What a check needs to know of an image file: its sizes, its turn, and whether two files hold the same picture.

Files are read once each, however many items name them. This module knows pixels and refuses to know turns and calls.

Two pictures are the same when their files' bytes are (`digest`), and nearly the same when few bits of their perceptual
hashes differ: the signs, against their median, of the lowest 24 x 24 frequencies of the picture at 64 x 64 grey pixels.
On 200 scanned receipts, a copy at two fifths of the size and JPEG quality 50 differed from its original in at most 48
of the 575 bits, and two receipts of one shop in at least 74 (most pairs in 280), so `NEAR` lies between.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from relook.data.items import place_image
from relook.errors import UserError
from relook.regions import Cells, upright

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

NEAR = 60  # bits of 575
_SIDE, _WAVES = 64, 24
_FLAT = 2.0  # standard deviation in grey levels, under which a picture (a blank page) has nothing to compare
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap the sides


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One image file. Sizes are (width, height) in pixels.

    problem      "missing", "unreadable" or None; `detail` says why
    size         once upright, as people see it and as crops are cut
    orientation  the EXIF tag, 1 where there is none
    digest       of the file's bytes
    look         the perceptual hash (bits as bytes), None where it was not asked for or the picture is flat
    """

    problem: str | None = None
    detail: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""
    look: bytes | None = None

    @property
    def sideways(self) -> bool:
        """True where the stored pixels lie on their side, so that stored and upright sizes are swapped."""
        return self.orientation in _SIDEWAYS

    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) as stored, before the EXIF turn."""
        return (self.size[1], self.size[0]) if self.sideways else self.size


def read_facts(path: str, *, look: bool = False) -> ImageFacts:
    """The facts of one file, decoded to its end; `look` asks for the perceptual hash. Never raises for a bad file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return ImageFacts("missing", "no such file")
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        return ImageFacts("unreadable", getattr(error, "strerror", None) or str(error))
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            orientation = _orientation(image)
            image.draft("L", (2 * _SIDE, 2 * _SIDE))  # JPEGs are read to the end, but not at full size
            image.load()
            found = _look(image) if look else None
    except UnidentifiedImageError:
        return ImageFacts("unreadable", "not an image that can be read")
    except Image.DecompressionBombError as error:
        return ImageFacts("unreadable", str(error))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:  # what PIL raises on damaged files
        return ImageFacts("unreadable", f"damaged or cut short ({error})")
    size = (height, width) if orientation in _SIDEWAYS else (width, height)
    return ImageFacts(None, "", size, orientation, hashlib.blake2b(data, digest_size=16).digest(), found)


def near(look: bytes, others: np.ndarray) -> int | None:
    """Index of the nearest of `others` (n, 72) uint8 that is nearly the same picture; None where there is none."""
    import numpy as np

    if not len(others):
        return None
    distance = np.bitwise_count(others ^ np.frombuffer(look, dtype=np.uint8)).sum(axis=1)
    best = int(distance.argmin())
    return best if distance[best] <= NEAR else None


def turned_cells(cells: Cells, orientation: int, grid: int) -> Cells:
    """Cells of the stored picture as cells of the upright one, for the EXIF orientations that swap the sides.

    >>> turned_cells((0, 0, 1, 0), 6, 8)  # the stored top left is the upright top right
    (7, 0, 7, 1)
    """
    x0, y0, x1, y1 = cells
    xs, ys = (y0, y1), (x0, x1)  # 5: mirrored along the diagonal; the others mirror that once more
    if orientation in (6, 7):
        xs = (grid - 1 - y1, grid - 1 - y0)
    if orientation in (7, 8):
        ys = (grid - 1 - x1, grid - 1 - x0)
    return xs[0], ys[0], xs[1], ys[1]


def facts_below(root: str | Path, strict: bool, look: bool = False) -> Callable[[str], ImageFacts | None]:
    """The facts of image files by the paths that items give them, each read once.

    A path that leaves a strict root is not followed: None.
    """
    known: dict[str, ImageFacts | None] = {}

    def facts(file: str) -> ImageFacts | None:
        if file not in known:
            try:
                known[file] = read_facts(place_image(file, root, strict=strict), look=look)
            except UserError:
                known[file] = None
        return known[file]

    return facts


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, TypeError, ValueError):  # an EXIF block that is none
        return 1


def _look(image: Image.Image) -> bytes | None:
    """The perceptual hash of the upright picture, 72 bytes."""
    import numpy as np
    from PIL import Image as Pillow

    small = upright(image).convert("L").resize((_SIDE, _SIDE), Pillow.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64)
    if pixels.std() < _FLAT:
        return None
    waves = _cosines() @ pixels @ _cosines().T
    values = waves.ravel()[1:]  # without the mean
    return np.packbits(values > np.median(values)).tobytes()


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    import numpy as np

    at = np.arange(_SIDE)
    return np.cos(np.pi * (2 * at[None] + 1) * np.arange(_WAVES)[:, None] / (2 * _SIDE))
