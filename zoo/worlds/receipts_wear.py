"""Degradation of a printed receipt: fading, streaks, skew, blur, paper, marks, scan and JPEG.

`wear(ink, random)` turns an ink plane into a grayscale image and returns the 2 x 3 matrix that maps points of the plane
to points of the image.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    import numpy as np
    from PIL import Image

Matrix = tuple[float, float, float, float, float, float]  # x' = a x + b y + c, y' = d x + e y + f


def wear(ink: np.ndarray, random: random.Random) -> tuple[Image.Image, Matrix]:
    """Degrade an ink plane.

    Args:
        ink: (height, width) uint8, 255 = black.

    Returns:
        The image (mode "L", same size) and the matrix from plane to image.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    noise = np.random.default_rng(random.getrandbits(60))
    plane = Image.fromarray(_fade(ink, random, noise))
    plane, matrix = _skew(plane, random)
    if random.random() < 0.6:
        plane = plane.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 0.9)))
    _marks(plane, random)
    page = _scan(np.asarray(plane), random, noise)
    if random.random() < 0.4:
        page = _jpeg(page, random.randint(35, 85))
    return page, matrix


def apply(matrix: Matrix, x: float, y: float) -> tuple[float, float]:
    """Map a point of the ink plane to the image."""
    a, b, c, d, e, f = matrix
    return a * x + b * y + c, d * x + e * y + f


def _field(shape: tuple[int, int], low: float, high: float, cells: int, noise: np.random.Generator) -> np.ndarray:
    """A smooth random field of values in low..high, float32."""
    import numpy as np
    from PIL import Image

    rows = max(2, round(cells * shape[0] / max(shape)))
    columns = max(2, round(cells * shape[1] / max(shape)))
    coarse = Image.fromarray(noise.uniform(low, high, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _grain(shape: tuple[int, int], noise: np.random.Generator) -> np.ndarray:
    """Unit Gaussian noise, repeated from one tile, since sampling it in full would dominate the run time."""
    import numpy as np

    tile = noise.standard_normal((192, 160)).astype(np.float32)
    rows, columns = -(-shape[0] // 192), -(-shape[1] // 160)
    return np.tile(tile, (rows, columns))[: shape[0], : shape[1]]


def _fade(ink: np.ndarray, random: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Uneven print: patches, streaks along the paper, missing dot rows, dropped dots."""
    import numpy as np

    if random.random() < 0.5:
        ink = (ink * _field(ink.shape, random.uniform(0.35, 0.9), 1.0, random.randint(3, 12), noise)).astype(np.uint8)
    if random.random() < 0.2:
        ink = ink.copy()
        for _ in range(random.randint(1, 6)):
            x = random.randrange(ink.shape[1])
            ink[:, x : x + random.randint(1, 3)] //= random.randint(2, 5)
    if random.random() < 0.12:
        ink = ink.copy()
        ink[random.randrange(2) :: random.randint(2, 4)] //= 3
    if random.random() < 0.35:
        dropped = _grain(ink.shape, noise) > random.uniform(1.0, 2.2)
        ink = np.where(dropped, ink // 4, ink)
    return ink


def _skew(plane: Image.Image, random: random.Random) -> tuple[Image.Image, Matrix]:
    """Rotate by about a degree around the center, with slight shear and shift."""
    from PIL import Image

    if random.random() < 0.35:
        return plane, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    angle = math.radians(random.gauss(0.0, 0.7))
    shear = random.gauss(0.0, 0.006)
    cx, cy = plane.width / 2, plane.height / 2
    a, b = math.cos(angle), -math.sin(angle) + shear
    d, e = math.sin(angle), math.cos(angle)
    dx, dy = random.uniform(-0.5, 0.5), random.uniform(-0.5, 0.5)
    c, f = cx - a * cx - b * cy + dx, cy - d * cx - e * cy + dy
    det = a * e - b * d  # PIL takes the inverse, image -> plane
    back = (e / det, -b / det, (b * f - e * c) / det, -d / det, a / det, (d * c - a * f) / det)
    turned = plane.transform(plane.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    return turned, (a, b, c, d, e, f)


def _marks(plane: Image.Image, random: random.Random) -> None:
    """Draw pen strokes, circles, punch holes, specks and dark scanner edges into the ink."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(plane)
    w, h = plane.size
    if random.random() < 0.15:  # a pen: a jagged word, or a ring
        x, y = random.uniform(0.2, 0.7) * w, random.uniform(0.02, 0.98) * h
        points = []
        for _ in range(random.randint(6, 18)):
            x, y = x + random.uniform(-4, 14), y + random.uniform(-14, 14)
            points.append((x, y))
        draw.line(points, fill=random.randint(120, 255), width=random.randint(1, 3))
    if random.random() < 0.06:
        x, y, r = random.uniform(0.1, 0.8) * w, random.uniform(0.4, 0.9) * h, random.uniform(0.05, 0.1) * w
        draw.ellipse((x, y, x + 2 * r, y + 1.4 * r), outline=random.randint(120, 255), width=2)
    if random.random() < 0.08:
        for y in (0.15 * h, 0.75 * h):
            r = random.uniform(8, 18)
            draw.ellipse((20, y, 20 + 2 * r, y + 2 * r), fill=255)
    for _ in range(random.choice((0, 0, 4, 20, 60))):
        x, y, r = random.uniform(0, w), random.uniform(0, h), random.uniform(0.4, 1.6)
        draw.ellipse((x, y, x + r, y + r), fill=random.randint(90, 255))
    if random.random() < 0.12:
        side, thick = random.randrange(4), random.randint(2, 10)
        edges = ((0, 0, thick, h), (w - thick, 0, w, h), (0, 0, w, thick), (0, h - thick, w, h))
        draw.rectangle(edges[side], fill=255)


def _scan(ink: np.ndarray, random: random.Random, noise: np.random.Generator) -> Image.Image:
    """Map paper and ink to gray values, with shading, grain and the scanner's tone curve."""
    import numpy as np
    from PIL import Image

    paper = random.choice((255.0, random.uniform(235, 255), random.uniform(170, 240)))
    black = random.choice((random.uniform(0, 40), random.uniform(0, 40), random.uniform(40, 130)))
    page = ink.astype(np.float32)
    page *= -(paper - black) / 255.0
    page += paper
    if random.random() < 0.5:
        page += _field(ink.shape, -random.uniform(4, 40), 0.0, random.randint(2, 8), noise)
    if random.random() < 0.6:
        page += _grain(ink.shape, noise) * random.uniform(1.0, 9.0)
    if random.random() < 0.3:  # a document scanner's steep curve: nearly black and white
        page -= random.uniform(110, 190)
        page *= random.uniform(1.5, 5.0)
        page += 128.0
    np.clip(page, 0, 255, out=page)
    return Image.fromarray(page.astype(np.uint8))


def _jpeg(page: Image.Image, quality: int) -> Image.Image:
    from PIL import Image

    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("L")
