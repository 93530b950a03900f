"""A page of a PDF as an image of Pillow's, drawn when its pixels are asked for. Needs pypdfium2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import IO, Any

import pypdfium2
from PIL import Image, ImageFile

from relook.errors import UserError

_EXACT = 1 - 1e-6  # sides are rounded up, and 8.5 inches at 200 dpi are 1700.0001 pixels to a float of 32 bits
_LOCK = Lock()  # PDFium works in one thread at a time


class PdfPage(ImageFile.ImageFile):
    """A page as people see it: turned as it says, on white, with what forms were filled in.

    Args:
        file: binary, and open until the page is drawn.
        index_of: the index of the page, of so many.
        dpi: dots per inch.
    """

    format, format_description = "PDF", "Portable Document Format"

    def __init__(self, file: IO[bytes], index_of: Callable[[int], int], dpi: int):
        self.index_of, self.dpi = index_of, dpi
        self.scale = self.dpi / 72 * _EXACT
        super().__init__(file)

    def _open(self) -> None:
        if self.dpi < 1:
            raise UserError(f"dpi={self.dpi} draws nothing; expected 1 or more")
        with self._opened() as page:
            width, height = (math.ceil(side * self.scale) for side in page.get_size())
        if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
            raise UserError(f"its page has {width} x {height} pixels at {self.dpi} dpi; ask for fewer, such as &dpi=72")
        self._mode, self._size = "RGB", (width, height)

    def load(self) -> Any:
        if self._im is None:
            with self._opened() as page:
                self.im = page.render(scale=self.scale).to_pil().convert("RGB").im
        return Image.Image.load(self)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with _LOCK:
            try:
                pdf = pypdfium2.PdfDocument(self.fp)
            except pypdfium2.PdfiumError as error:
                locked = "password" in str(error).lower()
                why = "is locked with a password; save it without" if locked else f"is a damaged PDF ({error})"
                raise UserError(why) from error
            try:
                pdf.init_forms()
                yield pdf[self.index_of(len(pdf))]
            finally:
                pdf.close()
