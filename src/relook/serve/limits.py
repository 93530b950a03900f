"""How much a request may ask for, and how much all of them may hold in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock

from pydantic import BaseModel, ConfigDict, Field

from relook.errors import UserError
from relook.perceive.engine import EngineBusy


class Limits(BaseModel):
    """Limits of a request; one over them is refused with a sentence that has both numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    body_bytes: int = Field(32 * 2**20, ge=1024)
    """Bytes of a request's body, images in base64 included."""
    body_values: int = Field(20_000, ge=100)
    """Values in its JSON, counted by its brackets and commas."""
    body_seconds: float = Field(30, gt=0)
    """Time in which the body has to arrive."""
    images: int = Field(16, ge=1)
    """Images of a request, those of earlier turns included."""
    pixels: int = Field(64_000_000, ge=1)
    """Pixels of these images together (a page at 600 dpi has 35 million, a phone's picture 12 to 50)."""
    decode_seconds: float = Field(10, gt=0)
    """Processor time for decoding one of them."""
    turns: int = Field(64, ge=1)
    """Messages of a conversation."""
    looks: int = Field(32, ge=1)
    """Looks of a conversation's answers, and `max_looks` of a request; a model's own number is cut to it."""
    question_characters: int = Field(16_000, ge=1)
    """Characters of one message, of whichever role."""
    context_tokens: int | None = Field(None, ge=1)
    """Tokens of a conversation with its images and answer; None: as many as the model's window has."""
    seconds: float = Field(120, gt=0)
    """Time for a request from its admission to the end of its answer."""
    memory_bytes: int = Field(2**30, ge=2**20)
    """Bodies and decoded images of all requests in work together; what goes over it is answered with 429."""

    def check(self, turns: Iterable[str], images: int, looks: int = 0) -> None:
        """Refuse a conversation of too many turns, images or looks, or with a turn that is too long.

        Args:
            turns: the text of each message.
            images, looks: their number in all of them.
        """
        texts = list(turns)
        longest = max(map(len, texts), default=0)
        for seen, limit, what, cure in (
            (len(texts), self.turns, "messages", "leave out the oldest"),
            (images, self.images, "images", "send fewer"),
            (looks, self.looks, "looks", "ask for fewer"),
            (longest, self.question_characters, "characters in one message", "shorten it"),
        ):
            if seen > limit:
                raise UserError(f"the request has {seen:,} {what}, this server takes at most {limit:,}; {cure}")


class Memory:
    """Bytes held by the requests in work, all together at most `limit`."""

    def __init__(self, limit: int):
        self.limit, self.held, self._lock = limit, 0, Lock()

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request: what is held (`hold`) inside the block is given back at its end."""
        request = _Request(self)
        token = _current.set(request)
        try:
            yield
        finally:
            _current.reset(token)
            self.take(-request.held)

    def take(self, count: int) -> None:
        with self._lock:
            if count > 0 and self.held + count > self.limit:
                raise EngineBusy(
                    f"the requests in work hold {self.held:,} bytes, and with this one more than {self.limit:,}; "
                    "try again in a moment",
                    retry_after=1,
                )
            self.held += count


@dataclass
class _Request:
    memory: Memory
    held: int = 0


_current: ContextVar[_Request | None] = ContextVar("_current", default=None)


def hold(count: int) -> None:
    """Count `count` bytes to the request that is being worked on (to none outside of a server).

    Raises:
        EngineBusy: the memory for requests is used up.
    """
    if (request := _current.get()) is not None:
        request.memory.take(count)
        request.held += count
