"""Images of requests, decoded in processes of their own.

A file of a few kilobytes can keep a decoder busy for minutes or make it take gigabytes without naming a large size (a
tile of a TIFF, thousands of scans of a JPEG), and a bug in a decoder can end its process. So a child process opens a
request's images, with limits on its time and memory set by the system; it starts again when it dies. Two of them work
side by side, and while they do the server's own Python is free.

    python -m relook.serve.decode        # a child: files on stdin, pixels on stdout

Size and format are in the first bytes of a file, and are checked before it is decoded.
"""

from __future__ import annotations

import io
import os
import queue
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

from relook.errors import RelookError, UserError
from relook.files import ONLY_PAGE, Page, reading
from relook.views import open_image

if TYPE_CHECKING:
    from PIL import Image

# Raster formats that people send. Pillow opens forty more, some of them by other programs (EPS by Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
SNIFFED = 1024  # leading bytes in which browsers and PDF readers look for what a file is
OTHER_FILES = {b"%pdf-": "a PDF", b"<html": "a web page", b"<script": "a script"}
CHILDREN = 2
BASE_MEMORY, PIXEL_MEMORY = 2**30, 16  # bytes of address space: Python and its libraries; per pixel that is allowed
QUESTION, ANSWER = struct.Struct("<QQQdQ"), struct.Struct("<QQQ")


def opened(data: bytes, seen: int, limit: int, page: Page = ONLY_PAGE) -> Image.Image:
    """The image of a file, upright RGB.

    Args:
        data: the file.
        seen: pixels of the request's images before it.
        limit: pixels that the images of a request may have together.
        page: of several.

    Raises:
        UserError: it is no image, or also something else, is cut short, or has too many pixels.
    """
    from PIL import features

    if other := _other_file(data):
        raise UserError(f"it is {other}, which is not taken; send a JPEG, PNG or WebP file of its own")
    formats = tuple(name for name in FORMATS if name != "AVIF" or features.check("avif"))
    with reading(io.BytesIO(data), "it", formats, page) as image:
        size = image.width * image.height
        if seen + size > limit:
            total = f", {seen + size:,} with the images before it" if seen else ""
            raise UserError(
                f"{image.width:,} x {image.height:,} pixels are {size:,}{total}; this server takes at most {limit:,} "
                "in a request; send a smaller image"
            )
        return open_image(image)


def _other_file(data: bytes) -> str | None:
    """What else a file passes for, in programs that are handed it as an image; None: nothing.

    Bytes after the image are common (phones append a film to a photo) and are not looked at, but archives are read from
    their end.
    """
    head = data[:SNIFFED].lower()
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "an SVG drawing, a web page or other text"
    for mark, what in OTHER_FILES.items():
        if mark in head:
            return f"(also) {what}"
    try:
        with zipfile.ZipFile(io.BytesIO(data)):
            return "(also) a ZIP archive"
    except (zipfile.BadZipFile, ValueError, OSError, OverflowError, NotImplementedError, struct.error):
        return None


class Decoders:
    """Child processes that open images. They start when they are first needed, and end with this process.

    Attributes:
        threads: one for each child, in which to call `open`.
    """

    def __init__(self, count: int = CHILDREN):
        self.threads = ThreadPoolExecutor(count, "decode")
        self._free: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def open(self, data: bytes, seen: int, limit: int, seconds: float, page: Page = ONLY_PAGE) -> Image.Image:
        """As `opened`, in `seconds` of processor time at most."""
        from PIL import Image

        child = self._free.get()
        try:
            if child is None or child.poll() is not None:
                child = _start()
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(QUESTION.pack(len(data), seen, limit, seconds, page.number or 0) + data)
                child.stdin.flush()
                width, height, length = ANSWER.unpack(_exactly(child.stdout, ANSWER.size))
                content = _exactly(child.stdout, length)
            except (EOFError, OSError):  # it has ended, or is about to
                if (status := child.wait()) > 0:
                    raise RelookError(
                        f"no images can be opened: relook.serve.decode ended with status {status}"
                    ) from None
                raise UserError(
                    f"decoding it takes more than {seconds:g} seconds or more memory than its size needs; "
                    "save it again as a plain PNG or JPEG"
                ) from None
        finally:
            self._free.put(child)
        if width == 0:
            raise UserError(content.decode())
        return Image.frombytes("RGB", (width, height), content)


def _start() -> subprocess.Popen[bytes]:
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    found_here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", "relook.serve.decode"]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, env=found_here)


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _work(questions: IO[bytes], answers: IO[bytes]) -> None:
    """A child: answers until its parent closes the pipe."""
    while len(head := questions.read(QUESTION.size)) == QUESTION.size:
        length, seen, limit, seconds, page = QUESTION.unpack(head)
        _bound(seconds, BASE_MEMORY + PIXEL_MEMORY * limit)
        answers.write(_answer(questions.read(length), seen, limit, Page(page or None)))
        answers.flush()


def _answer(data: bytes, seen: int, limit: int, page: Page) -> bytes:
    """Size and pixels; of a refusal no size, and a sentence."""
    try:
        image = opened(data, seen, limit, page)
        size, content = image.size, image.tobytes()
    except UserError as error:
        size, content = (0, 0), str(error).removeprefix("it: ").encode("utf-8", "replace")
    except Exception as error:  # whatever a decoder raises is about this file, and ends no more than its question
        size, content = (0, 0), f"it cannot be decoded ({type(error).__name__}); give a complete image".encode()
    return ANSWER.pack(*size, len(content)) + content


def _bound(seconds: float, memory: int) -> None:
    """Let the system end this process after `seconds` more of processor time, and refuse it more memory."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    for what, amount in (
        (resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


if __name__ == "__main__":
    import signal

    from PIL import AvifImagePlugin, Image

    Image.MAX_IMAGE_PIXELS = None  # the server's own limit holds
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each would take address space
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the server drains first, and then closes the pipe
    _work(sys.stdin.buffer, sys.stdout.buffer)
