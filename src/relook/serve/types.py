"""The bodies of requests, in OpenAI's shapes.

Fields that relook does not have fall into two classes: those that leave the answer as it is are taken and not used,
those that would change it are refused, unless their value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from relook.errors import UserError
from relook.io import nearest
from relook.options import AskOptions

# The answer is the same with and without them.
HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prompt_cache_options", "extra_headers", "timeout"),
}
# Values of fields that are not offered which ask for nothing; null asks for nothing either.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
}


def _whole(value: Any) -> Any:
    """Whole floats as ints: some clients have one type of numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _limit(value: Any) -> Any:
    """None for -1, by which clients say "no limit"."""
    return None if _whole(value) == -1 else _whole(value)


def _top_k(value: Any) -> Any:
    """None for 0 and -1, by which clients say "off"."""
    return None if _whole(value) == 0 and value is not False else _limit(value)


def _seed(value: Any) -> Any:
    """Any integer of 64 bits, as OpenAI has it."""
    value = _whole(value)
    return value % 2**64 if isinstance(value, int) and -(2**63) <= value < 0 else value


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[Positive | None, BeforeValidator(_limit)]


class Lenient(BaseModel):
    """Part of a request that may have fields besides."""

    model_config = ConfigDict(strict=True, extra="ignore", use_attribute_docstrings=True)


class ImageUrl(Lenient):
    url: str
    """A data URL; an address where the server fetches from its host."""
    detail: str | None = None


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class ImagePart(Lenient):
    type: Literal["image_url"]
    image_url: ImageUrl | str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Function(Lenient):
    name: str
    arguments: str = "{}"


class ToolCall(Lenient):
    id: str
    type: Literal["function"] = "function"
    function: Function


class PastLook(Lenient):
    """A look of an earlier answer, as that answer's `relook.looks` had it."""

    kind: str
    cells: list[int] | None = None
    turn: int | None = None
    problem: str | None = None


class PastLooks(Lenient):
    looks: list[PastLook] = []
    look: Literal["auto", "none", "region", "clip", "detection", "seg"] | None = None
    """What the question before it was asked with."""
    look_at: int | None = None
    """The number of the image that they went to, where the request named one."""


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    relook: PastLooks | None = None
    """Of an assistant's message: its looks, which then stay part of the conversation."""


class ToolFunction(Lenient):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Lenient):
    type: Literal["function"] = "function"
    function: ToolFunction


class StreamOptions(Lenient):
    include_usage: bool = False


class LookOptions(BaseModel):
    """What relook has beyond OpenAI's API; see `relook.options.AskOptions`."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    look: str = "auto"
    region: list[int] | None = None
    box: list[float] | None = None
    """In place of `region`: x1, y1, x2, y2 in pixels of the upright image, x2 and y2 exclusive."""
    max_looks: int | None = None
    look_at: int | None = None
    boxes: Literal["pixels", "0-1000", "0-1"] | None = None
    """How `image_zoom_in_tool` counts `bbox_2d`, where its description does not say."""


class ChatRequest(BaseModel):
    """A request for `/v1/chat/completions`."""

    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    max_completion_tokens: Count = None
    temperature: float | None = Field(None, ge=0, le=100)
    """0, or nothing: the most probable token."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[Positive | None, BeforeValidator(_top_k)] = None
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**64)] | None, BeforeValidator(_seed)] = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    relook: LookOptions | None = None

    def check_others(self) -> None:
        """Refuse a field that is not offered and asks for something."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS or any(value == each for each in NEUTRAL.get(name, ())):
                continue
            if name not in NEUTRAL:
                name = name[:80]
                raise BadField(name, f"unknown field {name!r}; {nearest(name, type(self).model_fields)}")
            raise BadField(name, f"{name}={str(value)[:60]} is not offered; leave {name} out")


class LooksRequest(AskOptions):
    """A request for `/v1/looks`: a question about an image or several, with the options of `ask`."""

    image: str | Annotated[list[str], Field(min_length=1)]
    """A data URL, or several; addresses where the server fetches from their host."""
    question: str
    model: str | None = None

    @model_validator(mode="after")
    def _no_fetch(self) -> LooksRequest:
        if self.fetch:
            raise ValueError("which addresses are fetched is for the server's owner to say; leave fetch out")
        return self


class ErrorText(BaseModel):
    message: str
    type: str
    code: str | None
    param: str | None


class Problem(BaseModel):
    """How an error is written, whatever its status."""

    error: ErrorText


class BadField(UserError):
    """A field of a request that is wrong, with its name."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param
