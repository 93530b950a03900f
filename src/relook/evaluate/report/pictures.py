"""The pictures of a report's page: which images there are, which are shown, and their bytes.

A record names its image by a path; where it has none, its task draws it again (`Task.image`). Sizes are (width, height)
in pixels of the upright original.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from relook.errors import UserError
from relook.evaluate.records import Record, image_key
from relook.evaluate.tasks import named_task
from relook.views import load_item_image

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]

SIDE, QUALITY = 1024, 65  # longest side in pixels, JPEG quality: letters of a receipt can be read
COLORS = 64  # the most that an image has which is kept as PNG


@dataclass
class Pictures:
    """What is shown of the images, by `image_key` of their records.

    shown   data URI and size of the original
    why     why an image is not there, in words
    left    how many were left out because of the cap
    """

    shown: dict[str, tuple[str, Size]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    left: int = 0


def gather(records: Iterable[Record], most: int) -> Pictures:
    """At most `most` of the records' images, each once: those that most records are about, evenly among equals."""
    asked: dict[str, list[Record]] = {}
    for record in records:
        asked.setdefault(image_key(record), []).append(record)
    chosen = _chosen({name: len(each) for name, each in asked.items()}, max(most, 0))
    found = Pictures(left=len(asked) - len(chosen))
    for name in chosen:
        try:
            image = find(asked[name])
            found.shown[name] = data_uri(image), image.size
        except UserError as error:
            found.why[name] = str(error).partition(";")[0]
    return found


def _chosen(counts: Mapping[str, int], most: int) -> list[str]:
    """The names to show, in their order.

    >>> _chosen({"a": 1, "b": 4, "c": 1, "d": 1, "e": 1}, 3)
    ['a', 'b', 'd']
    """
    chosen: list[str] = []
    for count in sorted(set(counts.values()), reverse=True):
        names = [name for name, each in counts.items() if each == count]
        room = min(most - len(chosen), len(names))
        chosen += [names[i * len(names) // room] for i in range(room)]
    kept = set(chosen)
    return [name for name in counts if name in kept]


def find(records: Sequence[Record]) -> Image.Image:
    """The image of these records, opened or drawn again.

    Raises:
        UserError: neither a file nor a page of a world; a page on which the question is not found any more; another
            size than the records say.
    """
    first = records[0]
    image = load_item_image(first["image"]) if first["image"] else _drawn(records)
    size = next((tuple(known) for record in records if (known := record.get("size"))), image.size)
    if image.size != size:
        raise UserError(
            f"{image_key(first)} is {image.width} x {image.height} pixels now, and was {size[0]} x {size[1]}"
        )
    return image


def _drawn(records: Sequence[Record]) -> Image.Image:
    """The image, drawn again by the task of its records; each record must be answered by it."""
    task = named_task(records[0]["task"])
    draw = None if task is None else task.image
    if draw is None:
        raise UserError("the image was in memory only")
    images = [draw(record) for record in records]
    return images[0]


def data_uri(image: Image.Image) -> str:
    """The image, small, as a data URI: PNG where it has few colors (drawn pages), else JPEG."""
    small = image if image.mode == "RGB" else image.convert("RGB")
    if max(small.size) > SIDE:
        small = small.copy()
        small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    if small.getcolors(COLORS):
        form = "png"
        small.save(out, "PNG", optimize=True)
    else:
        form = "jpeg"
        small.save(out, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/{form};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"
