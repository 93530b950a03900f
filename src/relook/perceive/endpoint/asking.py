"""One request to a model behind an endpoint: its conversation as messages, turn by turn, and the looks in between."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from relook.errors import RelookError, UserError
from relook.interventions import Intervention
from relook.looks import IM_END, LOOKS, with_trigger
from relook.options import AUTO, NONE
from relook.regions import Cells, Frame, check_cells
from relook.trace import Answer, Event, Finished, Look, LookTaken, TextDelta, Turn, Usage
from relook.views import open_image

from ..engine import Cancelled, GivenLook, Past, Request
from ..text import PieceStreamer
from ..vlm import checked_question
from .dialects import DIALECTS, NOT_HERE, Called, ControlTokens, Reply, ZoomCalls

_STRUCTURE = re.compile(r"<\|[^<>|\s]*\|>|</?tool_(call|response)>")  # servers read these as structure anywhere
NO_MORE = "no look was left when the model called it"


class Asking:
    """A request at work, as `row.Row` is one in this process.

    Args:
        engine: an `OpenAIEngine`.
        request: see there.
        before: the question before it in a conversation, answered.

    Raises:
        UserError: what `VLM.ask` refuses, and what an endpoint does not offer.
    """

    def __init__(self, engine: Any, request: Request, before: Asking | None = None):
        self.engine, self.processor, self.options = engine, engine.processor, request.options
        if self.options.max_looks is None:
            self.options = self.options.model_copy(update={"max_looks": self.processor.max_looks})
        self.request = replace(request, question=checked_question(request.question))
        self.own = self._own_options()
        self.spelling: ControlTokens | ZoomCalls = (
            ControlTokens(self.processor)
            if engine.dialect == "tokens"
            else ZoomCalls(DIALECTS[engine.dialect], engine.grid, self.own)
        )
        self.messages: list[dict[str, Any]] = list(before.messages) if before else []
        self.sampled: set[int] = set(before.sampled) if before else set()  # numbers of messages that the model wrote
        self.images: list[Image.Image] = list(before.images) if before else []  # of the user's, originals
        self.sent: list[tuple[int, int]] = list(before.sent) if before else []  # their sizes as sent
        self.target: int = before.target if before else 0
        self._frame = Frame.of(self.processor, (1, 1))  # of the next region call; no image yet
        self.looks: list[Look] = []
        self.usage = Usage()
        self.text = ""  # of the latest turn
        self._turns_before = 0  # of looks, before the server's reply
        self._stream: Any = None
        self._stopped = False
        self._left = 0 if self.options.look == NONE else self.options.max_looks or 0
        self._check()
        self._begin()

    def stop(self) -> None:
        """End the work, from any thread; the server sees the connection close."""
        self._stopped = True
        if self._stream is not None:
            self._stream.close()

    # -- what is refused ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        options, engine, request = self.options, self.engine, self.request
        request.check(self.images)
        look = options.first_look
        if look not in (AUTO, NONE, *engine.looks):
            if look in LOOKS and LOOKS[look].reencodes:
                raise UserError(f"look={look!r}: {NOT_HERE.format(look)}")
            raise UserError(f"no {look!r} look here; expected one of {', '.join([AUTO, NONE, *engine.looks])}")
        if options.region is not None:
            check_cells(options.region, engine.grid)
        here = {"condition=False": not options.condition}
        here["constrain=False"] = not options.constrain and engine.dialect == "relook"
        here["logprobs"] = request.logprobs is not None
        for name in (name for name, given in here.items() if given):
            raise UserError(f"{name} is for a model in this process, not for one at an address; leave it out")
        if (change := options.change) is not None and change.name not in engine.interventions:
            raise UserError(
                f"intervention {change.name!r} is for a model in this process or behind a plain endpoint: relook's own "
                "server sees to views and history by itself; leave it out"
            )
        options.check_left_out(engine.looks)
        texts = [request.system or "", request.question, *(t for p in request.past for t in (p.question, p.answer))]
        found = next(filter(None, map(_STRUCTURE.search, texts)), None)
        if found is not None and engine.dialect != "relook":
            raise UserError(
                f"{found.group()} in a text is structure to the server of {engine.name}; write it otherwise"
            )
        if not (request.images or self.images or any(past.images for past in request.past)):
            raise UserError("no image was given; give a path, a PIL image, an array, bytes, or a list of these")

    def _own_options(self) -> dict[str, Any] | None:
        """Options that relook's server takes."""
        if self.engine.dialect != "relook":
            return None
        names = ("look", "region", "box", "max_looks", "look_at")
        asked = {name: getattr(self.request.options, name) for name in names}
        return {name: value for name, value in asked.items() if value is not None}

    # -- the conversation --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The messages up to the assistant's next turn."""
        request = self.request
        if not self.messages and (system := self.spelling.system(request.system)):
            self.messages.append({"role": "system", "content": system})
        for past in request.past:
            self._ask(past, past.asked)
            self._aim(past.look_at)
            more = self._given(past)
            self.messages.append({"role": "assistant", "content": past.answer, **more})
        now = Past(request.question, request.images, looks=request.looks, look_at=self.options.look_at)
        self._ask(now, self.options.first_look if self._left else NONE)
        self._aim(now.look_at)
        self.calls = self.options.calls(self._frame, self._left)[len(request.looks) :]
        if self._given(now).get("relook", {}).get("looks"):
            raise UserError("the last of the looks given is the server's own; give the answer that followed it")
        self._left = max(0, self._left - len(request.looks))

    def _ask(self, past: Past, kind: str) -> None:
        """A question of the user's, with the sentence that asks for a look where the model was trained with it."""
        looks = [] if self.processor.free_choice else self.processor.looks
        question = with_trigger(past.question, kind, looks) if self.engine.dialect == "tokens" else past.question
        if past.images:
            self.target = len(self.images)
        shown = [self.processor.view(image, "first") for image in past.images]
        self.images += past.images
        self.sent += [image.size for image in shown]
        self.messages.append(self.spelling.question(question, shown))

    def _aim(self, at: int | None) -> None:
        """Settle which image looks go to, a question's; the next region is one of all of it."""
        if at is not None:
            if not -len(self.images) <= at < len(self.images):
                raise UserError(f"look_at={at} names no image; the conversation has {len(self.images)}, counted from 0")
            self.target = at % len(self.images)
        if self.images:
            self._frame = Frame.of(self.processor, self.images[self.target].size)

    def _cells_of(self, turn: Sequence[GivenLook]) -> list[Cells | None]:
        return [self._frame.cells(look.box) if look.box is not None else look.cells for look in turn]

    def _given(self, past: Past) -> dict[str, Any]:
        """Send the turns of looks that were taken before; what a message after them has to say of others.

        Turns with re-encodings are relook's server's to take again, as they were then.
        """
        own, kept = self.engine.dialect == "relook", list[dict[str, Any]]()
        about = {"look": past.asked, "look_at": past.look_at}
        for number, turn in enumerate(past.looks):
            cells, other = self._cells_of(turn), [look.kind for look in turn if LOOKS[look.kind].reencodes]
            if other and not own:
                raise UserError(f"an earlier turn has a {other[0]} look: {NOT_HERE.format(other[0])}")
            if other:
                self._frame = self._frame.after([self._frame.shown(each) for each in cells if each])
                for look, its in zip(turn, cells, strict=True):
                    kept.append({"kind": look.kind, "cells": its and list(its), "turn": number})
                continue
            called = [self._called(each) for each in cells if each]
            message = self.spelling.call(called, self.images[self.target].size, self.sent[self.target])
            self.messages.append({**message, "relook": {"looks": kept, **about}} if own else message)
            given = not own or any(look.image for look in turn)  # relook's server makes crops that are not sent
            pairs = zip(turn, called, strict=True)
            self._show(called, [look.image or self._crop(each) for look, each in pairs if given])
            kept = []
        return {"relook": {"looks": kept, **about}} if own else {}

    def _called(self, cells: Cells) -> Called:
        return Called("region", cells, self._frame.shown(cells))

    def _crop(self, called: Called, change: Intervention | None = None) -> Image.Image:
        whole, box = self.images[self.target], called.box
        return whole.crop(box) if change is None or box is None else change.crop(whole, box, self.processor)

    def _show(self, called: Sequence[Called], crops: Sequence[Image.Image]) -> list[Image.Image]:
        """Send what was called, as the model's view of a crop is; returns that."""
        self._frame = self._frame.after([each.box for each in called if each.box is not None and each.problem is None])
        shown = [self.processor.view(crop, "crop") for crop in crops]
        self.messages += self.spelling.results(called, shown)
        return shown

    def _show_instead(self, called: Sequence[Called], good: Sequence[Called], change: Intervention) -> Sequence[Any]:
        """The same under an intervention; returns what was shown of each good call, None where nothing was."""
        for each in good:
            each.box = each.box and change.region(each.box, self._frame.box, self._frame.grid)
        if not change.row.image and good:
            self._frame = self._frame.after([each.box for each in good if each.box])
            self.messages += self.spelling.results(called, [], untold=True)
            return [None] * len(good)
        answered = len(self.messages)
        shown = self._show(called, [self._crop(each, change) for each in good])
        if not change.row.text and good:
            self.sampled.discard(answered - 1)
            pictures = [message for message in self.messages[answered:] if message["role"] == "user"]
            self.messages[answered - 1 :] = [{"role": "assistant", "content": ""}, *pictures]
        return shown

    # -- turns -------------------------------------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """Ask, look and ask again until the model answers. Leaving off closes the connection."""
        begun = time.perf_counter()
        own = self.engine.dialect == "relook"
        forced = self.options.first_look == "region" and not self.request.looks and not own
        finish: str | None = None
        while self.calls and finish is None and not own:
            called = [self._called(self.calls.pop(0))]
            self.messages.append(self.spelling.call(called, self.images[self.target].size, self.sent[self.target]))
            finish = yield from self._take(called)
            forced = False
        while finish is None:
            reply = Reply()
            yield from self._turn(reply, forced)
            forced = False
            self.sampled.add(len(self.messages))
            called = self.spelling.read(reply, self.images[self.target].size, self.sent[self.target])
            for each in called:
                each.box = each.box or (self._frame.shown(each.cells) if each.cells else None)
            if called:
                self.messages.append(self.spelling.said(reply))
                finish = yield from self._take(called)
            else:
                self.messages.append({"role": "assistant", "content": reply.text, **reply.kept})
                finish = "length" if reply.finish == "length" else "stop"
        self.usage.seconds = {"request": time.perf_counter() - begun}
        answer = self._answer(finish)
        self.engine.count(answer)
        yield Finished(answer)

    def _take(self, called: list[Called]) -> Generator[Event, None, str | None]:
        """Take the looks that the model called; returns "look" where whoever asked takes them."""
        for each in called if self._left <= 0 else ():
            each.problem = each.problem or NO_MORE
        good = [each for each in called if each.problem is None]
        held, frame, change = self.request.hold_regions and bool(good), self._frame.box, self.options.change
        shown: Sequence[Any] = []
        if not held and change is not None:
            shown = self._show_instead(called, good, change)
        elif not held:
            shown = self._show(called, [self._crop(each) for each in good])
        images, turn = iter(shown), self._next_turn
        for each in called:
            image = next(images) if each.problem is None and not held else None
            seen = (each.frame or frame) if each.cells else None
            self.looks.append(Look(each.kind, each.cells, each.box, image, None, each.problem, seen, turn))
            yield LookTaken(self.looks[-1])
        if held:
            return "look"
        if not good and self._left > 0:  # nothing to show: the question again, to be answered without a look
            self.messages.append(self.spelling.question(with_trigger(self.request.question, NONE, ()), []))
        elif not good:
            return "stop"
        self._left = self._left - 1 if good else 0
        return None

    @property
    def _next_turn(self) -> int:
        return self.looks[-1].turn + 1 if self.looks else 0

    def _turn(self, reply: Reply, forced: bool) -> Iterator[Event]:
        """One turn of the assistant, read into `reply` as it comes. `forced`: it begins with a call."""
        streamer = PieceStreamer(self.spelling.hidden, self.request.stop)
        self._turns_before = self._next_turn
        begun = LOOKS["region"].start if forced and isinstance(self.spelling, ControlTokens) else ""
        messages = [*self.messages, *([{"role": "assistant", "content": begun}] if begun else [])]
        create = self.engine.client.chat.completions.create
        try:
            with self.engine.errors(), create(**self._fields(messages, forced)) as stream:
                self._stream = stream
                reply.text = begun
                for chunk in stream:
                    if self._stopped:
                        break
                    yield from self._read(chunk, reply, streamer)
        except RelookError:
            if not self._stopped:
                raise
        if self._stopped:
            raise Cancelled("the request was cancelled")
        if reply.finish is None:
            raise RelookError(f"the reply of {self.engine.url} ended before its answer did; ask again")
        reply.text = reply.text.removesuffix(IM_END)
        if piece := streamer.finish_text():
            yield TextDelta(piece)
        self.text = streamer.text
        self._count(reply)

    def _fields(self, messages: list[dict[str, Any]], forced: bool) -> dict[str, Any]:
        """The request's fields."""
        options, fields = self.options, self.spelling.fields(self._left > 0, forced)
        fields |= {"temperature": 0} if not options.do_sample else {}
        for name in ("temperature", "top_p", "seed"):
            if (value := getattr(options, name)) is not None:
                fields[name] = value
        if options.top_k is not None:
            fields["extra_body"] = {**fields.get("extra_body", {}), "top_k": options.top_k}
        if self.request.stop:
            fields["stop"] = list(self.request.stop)
        shape = {"model": self.engine.name, "messages": messages, "max_tokens": options.max_new_tokens}
        return {**shape, "stream": True, "stream_options": {"include_usage": True}, **fields}

    def _read(self, chunk: Any, reply: Reply, streamer: PieceStreamer) -> Iterator[Event]:
        """One chunk of a reply."""
        reply.usage = chunk.usage or reply.usage
        own = (chunk.model_extra or {}).get("relook") or {}
        if "look" in own:
            yield from self._server_took(own["look"])
        elif own:
            reply.own = own
        for choice in chunk.choices[:1]:
            reply.finish = choice.finish_reason or reply.finish
            delta = choice.delta
            if kept := (delta.model_extra or {}).get("relook"):
                reply.kept = {"relook": kept}
            for part in delta.tool_calls or ():
                while len(reply.calls) <= (part.index or 0):
                    reply.calls.append({"id": "", "name": "", "arguments": ""})
                call = reply.calls[part.index or 0]
                call["id"] = part.id or call["id"]
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
            if delta.content:
                reply.text += delta.content
                if piece := streamer.add_text(delta.content):
                    yield TextDelta(piece)

    def _server_took(self, said: dict[str, Any]) -> Iterator[Event]:
        """A look that relook's server has taken by itself."""
        if said["kind"] == "region" and said["crop"] is None and said["problem"] is None:
            return  # it is left to us
        image = open_image(said["crop"]) if said["crop"] else None
        if said["problem"] is None and image is None:
            image = self.images[self.target].copy()
        cells, box, frame = (tuple(said[name]) if said.get(name) else None for name in ("cells", "box", "frame"))
        attention = None if said["attention"] is None else np.array(said["attention"], dtype=np.float32)
        turn = self._turns_before + said.get("turn", 0)
        self.looks.append(Look(said["kind"], cells, box, image, attention, said["problem"], frame, turn))
        yield LookTaken(self.looks[-1])

    def _count(self, reply: Reply) -> None:
        """Add what the server says a turn cost; what it does not say is not counted."""
        if reply.usage is None:
            return
        details = reply.usage.prompt_tokens_details
        cached = (details.cached_tokens if details else None) or 0
        usage, whole = self.usage, reply.usage.prompt_tokens + reply.usage.completion_tokens
        usage.lm_positions += whole - cached
        usage.sequence_length = whole
        usage.generated_tokens += reply.usage.completion_tokens
        usage.cached_tokens += cached
        usage.vision_patches += reply.own.get("usage", {}).get("vision_patches", 0)

    def _answer(self, finish: str) -> Answer:
        return Answer(
            text=self.text,
            looks=self.looks,
            usage=self.usage,
            transcript=[_turn_of(message, i in self.sampled) for i, message in enumerate(self.messages)],
            question=self.request.question,
            image=self.images[self.target].copy(),
            model=self.engine.name,
            warnings=self.engine.warnings,
            grid=self.engine.grid,
            finish=finish,
        )


def _turn_of(message: dict[str, Any], sampled: bool) -> Turn:
    """A message as a turn of the transcript."""
    content = message["content"] or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls", ())]
    return Turn(message["role"], "\n".join([*([text] if text else []), *calls]), sampled)
