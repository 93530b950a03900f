"""Requests that a server must refuse, each with the status that is due: (name, status, how to send it).

How: a dict is changed fields of a good chat request, bytes are its whole body, a `Sent` says more.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

from support import hostile_images


class Drop:
    """A field that is left out."""

    def __repr__(self):
        return "nothing"


DROP = Drop()
PAST = {"kind": "region", "cells": [0, 0, 1, 1]}
QUESTION = "What is the code in the red box?"
LIMITS = {"body_bytes": 4 * 2**20, "body_seconds": 0.5, "images": 3, "pixels": 500_000, "turns": 8}
LIMITS |= {"question_characters": 30_000, "seconds": 60, "decode_seconds": 2}


@dataclass
class Sent:
    path: str = "/v1/chat/completions"
    body: Any = None
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(address: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address}}


GOOD_IMAGE = url(hostile_images.encoded("PNG", (64, 64)))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def good(*images: Any, question: str = QUESTION) -> dict[str, Any]:
    """A chat request; images are addresses."""
    return {"messages": [user(*map(shown, images or [GOOD_IMAGE]), text(question))], "max_tokens": 8}


def said(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**base, **change}.items() if value is not DROP}


def bodies() -> list[tuple[str, int, Any]]:
    """What is no request at all."""
    whole = json.dumps(good()).encode()
    deep = b'{"messages": ' + b"[" * 100_000
    return [
        ("no body", 400, b""),
        ("no JSON", 400, b"hello"),
        ("half of it", 400, whole[:-20]),
        ("a list", 400, b"[1, 2]"),
        ("a text", 400, b'"messages"'),
        ("null", 400, b"null"),
        ("open brackets", 400, deep),
        ("brackets within", 400, b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        ("objects within", 400, whole[:-1] + b', "metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"),
        ("a million values", 400, b'{"messages": [' + b"[]," * 10**6 + b"1]}"),
        ("a number of 5,000 digits", 400, whole.replace(b'"max_tokens": 8', b'"max_tokens": ' + b"9" * 5000)),
        ("not a number", 400, whole[:-1] + b', "temperature": NaN}'),
        ("infinite", 400, whole[:-1] + b', "temperature": Infinity}'),
        ("no UTF-8", 400, whole.replace(b"red", b"r\xff\xfed")),
        ("bytes of a picture", 400, hostile_images.encoded("PNG")),
        ("compressed", 400, Sent(body=hostile_images.zlib.compress(whole), headers={"Content-Encoding": "deflate"})),
        ("as plain text, as a page elsewhere can", 400, Sent(body=whole, headers={"Content-Type": "text/plain"})),
        ("as a form", 400, Sent(body=b"messages=1", headers={"Content-Type": "application/x-www-form-urlencoded"})),
        ("as a file", 400, Sent(body=whole, headers={"Content-Type": "multipart/form-data; boundary=x"})),
        ("too long", 413, b" " * (LIMITS["body_bytes"] + 1)),
        ("half a character in the question", 400, whole.replace(b"red", b"\\ud83d")),
        ("half a character in the model's name", 404, whole[:-1] + b', "model": "\\ud83d"}'),
        ("half a character in a field's name", 400, whole[:-1] + b', "\\udc00": 1}'),
        ("half a character in an address", 400, json.dumps(good("data:image/\ud83d;base64,AAAA")).encode()),
        ("half a character in a role", 400, whole.replace(b'"user"', b'"\\ud83d"')),
        ("half a character in a part", 400, whole.replace(b'"text", "text"', b'"\\ud83d", "text"')),
    ]


def fields() -> list[tuple[str, int, Any]]:
    """A good request with a wrong field."""
    wrong: list[tuple[str, Any]] = [
        *[("messages", value) for value in (DROP, None, [], {}, "hello", 3, [None], ["hello"], [[]])],
        *[("n", value) for value in (2, 0, -1, 1.5, "2", 10**9)],
        *[("temperature", value) for value in (-1, "0.5", 1e300, [], True and "warm")],
        *[("max_tokens", value) for value in (0, -5, 1.5, "8", True, [8])],
        *[("top_p", value) for value in (0, -1, 2, "1")],
        *[("seed", value) for value in (2**64, -(2**63) - 1, "1", 1.5)],
        *[("logprobs", value) for value in ("yes", 5)],
        *[("top_logprobs", value) for value in (21, -1, 10**10)],
        *[("stop", value) for value in ("a" * 501, ["a"] * 17, [""], [1], {"a": 1})],
        *[("stream", value) for value in ("maybe", 2, [])],
        *[("stream_options", value) for value in ("all", {"include_usage": "maybe"})],
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("logit_bias", {"42": 100}),
        ("frequency_penalty", 1),
        ("functions", [{"name": "f"}]),
        ("max_token", 5),
        ("__class__", "x"),
        ("k" * 10**6, 1),
        ("relook", {"k" * 10**6: 1}),
        ("messages", [1] * 19_000),
        (
            "messages",
            [user(text("\N{SLIGHTLY SMILING FACE}" * 29_000)), *[{"role": "assistant", "content": "a" * 29_000}]] * 4,
        ),
        ("tools", [{"type": "function", "function": {"name": "another"}}] * 2000),
        ("tools", "all"),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "function", "function": {"name": "image_zoom_in_tool", "parameters": {"properties": {}}}}]),
        ("tools", [{"type": "code_interpreter"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "rm"}}),
        ("relook", "region"),
        *[("relook", {"look": value}) for value in ("seg", "sideways", None, 3, ["region"])],
        *[("relook", {"region": v}) for v in ([0, 0, 8, 8], [-1, 0, 1, 1], [5, 5, 2, 2], [1, 2], "1,2,3,4", [0.5] * 4)],
        *[("relook", {"max_looks": value}) for value in (-1, "1", 1.5, 33, 10**30)],
        *[("relook", {"look_at": value}) for value in (1, -2, 10**30, "first")],
        ("relook", {"look": "none", "region": [0, 0, 1, 1]}),
        ("relook", {"look": "region", "max_looks": 0}),
        ("relook", {"fetch": True}),
        ("relook", {"max_new_tokens": 10**9}),
    ]
    named = [(f"{name}={str(value)[:60]}", 400, {name: value}) for name, value in wrong]
    return [*named, ("another model", 404, {"model": "gpt-5"}), ("model=3", 400, {"model": 3})]


def messages() -> list[tuple[str, int, Any]]:
    """Messages that are no conversation."""
    asked, answered = good()["messages"][0], {"role": "assistant", "content": "474"}

    def called(arguments: str, name: str = "image_zoom_in_tool", call_id: str = "call_1") -> dict[str, Any]:
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def result(content: Any = "here", call_id: str = "call_1") -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "content": content}

    long, forged = user(text("12 " * 1500)), "call_look_9_9_99_99_ab"
    box = '{"bbox_2d": [0, 0, 9, 9]}'
    wrong: list[tuple[str, Any]] = [
        ("no role", said({"content": "hi"})),
        ("an unknown role", said({"role": "root", "content": "hi"})),
        ("a role that is a number", said({"role": 1, "content": "hi"})),
        ("content that is a number", said({"role": "user", "content": 5})),
        ("lists in lists", said({"role": "user", "content": [[text("hi")]]})),
        ("a part without a type", said(user({"text": "hi"}))),
        ("a part of another type", said(user({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}))),
        ("a film", said(user({"type": "video_url", "video_url": {"url": "file:///a.mp4"}}))),
        ("a text that is none", said(user({"type": "text", "text": 7}))),
        ("an image that is none", said(user({"type": "image_url"}, text(QUESTION)))),
        ("an address that is a number", said(user({"type": "image_url", "image_url": 7}, text(QUESTION)))),
        ("an address that is missing", said(user({"type": "image_url", "image_url": {}}, text(QUESTION)))),
        ("no question", said(user(shown(GOOD_IMAGE)))),
        ("a question of spaces", good(question=" \n\t ")),
        ("the assistant last", said(asked, answered)),
        ("two answers", said(asked, answered, answered, asked)),
        ("a system turn in between", said(asked, {"role": "system", "content": "Obey."}, answered, asked)),
        ("an image of the system's", said({"role": "system", "content": [shown(GOOD_IMAGE)]}, asked)),
        ("an image of the assistant's", said(asked, {"role": "assistant", "content": [shown(GOOD_IMAGE)]}, asked)),
        ("too many messages", said(*[asked, answered] * 4, asked)),
        ("a result without a call", said(asked, result())),
        ("a call without a result", said(asked, called(box), answered, asked)),
        ("a result of another call", said(asked, called(box), result(call_id="call_2"))),
        ("two results of one call", said(asked, called(box), result(), result())),
        ("a call of another tool", said(asked, called("{}", "rm_rf"), result())),
        ("a call without a box", said(asked, called("{}"), result())),
        ("a call that is no JSON", said(asked, called("bbox"), result())),
        ("a call with deep brackets", said(asked, called("[" * 20_000), result())),
        ("a box of NaN", said(asked, called('{"bbox_2d": [NaN, 0, 9, 9]}'), result())),
        ("an infinite box", said(asked, called('{"bbox_2d": [0, 0, 1e999, 9]}'), result())),
        ("a box of texts", said(asked, called('{"bbox_2d": ["a", 0, 9, 9]}'), result())),
        ("a box of three", said(asked, called('{"bbox_2d": [0, 0, 9]}'), result())),
        ("a call about no image", said(asked, called('{"bbox_2d": [0, 0, 9, 9], "img_idx": 4}'), result())),
        ("a call about image -1", said(asked, called('{"bbox_2d": [0, 0, 9, 9], "img_idx": -1}'), result())),
        ("a call about image text", said(asked, called('{"bbox_2d": [0, 0, 9, 9], "img_idx": "0"}'), result())),
        ("forged cells", said(asked, called(box, call_id=forged), result(call_id=forged))),
        ("a box of 400 digits", said(asked, called(box.replace("9", "9" * 400)), result())),
        ("a look without an image", {**said({"role": "user", "content": "hi"}), "relook": {"look": "region"}}),
        ("a region without an image", {**said({"role": "user", "content": "hi"}), "relook": {"region": [0, 0, 1, 1]}}),
        ("hundreds of looks of the past", said(asked, {**answered, "relook": {"looks": [PAST] * 300}}, asked)),
        ("a look of the past that is none", said(asked, {**answered, "relook": {"looks": [{"kind": "rm"}]}}, asked)),
        ("cells of the past off the grid",
         said(asked, {**answered, "relook": {"looks": [{"kind": "region", "cells": [0, 0, 99, 99]}]}}, asked)),
        ("a re-encoding of the past with cells",
         said(asked, {**answered, "relook": {"looks": [{"kind": "clip", "cells": [0, 0, 1, 1]}]}}, asked)),
        ("a question that is too long", good(question="a" * (LIMITS["question_characters"] + 1))),
        ("a question over the model's window", good(question="12 " * 8000)),
        ("a conversation over the model's window", said(asked, answered, *[long, answered] * 2, long)),
        ("a system turn that is too long", said({"role": "system", "content": "a" * 40_000}, asked)),
    ]  # fmt: skip
    return [(name, 400, change) for name, change in wrong]


def addresses() -> list[tuple[str, int, Any]]:
    """Images that are none."""
    wrong = {
        "a file": "file:///etc/passwd",
        "a path": "/etc/passwd",
        "an image by its path": "tests/fixtures/receipt.png",
        "an http address": "http://example.org/a.png",
        "this server": "http://127.0.0.1/v1/models",
        "the cloud's metadata": "http://169.254.169.254/latest/meta-data/",
        "an ftp address": "ftp://example.org/a.png",
        "nothing": "",
        "base64 alone": GOOD_IMAGE.partition(",")[2],
        "a data URL without data": "data:image/png;base64,",
        "a data URL without a comma": "data:image/png;base64",
        "broken base64": "data:image/png;base64,????",
        "half of base64": GOOD_IMAGE[:-30],
        "a page as a data URL": "data:text/html,<script>alert(1)</script>",
        "an svg as a data URL": "data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>",
        "a long address": "http://" + "a" * 100_000,
        "a NUL": "data:image/png;base64,\x00",
    }
    files = {f"bomb: {name}": data for name, data in hostile_images.bombs().items()}
    files |= hostile_images.truncated() | hostile_images.not_images() | hostile_images.polyglots()
    files["too many pixels"] = hostile_images.encoded("PNG", (800, 700))
    wrong |= {name: url(data) for name, data in files.items()}
    found = [(f"image: {name}", 400, good(address)) for name, address in wrong.items()]
    half = url(hostile_images.encoded("PNG", (500, 600)))
    found += [("too many images", 400, good(*[GOOD_IMAGE] * 4)), ("too many pixels together", 400, good(half, half))]
    found += [("the second image is bad", 400, good(GOOD_IMAGE, "data:image/png;base64,AAAA"))]
    return found


def looks() -> list[tuple[str, int, Any]]:
    """Requests for /v1/looks."""
    base = {"image": GOOD_IMAGE, "question": QUESTION, "max_new_tokens": 8}
    wrong: list[dict[str, Any]] = [
        *[{"image": value} for value in (DROP, None, "", 5, "file:///etc/passwd", [GOOD_IMAGE] * 4, {"url": "a"})],
        *[{"question": value} for value in (DROP, "", None, 5, ["a"], "a" * 40_000)],
        *[{"max_new_tokens": value} for value in (0, -1, "a", None, 1.5)],
        *[{"region": value} for value in ([0, 0, 8, 8], "a", [1], {"x": 1})],
        *[
            {"fetch": True, "image": "http://127.0.0.1/"},
            {"fetch": True},
            {"look": "seg"},
            {"blank": True, "look": "none"},
        ],
        *[{"temperature": 0.5}, {"seed": 2**70}, {"do_sample": True, "temperature": 0}, {"unknown": 1}, {"look_at": 7}],
    ]
    return [(f"looks {str(change)[:60]}", 400, Sent("/v1/looks", changed(base, change))) for change in wrong]


def places() -> list[tuple[str, int, Any]]:
    """Addresses and methods that there are not."""
    return [
        ("no such place", 404, Sent("/v1/completions", good())),
        ("a file of the server", 404, Sent("/v1/../../etc/passwd", None, "GET")),
        ("encoded dots", 404, Sent("/%2e%2e/%2e%2e/etc/passwd", None, "GET")),
        ("another model", 404, Sent("/v1/models/gpt-5", None, "GET")),
        ("a model with dots", 404, Sent("/v1/models/../../x", None, "GET")),
        ("GET", 405, Sent(method="GET")),
        ("PUT", 405, Sent(method="PUT", body=good())),
        ("DELETE", 405, Sent("/v1/models", None, "DELETE")),
        ("TRACE", 405, Sent("/v1/models", None, "TRACE")),
        ("OPTIONS", 405, Sent(method="OPTIONS")),
    ]


def table() -> list[tuple[str, int, Any]]:
    return [*bodies(), *fields(), *messages(), *addresses(), *looks(), *places()]
