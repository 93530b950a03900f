"""Messages in OpenAI's shape as a `Request` for an engine.

A conversation is read in two steps, since images may have to be fetched in between: `read_messages` sorts the messages
into questions with their looks and answers, `Conversation.request` makes the request from these and the opened images.

The crop that answers a tool call is accepted in the tool's message and in a user message after it (some servers and
templates take no images from tools). User images are counted without crops.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from PIL import Image

from relook.errors import UserError
from relook.looks import LOOKS
from relook.options import AskOptions
from relook.perceive.engine import STOP_LENGTH, STOPS, GivenLook, Past, Request
from relook.regions import check_cells
from relook.serve.settings import ServeSettings
from relook.serve.tools import ZOOM, ZoomTool
from relook.serve.types import BadField, ChatRequest, ImagePart, Message, PastLook, TextPart, ToolCall

COLDEST = 1e-4  # temperatures below are greedy decoding by another name
SHOWN = "![region look]({})\n\n"  # how `crops_in_text` shows a crop
_SHOWN = re.compile(re.escape(SHOWN.split("{")[0]) + r"data:image/png;base64,[A-Za-z0-9+/=]*\)\s*")


@dataclass
class Called:
    """A tool call of the history: the address of the crop that answered it, and whether anything did."""

    call: ToolCall
    crop: str | None = None
    answered: bool = False


@dataclass
class Exchange:
    """A question, the looks taken for it by turns of the assistant, and the answer (None: it is open)."""

    texts: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # addresses
    looks: list[list[Called] | list[GivenLook]] = field(default_factory=list)
    answer: str | None = None
    look: str | None = None
    look_at: int | None = None

    @property
    def calls(self) -> list[Called]:
        """Every tool call of it."""
        return [call for turn in self.looks for call in turn if isinstance(call, Called)]

    @property
    def without_crop(self) -> list[Called]:
        """Calls of the latest turn whose crop has not come."""
        turn = self.looks[-1] if self.looks else []
        return [call for call in turn if isinstance(call, Called) and call.crop is None]


@dataclass
class Conversation:
    """Messages, sorted. Images are still addresses.

    `target` is the number of the image that looks go to, once the request is made.
    """

    system: list[str] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    target: int = 0

    @property
    def addresses(self) -> list[str]:
        """Of all images, in the order in which `request` takes them."""
        return [
            address
            for each in self.exchanges
            for address in [*each.images, *(call.crop for call in each.calls if call.crop is not None)]
        ]

    def request(
        self, body: ChatRequest, images: Sequence[Image.Image], tool: ZoomTool | None, grid: int, default_tokens: int
    ) -> Request:
        """The request for an engine.

        Args:
            body: where the messages come from.
            images: opened, one for each of `addresses`.
            tool: that takes region looks.
            grid: cells per side of the engine.
            default_tokens: of an answer where the body does not say.
        """
        left, sizes, reader = iter(images), list[tuple[int, int]](), tool or ZoomTool()
        target, past, look_at = 0, list[Past](), None
        if body.relook and body.relook.look_at is not None:
            self.exchanges[-1].look_at = body.relook.look_at
        for each in self.exchanges:
            look_at = each.look_at
            shown = tuple(next(left) for _ in each.images)
            crops = {id(call): next(left) for call in each.calls if call.crop is not None}
            target = len(sizes) if shown else target
            sizes += [image.size for image in shown]
            turns: list[tuple[GivenLook, ...]] = []
            for turn in each.looks:
                given = []
                for look in turn:
                    if isinstance(look, Called):
                        image = target if look_at is None else look_at + len(sizes) * (look_at < 0)
                        cells, box, look_at = reader.region(look.call, sizes, image, grid)
                        look = GivenLook(cells, image=crops.get(id(look)), box=box)
                    given.append(look)
                turns.append(tuple(given))
            past.append(Past("\n".join(each.texts), shown, each.answer or "", tuple(turns), each.look, look_at))
            target = target if look_at is None or not sizes else look_at % len(sizes)
        now = past.pop()
        options = _options(body, tool, look_at, default_tokens)
        if options.first_look in LOOKS and not sizes:
            raise BadField("relook", f"look={options.first_look!r}, and the conversation has no image; send one")
        self.target = target if options.look_at is None else options.look_at % max(len(sizes), 1)
        return Request(
            now.question,
            now.images,
            options=options,
            past=tuple(past),
            system="\n\n".join(self.system) if self.system else None,
            stop=_stop(body),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            hold_regions=tool is not None,
            looks=now.looks,
        )


def _options(body: ChatRequest, tool: ZoomTool | None, look_at: int | None, default_tokens: int) -> AskOptions:
    """`ask`'s options. Without a temperature the answer is greedy, and what belongs to sampling says nothing."""
    own = body.relook.model_dump(exclude_unset=True, exclude={"boxes"}, exclude_none=True) if body.relook else {}
    asked = {name: own[name] for name in ("look", "region", "box") if name in own}
    if tool is not None and body.tool_choice not in (None, "auto") and not asked:
        own["look"] = "region"
    if look_at is not None:
        own.setdefault("look_at", look_at)
    temperature = body.temperature
    if temperature >= COLDEST if temperature is not None else body.top_p not in (None, 1):
        sampling = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "seed")}
        own |= {"do_sample": True, **{name: value for name, value in sampling.items() if value is not None}}
    tokens = body.max_completion_tokens or body.max_tokens or default_tokens
    return AskOptions.of({**own, "max_new_tokens": tokens})


def _stop(body: ChatRequest) -> tuple[str, ...]:
    stop = ([body.stop] if body.stop else []) if isinstance(body.stop, str) else body.stop or []
    if not all(stop) or len(stop) > STOPS or max(map(len, stop), default=0) > STOP_LENGTH:
        raise BadField("stop", f"stop is up to {STOPS} texts of 1 to {STOP_LENGTH} characters; leave the others out")
    return tuple(stop)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_messages(messages: Sequence[Message], grid: int) -> Conversation:
    """Sort messages into questions with their looks and answers.

    Raises:
        UserError: an order that is no conversation, with the number of the message.
    """
    talk = Conversation()
    readers = {"system": _system, "developer": _system, "user": _user, "assistant": _assistant, "tool": _tool}
    for number, message in enumerate(messages):
        try:
            readers[message.role](talk, message, grid)
        except UserError as error:
            raise BadField(f"messages[{number}]", f"messages[{number}]: {error}") from None
    last = talk.exchanges[-1] if talk.exchanges else None
    if last is None or last.answer is not None:
        raise BadField("messages", "the last message is no question; expected one of the user's, or a tool's result")
    _all_answered(last)
    return talk


def check(talk: Conversation, body: ChatRequest, settings: ServeSettings) -> None:
    """Refuse what exceeds the server's limits."""
    looks = sum(len(turn) for each in talk.exchanges for turn in each.looks)
    asked = (body.relook and body.relook.max_looks) or 0
    texts = ["".join(_texts(message)) for message in body.messages]
    settings.limits.check(texts, len(talk.addresses), max(looks, asked))


def _system(talk: Conversation, message: Message, grid: int) -> None:
    if talk.exchanges:
        raise UserError("a system message after the first question; put it first")
    _no_images(message)
    talk.system.append("\n".join(_texts(message)))


def _user(talk: Conversation, message: Message, grid: int) -> None:
    current, images = talk.exchanges[-1] if talk.exchanges else None, list(_images(message))
    if current is None or current.answer is not None:
        talk.exchanges.append(current := Exchange())
    elif current.looks:  # tool calls are open: this brings their crops
        waiting = current.without_crop
        if not images or len(images) > len(waiting):
            raise UserError(
                f"{len(images)} images of the user for {len(waiting)} tool calls without a crop, before the question "
                "is answered; expected these crops, or no message here"
            )
        for call, image in zip(waiting, images, strict=False):
            call.crop, call.answered = image, True
        _warn_of_text(talk, message)
        return
    current.texts += _texts(message)
    current.images += images


def _assistant(talk: Conversation, message: Message, grid: int) -> None:
    current = talk.exchanges[-1] if talk.exchanges else None
    if current is None and not message.tool_calls:
        _no_images(message)
        talk.warnings.append("what the assistant says before the first question is not shown to the model")
        return
    if current is None or current.answer is not None:
        raise UserError("an answer without a question before it; begin with the user, and take turns")
    _no_images(message)
    _all_answered(current)
    if message.relook is not None:
        current.looks += _past_looks(message.relook.looks, grid)
        current.look = current.look or message.relook.look
        current.look_at = message.relook.look_at if current.look_at is None else current.look_at
    if message.tool_calls:
        for call in message.tool_calls:
            if call.function.name != ZOOM:
                raise UserError(f"a call of {call.function.name[:60]!r}; the model calls {ZOOM} only")
        current.looks.append([Called(call) for call in message.tool_calls])
        _warn_of_text(talk, message)
        return
    current.answer = "\n".join(_texts(message))


def _tool(talk: Conversation, message: Message, grid: int) -> None:
    current, images = talk.exchanges[-1] if talk.exchanges else None, list(_images(message))
    turn = current.looks[-1] if current and current.looks and current.answer is None else []
    ids = [call for call in turn if isinstance(call, Called) and call.call.id == message.tool_call_id]
    if not ids or ids[0].answered:
        raise UserError(f"tool_call_id {str(message.tool_call_id)[:60]!r} is not that of an open call before it")
    if len(images) > 1:
        raise UserError(f"{len(images)} images for one tool call; expected its crop")
    ids[0].crop, ids[0].answered = images[0] if images else None, True
    _warn_of_text(talk, message)


def _warn_of_text(talk: Conversation, message: Message) -> None:
    """A look's turns hold the call and the crop; what a message says besides has no place in them."""
    warning = "text beside tool calls and crops is not shown to the model"
    if any(text.strip() for text in _texts(message)) and warning not in talk.warnings:
        talk.warnings.append(warning)


def _all_answered(exchange: Exchange) -> None:
    for call in exchange.calls:
        if not call.answered:
            raise UserError(f"no result of tool call {call.call.id[:60]!r} follows; send a tool message with its crop")


def _past_looks(looks: Sequence[PastLook], grid: int) -> Iterator[list[GivenLook]]:
    """Looks taken before, by turns: those that state no turn have one each."""
    taken = [(i, look) for i, look in enumerate(looks) if look.problem is None]
    for _, turn in groupby(taken, lambda pair: (pair[1].turn is None and pair[0], pair[1].turn)):
        given = []
        for _, look in turn:
            if look.kind not in LOOKS:
                raise UserError(f"relook.looks: {look.kind[:40]!r} is no look; expected one of {', '.join(LOOKS)}")
            given.append(GivenLook(None if look.cells is None else check_cells(look.cells, grid), look.kind))
        yield given


def _texts(message: Message) -> list[str]:
    """The texts of a message, an assistant's without the crops that `crops_in_text` put there."""
    if isinstance(message.content, str):
        found = [] if _is_crop(message) else [message.content]
    else:
        found = [part.text for part in message.content or [] if isinstance(part, TextPart)]
    return [_SHOWN.sub("", text) for text in found] if message.role == "assistant" else found


def _images(message: Message) -> Iterator[str]:
    if isinstance(message.content, str):
        yield from [message.content.strip()] if _is_crop(message) else []
        return
    for part in message.content or []:
        if isinstance(part, ImagePart):
            yield part.image_url if isinstance(part.image_url, str) else part.image_url.url


def _is_crop(message: Message) -> bool:
    """Whether a tool's text is an image: some frameworks have no other place for it."""
    return message.role == "tool" and str(message.content).lstrip().startswith("data:image/")


def _no_images(message: Message) -> None:
    if any(True for _ in _images(message)):
        raise UserError(f"an image in a message of the {message.role}; send it in one of the user's")
