"""Image files: where their bytes come from, which page of them is meant, and what Pillow does not read by itself.

A page of a PDF or TIFF is named by the fragment of its path or address, as browsers do: `scan.pdf#page=2`, counted from
1, of a PDF also with its resolution, `scan.pdf#page=2&dpi=300` (without it `DPI`). Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes

from relook.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

DPI = 200  # at which a page of a PDF is drawn: letters of 10 points are 28 pixels high
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, RuntimeError, struct.error)  # as PIL raises on files
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands; AVIF is read by Pillow
_PAGE = re.compile(r"(?=[pd])(?:page=(?P<page>\d{1,6}))?(?:(?(page)&)dpi=(?P<dpi>\d{1,5}))?")
_SUBFILE, _NO_PAGE = 254, 1 | 4  # a TIFF's tag of what a frame is: a smaller copy or a mask is no page


@dataclass(frozen=True)
class Page:
    """Which page of a file, counted from 1 (None: its only one), and for a PDF the dots per inch."""

    number: int | None = None
    dpi: int | None = None


ONLY_PAGE = Page()


def split_page(name: str) -> tuple[str, Page]:
    """A path or address without its page, and the page (not where there is a file that is really called so).

    >>> split_page("scan.pdf#page=2&dpi=300")
    ('scan.pdf', Page(number=2, dpi=300))
    """
    at = name.rfind("#", -40)
    match = _PAGE.fullmatch(name[at + 1 :]) if at >= 0 else None
    if match is None or (len(name) < 4096 and os.path.exists(name)):
        return name, ONLY_PAGE
    number, dpi = (None if said is None else int(said) for said in (match["page"], match["dpi"]))
    return name[:at], Page(number, dpi)


# -- bytes


def data_url(url: str) -> bytes:
    """The content of `data:image/png;base64,...`, or of one that is percent-encoded."""
    head, comma, body = url.partition(",")
    data = base64_bytes(unquote(body)) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    if not comma or not data:
        raise UserError(f"data URL {url[:40]}... holds no data that can be read; expected data:image/png;base64,...")
    return data


def base64_bytes(text: str) -> bytes | None:
    """What base64 text stands for; None for other text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


def download(url: str) -> bytes:
    """The content of an http(s) address."""
    from huggingface_hub.utils import httpx

    try:
        return httpx.get(url, follow_redirects=True).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{url}: cannot be fetched ({str(error).splitlines()[0]}); check the address") from None


def file_bytes(path: str) -> bytes:
    """The content of an image file that is there and not empty."""
    try:
        data = b"" if os.path.exists(path) and not os.path.isfile(path) else Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise UserError(f"{path[:300]}: {str(reason).lower()}; give the path of an image") from None
    if not data:
        why = "the file is empty" if os.path.isfile(path) else "not a file"
        raise UserError(f"{path}: {why}; give the path of an image")
    return data


def stream_bytes(stream: Any) -> bytes:
    """The content of an open file, from its beginning where it can go back there."""
    try:
        if getattr(stream, "seekable", lambda: hasattr(stream, "seek"))():
            stream.seek(0)
        data = stream.read()
    except (OSError, ValueError) as error:  # closed, or not open for reading
        raise UserError(f"the open file cannot be read ({error}); give one that is open in binary mode") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise UserError(f"reading the open file gave a {type(data).__name__}; open it in binary mode, 'rb'")
    return bytes(data)


# -- images


@contextmanager
def reading(
    file: Any, name: str, formats: tuple[str, ...] | None = None, page: Page = ONLY_PAGE
) -> Iterator[Image.Image]:
    """An image file as Pillow opens it, not decoded yet. Raises UserError (with `name`) for what Pillow raises inside.

    Args:
        file: a path, or a binary file that can be read again.
        name: of it, for messages.
        formats: the only ones to try, by Pillow's names. None: all, and PDF and HEIC.
        page: of several. A TIFF or PDF with more than one page and none named is refused; of animations the first
            picture is meant.

    A missing file is a FileNotFoundError.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with (
            open(file, "rb") if isinstance(file, (str, os.PathLike)) else nullcontext(file) as opened,
            _opened(opened, formats, page) as image,
        ):
            yield image
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image that can be read; give a JPEG, PNG, WebP, TIFF or similar") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: {error}; give a smaller image") from error
    except DAMAGED as error:
        raise UserError(f"{name}: the image is damaged or cut short ({error}); give a complete file") from error


@contextmanager
def reading_named(path: str, where: str = "") -> Iterator[Image.Image]:
    """As `reading`, of a file (one of its pages) by its path or data URL; messages open with `where`."""
    path, page = split_page(path)
    held, name = path.startswith("data:"), f"{where}: {path}".removeprefix(": ")
    if not held and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{name}: not a file; give the path of an image")
    with reading(io.BytesIO(data_url(path)) if held else path, name, page=page) as image:
        yield image


def _opened(file: IO[bytes], formats: tuple[str, ...] | None, page: Page) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(1024)
        if formats is None and b"%PDF-" in head:
            dpi = DPI if page.dpi is None else page.dpi
            return _library("relook.pdf", "a PDF", "pypdfium2").PdfPage(file, partial(check_page, page), dpi)
        if formats is not None or head[4:8] != b"ftyp" or head[8:12] not in HEIF:
            raise
        _library("pillow_heif", "a HEIC image", "pillow-heif").register_heif_opener()
        image = Image.open(file)
    if page.dpi is not None:
        raise UserError(f"dpi={page.dpi} is for a PDF, and this is {image.format}; leave it out")
    frames = _pages(image) if image.format == "TIFF" else range(getattr(image, "n_frames", 1) if page.number else 1)
    at = check_page(page, len(frames))
    if frames[at] != image.tell():
        image.seek(frames[at])
    return image


def check_page(page: Page, pages: int) -> int:
    """The index of a page among so many."""
    named = "#page=1" if pages == 1 else f"#page=1 to #page={pages}"
    if page.number is None and pages > 1:
        raise UserError(
            f"has {pages} pages, of which one can be shown: add {named} to its path or address "
            "(give bytes and open files by one)"
        )
    number = 1 if page.number is None else page.number
    if not 1 <= number <= pages:
        raise UserError(f"has no page {number}; expected {named}")
    return number - 1


def _pages(image: Any) -> list[int]:
    """The frames of a TIFF that are pages."""
    found = []
    for frame in count() if getattr(image, "is_animated", False) else ():
        try:
            image.seek(frame)
        except EOFError:
            break
        if not int(image.tag_v2.get(_SUBFILE, 0)) & _NO_PAGE:
            found.append(frame)
    return found or [0]


def _library(module: str, what: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError(
            f"is {what}, which needs {package}, which is not installed; pip install 'relook[files]'"
        ) from None
