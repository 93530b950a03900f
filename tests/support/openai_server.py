"""A server that speaks OpenAI's protocol, over a function or over transformers' own `generate` of a plain Qwen2-VL."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil


@dataclass
class Said:
    """A turn: pieces of text, tool calls (id, name, arguments), why it ends, and token counts.

    status    of an error, with `error` as its message (None: a body that is no JSON), and `headers`
    cut       end the stream before the turn's end
    gone      set where the client leaves off; such pieces may be endless
    """

    pieces: Iterable[str] = ()
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    finish: str = "stop"
    usage: dict[str, Any] | None = None
    status: int = 200
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    gone: threading.Event = field(default_factory=threading.Event)


class OpenAIServer(ThreadingHTTPServer):
    """`answer(body)` gives each turn; `bodies` are the requests, `keys` their Authorization headers."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], Said], models: list[dict]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.models = answer, models
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: OpenAIServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._json(200, {"object": "list", "data": [{"object": "model", "owned_by": "x", "created": 0, **m}
                                                    for m in self.server.models]})  # fmt: skip

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        said = self.server.answer(body)
        if said.status != 200 or said.error is not None:
            content = b"<html>" if said.error is None else json.dumps({"error": {"message": said.error}}).encode()
            return self._send(said.status, content, said.headers)
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for chunk in _chunks(said):
                self.wfile.write(f"data: {chunk}\n\n".encode())
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            said.gone.set()

    def _json(self, status, value):
        self._send(status, json.dumps(value).encode(), {})

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def _chunks(said: Said) -> Iterator[str]:
    head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}

    def chunk(delta, finish=None):
        return json.dumps({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": ""})
    for piece in said.pieces:
        yield chunk({"content": piece})
    for index, (name, function, arguments) in enumerate(said.calls):
        call = {"index": index, "id": name, "type": "function", "function": {"name": function, "arguments": ""}}
        yield chunk({"tool_calls": [call]})
        for half in (arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :]):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": half}}]})
    if said.cut:
        return
    yield chunk({}, "tool_calls" if said.calls else said.finish)
    if said.usage:
        yield json.dumps({**head, "choices": [], "usage": said.usage})
    yield "[DONE]"


@contextmanager
def openai_server(answer: Callable[[dict], Said], models: tuple | list = ({"id": "m"},)) -> Iterator[OpenAIServer]:
    """Serve while the block runs."""
    server = OpenAIServer(answer, list(models))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class PlainQwen:
    """Answers of a folder with a plain Qwen2-VL, by transformers' own classes and the folder's own chat template."""

    def __init__(self, folder: Path):
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.lock = threading.Lock()

    def inputs(self, messages: list[dict], **template: Any) -> dict[str, Any]:
        """What the model takes for a conversation."""
        pictures = [
            Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image_url"
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **template)
        encoded = dict(self.images(pictures, return_tensors="pt")) if pictures else {}
        for grid in encoded.get("image_grid_thw", []):
            text = text.replace("<|image_pad|>", "<|pad|>" * int(grid.prod() // 4), 1)
        ids = self.tokenizer(text.replace("<|pad|>", "<|image_pad|>"), return_tensors="pt").input_ids
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **encoded}

    def __call__(self, body: dict) -> Said:
        assert body["temperature"] == 0 and body["skip_special_tokens"] is False
        template = {"add_generation_prompt": True}
        if body.get("continue_final_message"):
            template = {"continue_final_message": True}
        inputs = self.inputs(body["messages"], **template)
        banned = [self.tokenizer.encode(word) for word in body["bad_words"]]
        length = inputs["input_ids"].shape[1]
        with self.lock, torch.no_grad():
            out = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=body["max_tokens"], bad_words_ids=banned or None
            )[0, length:].tolist()
        ends = self.tokenizer.eos_token_id
        finish = "stop" if out[-1] == ends else "length"
        text = self.tokenizer.decode([token for token in out if token != ends])
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        return Said(pieces, finish=finish, usage={
            "prompt_tokens": length, "completion_tokens": len(out), "total_tokens": length + len(out)})  # fmt: skip
