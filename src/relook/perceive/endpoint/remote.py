"""`VLM`'s interface to a model behind an endpoint: what `relook.load` returns for an address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from PIL import Image

from relook.errors import UserError
from relook.options import AskOptions
from relook.trace import Answer, Event, Finished, Turn

from ..engine import Request
from ..vlm import ROWS_AT_ONCE, check_pairs, last_answer, opened_images, unpack
from .asking import Asking
from .openai import OpenAIEngine


class RemoteVLM:
    """A model at an address, asked as a `VLM` is.

    Args:
        engine: what reaches it.
    """

    def __init__(self, engine: OpenAIEngine):
        self.engine, self.processor = engine, engine.processor

    name = property(lambda self: self.engine.name)
    looks = property(lambda self: self.engine.looks)
    domain = property(lambda self: self.engine.domain)
    warnings = property(lambda self: self.engine.warnings)
    context = property(lambda self: self.engine.context)
    interventions = property(lambda self: self.engine.interventions)

    def with_settings(self, **settings: Any) -> RemoteVLM:
        raise UserError(
            f"{', '.join(settings)}: the settings of a model at an address are its server's and its processor's; "
            "open it with processor=, or load the model in this process"
        )

    def ask(self, image: Any, question: str, **options: Any) -> Answer:
        """See `VLM.ask`; `condition` and re-encoding looks need a model in this process."""
        return last_answer(self.stream(image, question, **options))

    def stream(self, image: Any, question: str, **options: Any) -> Iterator[Event]:
        """See `VLM.stream`. Leaving off closes the connection, so that the server stops, too."""
        return self.chat().stream(question, image, **options)

    def ask_many(
        self, pairs: Iterable[Sequence[Any] | Mapping[str, Any]], *, batch_size: int = ROWS_AT_ONCE, **options: Any
    ) -> list[Answer]:
        """See `VLM.ask_many`; `batch_size` requests are under way at once."""
        check_pairs(pairs, batch_size)
        rest, answers = enumerate(pairs), list[Answer]()
        while batch := [self._numbered(number, pair, options) for number, pair in islice(rest, batch_size)]:
            with ThreadPoolExecutor(len(batch)) as pool:
                answers += pool.map(lambda asking: last_answer(asking.events()), batch)
        return answers

    def chat(self, image: Any = None) -> RemoteChat:
        """See `VLM.chat`."""
        return RemoteChat(self.engine, opened_images(image))

    def _numbered(self, number: int, pair: Any, shared: Mapping[str, Any]) -> Asking:
        try:
            image, question, own = unpack(pair)
            options = AskOptions.of(own, shared)
            return Asking(self.engine, Request(question, tuple(opened_images(image, options.fetch)), options))
        except UserError as error:
            raise UserError(f"question {number}: {error}") from error


class RemoteChat:
    """A conversation with a model at an address: each question is sent with all that was said, as it was sent.

    A question that is abandoned leaves the conversation as it was.
    """

    def __init__(self, engine: OpenAIEngine, images: list[Image.Image]):
        self._engine, self._new_images = engine, images
        self._before: Asking | None = None
        self.transcript: list[Turn] = []

    def ask(self, question: str, image: Any = None, **options: Any) -> Answer:
        """See `Chat.ask`."""
        return last_answer(self.stream(question, image, **options))

    def stream(self, question: str, image: Any = None, **options: Any) -> Iterator[Event]:
        """See `Chat.stream`."""
        checked = AskOptions.of(options)
        images = [*self._new_images, *opened_images(image, checked.fetch)]
        return self._run(Asking(self._engine, Request(question, tuple(images), checked), before=self._before))

    def _run(self, asking: Asking) -> Iterator[Event]:
        for event in asking.events():
            if isinstance(event, Finished):
                self._before, self._new_images = asking, []
                self.transcript = list(event.answer.transcript)
            yield event
