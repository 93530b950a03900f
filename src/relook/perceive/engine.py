"""The seam of engines: a typed request in, typed events out.

`LocalEngine` (local.py) answers with a model in this process, `OpenAIEngine` (endpoint/openai.py) with one behind an
OpenAI-compatible endpoint. Servers and Ray replicas know this file only.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

from PIL import Image

from relook.errors import RelookError, UserError
from relook.looks import LOOKS
from relook.options import AUTO, AskOptions
from relook.regions import Cells
from relook.trace import Event, Finished

STOPS, STOP_LENGTH = 16, 500
REGIONS = ("region_of", "region_margin", "max_looks")


@dataclass(frozen=True, eq=False)
class GivenLook:
    """A look that was taken before this request.

    cells   of a region, None for a re-encoding
    kind    "region" or a re-encoding look
    image   the crop that whoever asks has made; None: it is made again from the original image
    box     in place of cells, (x1, y1, x2, y2) pixels of the original: the cells that cover it are called
    """

    cells: Cells | None = None
    kind: str = "region"
    image: Image.Image | None = None
    box: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in LOOKS or (self.cells is None and self.box is None) != LOOKS[self.kind].reencodes:
            raise UserError(
                f"look {self.kind!r} with cells {self.cells}; expected a region with cells, or a re-encoding"
            )


LookTurns = tuple[tuple[GivenLook, ...], ...]  # the looks of each turn of the assistant that called some


@dataclass(frozen=True, eq=False)
class Past:
    """An earlier question with its answer; `images` came with it, `looks` were taken for it.

    `look` is the option that it was asked with; None: "auto", unless the first of `looks` is another one. `look_at` is
    the number of the image that they went to; None: as `ask` has it.
    """

    question: str
    images: tuple[Image.Image, ...] = ()
    answer: str = ""
    looks: LookTurns = ()
    look: str | None = None
    look_at: int | None = None

    @property
    def asked(self) -> str:
        """The option that it was asked with."""
        taken = self.looks[0][0].kind if self.looks else AUTO
        return self.look or (AUTO if taken == "region" else taken)


@dataclass(frozen=True, eq=False)
class Request:
    """A question, with what was said before. All texts are from outside and plain: none is read as structure.

    Attributes:
        question: in words.
        images: opened, upright (`relook.views.open_image`).
        past: the conversation so far. It says all: the answer does not depend on what an engine remembers.
        system: in place of the processor's system prompt; None leaves that.
        stop: texts that end the answer; it goes up to the first of them.
        logprobs: how many most probable tokens to name beside each token; None: no probabilities.
        hold_regions: whoever asks takes region looks. The answer ends where the model calls some: `answer.finish` is
            "look", and `answer.looks` have their cells and boxes, and no image.
        looks: of this question, which whoever asks has taken already.
    """

    question: str
    images: tuple[Image.Image, ...] = ()
    options: AskOptions = field(default_factory=lambda: AskOptions.of({}))
    past: tuple[Past, ...] = ()
    system: str | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    hold_regions: bool = False
    looks: LookTurns = ()

    @property
    def characters(self) -> int:
        """Of all its texts."""
        return len(self.system or "") + len(self.question) + sum(len(p.question) + len(p.answer) for p in self.past)

    def check(self, images: Sequence[Image.Image] = ()) -> None:
        """Refuse what no engine can answer; `images` are those of the conversation that it goes on from.

        Raises:
            UserError: what is wrong.
        """
        texts, images = [self.question, self.system or "", *self.stop], [*images]
        for past in (*self.past, Past(self.question, self.images, looks=self.looks)):
            texts += [past.question, past.answer]
            images.extend(past.images)
            if past.looks and not images:
                raise UserError("looks without an image before them; give the image that they went to")
            if not all(past.looks):
                raise UserError("a turn of looks without a look; leave it out")
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise UserError("a text holds half a character (a lone surrogate); give text in Unicode")
        if self.options.first_look in LOOKS and not images:
            raise UserError(f"look={self.options.first_look!r} was asked for without an image; give one")
        if len(self.stop) > STOPS or not all(0 < len(stop) <= STOP_LENGTH for stop in self.stop):
            raise UserError(f"stop: expected at most {STOPS} texts of 1 to {STOP_LENGTH} characters")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise UserError(f"logprobs={self.logprobs}; expected 0 to 20 most probable tokens")


class EngineBusy(RelookError):
    """The queue is full; `retry_after` is an estimate in seconds."""

    def __init__(self, message: str, retry_after: float = 1):
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(RelookError):
    """The engine takes no more requests."""


class DeadlineExceeded(RelookError):
    """A request took longer than it was given."""


class Cancelled(RelookError):
    """A request was cancelled while somebody still read its events."""


class Running:
    """A request at work: iterate over it, in a thread or asynchronously, once. Leaving off cancels it.

    Args:
        on_cancel: called once when the request is cancelled before its end.
    """

    def __init__(self, on_cancel: Callable[[], None] = lambda: None):
        self.on_cancel = on_cancel
        self._items: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None
        self._lock = Lock()
        self.ended = False

    def put(self, item: Event | BaseException) -> None:
        """Called by the engine: an event, or what failed. Nothing follows `Finished` or a failure."""
        with self._lock:
            if self.ended:
                return
            self.ended = isinstance(item, (Finished, BaseException))
        self._items.put(item)
        self._wake()

    def cancel(self) -> None:
        """Stop the work; who still reads gets `Cancelled`. Without effect after the end."""
        if not self.ended:
            self.put(Cancelled("the request was cancelled"))
            self.on_cancel()

    def __iter__(self) -> Iterator[Event]:
        try:
            while True:
                item = self._items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop is closed, and nobody reads any more
                loop.call_soon_threadsafe(ready.set)

        self._wake = wake
        ready.set()
        try:
            while True:
                await ready.wait()
                ready.clear()
                while not self._items.empty():
                    item = self._items.get()
                    if isinstance(item, BaseException):
                        raise item
                    yield item
                    if isinstance(item, Finished):
                        return
        finally:
            self.cancel()


class Engine(Protocol):
    """What answers requests.

    Attributes:
        name: of the model.
        looks: names of the looks that the model can take here.
        domain: what a small model was trained on; None for a general one.
        warnings: that apply to every answer.
        grid: cells per side that regions are given in.
        regions: how regions are looked at, the processor's `REGIONS`.
        context: tokens that a conversation may have; None where the engine does not know.
    """

    name: str

    @property
    def looks(self) -> list[str]: ...
    @property
    def domain(self) -> str | None: ...
    @property
    def warnings(self) -> list[str]: ...
    @property
    def grid(self) -> int: ...
    @property
    def regions(self) -> dict[str, Any]: ...
    @property
    def context(self) -> int | None: ...

    def submit(self, request: Request, timeout: float | None = None) -> Running:
        """Take a request; returns at once.

        Args:
            request: see there.
            timeout: seconds after which iterating raises `DeadlineExceeded`.

        Raises:
            UserError: what `VLM.ask` refuses, or more tokens than fit. EngineBusy, EngineClosed.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Numbers for monitoring: rows at work, requests waiting, tokens held."""
        ...

    def close(self, drain: float = 0) -> None:
        """Take no more requests; those at work get `drain` seconds to finish, then `EngineClosed`."""
        ...
