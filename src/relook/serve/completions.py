"""Answers in OpenAI's shapes: a `chat.completion`, or its chunks as server-sent events.

Both have a top-level field `relook`: the looks with their pictures, what the answer cost, and warnings.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from relook.regions import Cells
from relook.render import heat_map
from relook.serve.messages import SHOWN
from relook.serve.tools import ZoomTool
from relook.serve.types import ChatRequest
from relook.trace import Answer, Event, Finished, Look, LookTaken, TextDelta, Token

if TYPE_CHECKING:
    from PIL import Image


class Reply:
    """The answer to one chat request, whole or in chunks.

    Args:
        body: the request.
        model: the model's name in the API.
        tool: the client's, which takes region looks.
        target: number of the user's image that looks go to.
        crops_in_text: put crops into the text.
        warnings: about the request.
    """

    def __init__(
        self,
        body: ChatRequest,
        model: str,
        tool: ZoomTool | None = None,
        target: int = 0,
        crops_in_text: bool = False,
        warnings: Sequence[str] = (),
    ):
        self.body, self.tool, self.target = body, tool, target
        self.crops_in_text, self.warnings = crops_in_text, list(warnings)
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The `chat.completion`."""
        calls = self._tool_calls(answer)
        text = "".join(self._in_text(look) for look in answer.looks) + answer.text
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        message |= {"tool_calls": calls} if calls else {}
        choice = {
            "index": 0,
            "message": {**message, "relook": self._kept(answer)},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": _finish(answer, calls),
        }
        shown = self._relook(answer)
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer), "relook": shown}

    def chunks(self, event: Event) -> Iterator[str]:
        """The chunks of an event, as JSON."""
        match event:
            case TextDelta():
                yield self._chunk({"content": event.text}, logprobs=self._logprobs(event.tokens))
            case LookTaken():
                yield self._chunk({}, relook={"look": shown_look(event.look)})
                if text := self._in_text(event.look):
                    yield self._chunk({"content": text})
            case Finished():
                answer = event.answer
                calls = self._tool_calls(answer)
                if calls:
                    yield self._chunk({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
                kept = {"relook": self._kept(answer)}
                yield self._chunk(kept, finish_reason=_finish(answer, calls), relook=self._relook(answer))
                if self.body.stream_options and self.body.stream_options.include_usage:
                    yield self._json(choices=[], usage=_usage(answer))
                yield "[DONE]"

    def begin(self) -> str:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        relook: dict[str, Any] | None = None,
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._json(choices=[choice], **({} if relook is None else {"relook": relook}))

    def _json(self, **fields: Any) -> str:
        return json.dumps({**self.head, "object": "chat.completion.chunk", **fields})

    def _tool_calls(self, answer: Answer) -> list[dict[str, Any]]:
        """The region looks that the client has to take."""
        if self.tool is None or answer.finish != "look" or answer.image is None:
            return []
        asked = [look for look in answer.looks if look.image is None and look.problem is None]
        calls = [
            self.tool.call(look.cells, look.box, self.target, answer.image.size)
            for look in asked
            if look.cells and look.box
        ]
        return calls[:1] if self.body.parallel_tool_calls is False else calls

    def _in_text(self, look: Look) -> str:
        if not self.crops_in_text or look.kind != "region" or look.image is None:
            return ""
        return SHOWN.format(png_url(look.image))

    def _kept(self, answer: Answer) -> dict[str, Any]:
        """What a client has to send back in its message, so that the looks stay part of the conversation."""
        asked = self.body.relook.look if self.body.relook else "auto"
        taken = [
            {"kind": look.kind, "cells": _list(look.cells), "turn": look.turn}
            for look in answer.looks
            if look.problem is None and look.image is not None  # one that was taken here
        ]
        at = None if self.body.relook is None else self.body.relook.look_at
        return {"looks": taken, "look": asked, **({} if at is None else {"look_at": at})}

    def _relook(self, answer: Answer) -> dict[str, Any]:
        image = None if answer.image is None else {"width": answer.image.width, "height": answer.image.height}
        return {
            "looks": [shown_look(look) for look in answer.looks],
            "image": image,
            "grid": answer.grid,
            "warnings": [*answer.warnings, *self.warnings],
            "usage": answer.usage.to_dict(),
            "transcript": [turn.to_dict() for turn in answer.transcript],
        }

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = [
            {**_token(token.text, token.logprob), "top_logprobs": [_token(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def shown_look(look: Look) -> dict[str, Any]:
    """A look for a client: the crop, or the map over what was encoded again, as data URLs."""
    shown = look.to_dict()
    del shown["image"]
    crop = png_url(look.image) if look.kind == "region" and look.image is not None else None
    mapped = None if look.attention is None or look.image is None else png_url(heat_map(look, look.image.size))
    return {**shown, "crop": crop, "map": mapped}


def png_url(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _list(cells: Cells | None) -> list[int] | None:
    return None if cells is None else [int(value) for value in cells]


def _finish(answer: Answer, calls: Sequence[Any]) -> str:
    return "tool_calls" if calls else "length" if answer.finish == "length" else "stop"


def _usage(answer: Answer) -> dict[str, Any]:
    """OpenAI's `usage`: the conversation's tokens, crops and re-encodings included, of which some were written now."""
    usage = answer.usage
    return {
        "prompt_tokens": usage.sequence_length - usage.generated_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.sequence_length,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
