"""Images that items name: their paths, sizes and facts, and finding them in folders of one's own.

Every size is (width, height) in pixels of the upright image, as people see it and as crops are cut.

Two pictures are the same when their files' bytes are (`digest`), and nearly the same when few bits of their perceptual
hashes differ: the signs, against their median, of the lowest 24 x 24 frequencies of the picture at 64 x 64 grey pixels.
On 200 scanned receipts, a copy at two fifths of the size and JPEG quality 50 differed from its original in at most 48
of the 575 bits, and two receipts of one shop in at least 74 (most pairs in 280), so `NEAR` lies between.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from relook.boxes import turned_box
from relook.data.published import IMAGE_SETS, dataset_of
from relook.errors import UserError
from relook.files import data_url, reading, reading_named, split_page
from relook.regions import Box, Cells, join_crop_suffix, split_crop_suffix, upright
from relook.views import existing_ref

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

ImageRef = Any  # a path (str, maybe with a crop suffix) in files; a PIL image or (image, box) in items made in memory

NEAR = 60  # bits of 575
PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_SIDE, _FREQUENCIES = 64, 24
_FLAT = 2.0  # standard deviation in grey levels, under which a picture (a blank page) has nothing to compare
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that swap the sides
_YEAR = re.compile(r"^COCO_(train|val)2014_")  # what COCO's images were called before 2017

# -- paths


def place_image(ref: ImageRef, root: str | Path, *, strict: bool = False) -> ImageRef:
    """A path of an item as a path from here: relative ones are below `root`; images in memory stay as they are.

    `strict` (for a root that the user gave) refuses every path that leaves the root, absolute ones included, as it is
    written: a folder linked into the root counts as inside.
    """
    if not isinstance(ref, str | os.PathLike) or os.fspath(ref).startswith("data:"):
        return ref
    placed = os.path.normpath(os.path.join(root, os.fspath(ref)))
    inside = os.path.abspath(root)
    if strict and os.path.commonpath([inside, os.path.abspath(placed)]) != inside:
        raise UserError(
            f"image path {os.fspath(ref)!r} leaves the image root {root}; give the root that holds it, or mend the path"
        )
    return placed if placed.isascii() else _as_on_disk(placed)


def _as_on_disk(path: str) -> str:
    """The path in the Unicode form (composed or not) in which its file is there, or as it is."""
    file, box = existing_ref(path)
    folder, name = os.path.split(file)
    forms = [file, *(normalize(form, file) for form in ("NFC", "NFD"))]
    forms += [os.path.join(folder, normalize(form, name)) for form in ("NFC", "NFD")]
    found = next((form for form in forms if os.path.exists(split_page(form)[0])), file)
    return found if box is None else join_crop_suffix(found, box)


def split_ref(ref: str) -> tuple[str, Box | None]:
    """File and crop of an image entry: `"a.jpg_0,0,8,8"` is `("a.jpg", (0, 0, 8, 8))`."""
    return split_crop_suffix(ref)


def with_file(ref: ImageRef, change: Callable[[str], str]) -> ImageRef:
    """An image entry with its file changed and its crop kept; images in memory stay as they are."""
    if not isinstance(ref, str):
        return ref
    file, box = split_ref(ref)
    changed = change(file)
    return changed if box is None else join_crop_suffix(changed, box)


def relative(path: str | Path, folder: Path) -> str:
    """A path from here as one from `folder`, with "/" on every system."""
    return os.path.relpath(path, folder).replace(os.sep, "/")


# -- sizes


def upright_size(image: Image.Image, *, header_only: bool = False) -> tuple[int, int]:
    """The size of an opened image once upright.

    Args:
        header_only: of a PNG, the EXIF block after the pixels (for which Pillow decodes them all) is not looked for.
    """
    if header_only and image.format == "PNG" and "exif" not in image.info:
        return image.size
    return (image.height, image.width) if orientation_of(image) in _SIDEWAYS else image.size


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, TypeError, ValueError):  # an EXIF block that is none
        return 1


def file_size(path: str, where: str = "", *, header_only: bool = False) -> tuple[int, int] | None:
    """The size of an image file once upright, from its header; None where there is no such file."""
    try:
        with reading_named(path, where) as image:
            return upright_size(image, header_only=header_only)
    except FileNotFoundError:
        return None


def file_turn(image: ImageRef) -> int:
    """The EXIF orientation of an image file (or of one in memory), 1 where there is none."""
    if not isinstance(image, str):
        return orientation_of(image)
    try:
        with reading_named(image) as opened:
            return orientation_of(opened)
    except FileNotFoundError:
        raise UserError(f"{image}: no such image; boxes of the file as stored need its EXIF orientation") from None


# -- facts


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One image file. Sizes are (width, height) in pixels.

    problem      "missing", "unreadable" or None; `detail` says why
    size         once upright, as people see it and as crops are cut
    orientation  the EXIF tag, 1 where there is none
    digest       of the file's bytes, and which page of them
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
    path, page = split_page(path)
    try:
        if not path.startswith("data:") and os.path.exists(path) and not os.path.isfile(path):
            return ImageFacts("unreadable", "not a file")  # a pipe would be waited for
        data = data_url(path) if path.startswith("data:") else Path(path).read_bytes()
    except FileNotFoundError:
        return ImageFacts("missing", "no such file")
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte, a data URL that is none
        return ImageFacts("unreadable", getattr(error, "strerror", None) or str(error))
    try:
        with reading(io.BytesIO(data), "", page=page) as image:
            size, orientation = upright_size(image), orientation_of(image)
            image.draft("L", (2 * _SIDE, 2 * _SIDE))  # JPEGs are read to the end, but not at full size
            image.load()
            if image.mode.startswith(("I", "F")):
                upright(image)  # values that are no pixels are refused
            found = _look(image) if look else None
    except UserError as error:
        return ImageFacts("unreadable", str(error).removeprefix(": ").rsplit("; ", 1)[0])
    data += f"#{page.number}".encode() if (page.number or 1) > 1 else b""
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
    """Cells of the stored picture as cells of the upright one."""
    x0, y0, x1, y1 = cells
    x0, y0, x1, y1 = map(int, turned_box((x0, y0, x1 + 1, y1 + 1), (grid, grid), orientation))
    return x0, y0, x1 - 1, y1 - 1


class FactsBelow(dict[str, ImageFacts | None]):
    """The facts of image files by the paths that items give them, each read once when it is asked for.

    A path that leaves a strict root is not followed: None.
    """

    def __init__(self, root: str | Path, strict: bool, look: bool = False) -> None:
        self.root, self.strict, self.look = root, strict, look

    def __missing__(self, file: str) -> ImageFacts | None:
        try:
            found = read_facts(place_image(file, self.root, strict=self.strict), look=self.look)
        except UserError:
            found = None
        return self.setdefault(file, found)


def _look(image: Image.Image) -> bytes | None:
    """The perceptual hash of the upright picture, 72 bytes."""
    import numpy as np
    from PIL import Image as Pillow

    small = upright(image).convert("L").resize((_SIDE, _SIDE), Pillow.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float64)
    if pixels.std() < _FLAT:
        return None
    spectrum = _cosines() @ pixels @ _cosines().T
    values = spectrum.ravel()[1:]  # without the mean
    return np.packbits(values > np.median(values)).tobytes()


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    import numpy as np

    return np.cos(np.pi * (2 * np.arange(_SIDE) + 1) * np.arange(_FREQUENCIES)[:, None] / (2 * _SIDE))


# -- finding published paths


@dataclass
class ImageFinder:
    """Finds published paths in folders of one's own, by dataset and file name. Each folder is listed once, on use.

    Several files of that name: the one whose folders agree longest with the published path, from the end; equally long
    ones are not guessed between. None of that name: COCO's short one of 2017 for its long one of 2014, or the same name
    with another ending (OCR-VQA as .jpg).
    """

    folders: Mapping[str, Path]
    _listed: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def find(self, path: str) -> str | None:
        """The file of a published path, or None."""
        name = dataset_of(path, tuple(self.folders)) if self.folders else None
        if name is None or name not in self.folders:
            return None
        path = normalize("NFC", path.replace("\\", "/"))
        listed, file = self._list(name), PurePosixPath(path).name
        short = _YEAR.sub("", file)
        found = listed.get(file) or listed.get(short) or listed.get(_stem(file)) or listed.get(_stem(short)) or []
        ranked = sorted(((_shared_tail(path, each), each) for each in found), reverse=True)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return os.path.join(self.folders[name], ranked[0][1])

    def _list(self, name: str) -> dict[str, list[str]]:
        """Relative paths by file name, and by stem (with a "/" at its end, which no file name has)."""
        if name not in self._listed:
            listed = self._listed[name] = {}
            for folder, files in _walk(self.folders[name]):
                for file in files:
                    if file.lower().endswith(PICTURES):
                        path, known = (
                            os.path.join(os.path.relpath(folder, self.folders[name]), file),
                            normalize("NFC", file),
                        )
                        for key in (known, _stem(known)):
                            listed.setdefault(key, []).append(Path(path).as_posix())
        return self._listed[name]


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `root` once, with its files; through links, though not in circles."""
    seen = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        yield folder, sorted(files)


def _stem(file: str) -> str:
    return f"{PurePosixPath(file).stem}/"


def _shared_tail(a: str, b: str) -> int:
    """How many folders of two paths agree from the end, the file's own name left out."""
    pairs = zip(*(path.lower().split("/")[-2::-1] for path in (a, b)), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


# -- copies of image sets


@dataclass(frozen=True)
class SetCheck:
    """A local copy of one set against the manifest: what was found, and every fault in words."""

    name: str
    folder: str
    images: int
    archives: int
    faults: tuple[str, ...]
    unknown: tuple[str, ...]  # what could not be checked, since nobody published it

    def __str__(self) -> str:
        head = f"{self.name}: {self.folder}: {self.images} image files, {self.archives} archives"
        lines = [f"    wrong: {fault}" for fault in self.faults] + [f"    not checked: {what}" for what in self.unknown]
        return "\n".join([head, *lines])


def check_copy(name: str, folder: str | Path) -> SetCheck:
    """Hold a folder against the manifest's row: archives lying in it by size and checksum, image files by number.

    Reads every archive that has a published checksum from end to end.
    """
    if name not in IMAGE_SETS:
        raise UserError(f"{name!r} is none of the image sets; expected one of {', '.join(IMAGE_SETS)}")
    row, faults, unknown = IMAGE_SETS[name], list[str](), list[str]()
    found = {file: Path(place, file) for place, inside in _walk(Path(folder)) for file in inside}
    files = {archive.name: found[archive.name] for archive in row.archives if archive.name in found}
    images = sum(file.lower().endswith(PICTURES) for _, inside in _walk(Path(folder)) for file in inside)
    for archive in row.archives:
        path, kind = files.get(archive.name), (archive.checksum or "").partition(":")[0]
        if path is None:
            faults += [] if images else [f"no image, and no {archive.name}"]
        elif archive.bytes is not None and path.stat().st_size != archive.bytes:
            faults.append(f"{path} has {path.stat().st_size} bytes, {archive.bytes} are published ({archive.by})")
        elif not kind:
            unknown.append(f"{archive.name}: no checksum is published")
        elif (summed := _checksum(path, kind)) != archive.checksum:
            faults.append(f"{path} sums to {summed}, published is {archive.checksum} ({archive.by})")
    if not row.archives and not images:
        faults.append("no image")
    if images and row.images is None:
        unknown.append("how many images there are is not published")
    elif images and images < (row.images or 0):
        faults.append(f"{images} image files of {row.images}")
    return SetCheck(name, str(folder), images, len(files), tuple(faults), tuple(unknown))


def _checksum(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"
