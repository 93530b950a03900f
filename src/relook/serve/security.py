"""Who may ask, and what leaves the server: API keys, hosts, body limit, request ids, logs.

`protect` puts an ASGI app behind these checks. Every response has an `X-Request-Id`, every request one line in the log.
What is asked and what is answered, images, keys and the messages of unexpected errors (they may quote any of these) are
not logged, and no stack trace is sent: of an unexpected error the log has its kind and the places it went through.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
from pydantic import BaseModel, ConfigDict, SecretStr

from relook.errors import UserError
from relook.perceive.engine import EngineBusy
from relook.serve.limits import Limits, Memory, hold

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

KEYS = "RELOOK_API_KEYS"  # environment variable, separated by commas
LOOPBACK = ("localhost", "127.0.0.1", "::1")
KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
log = logging.getLogger("relook.serve")
_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class SecuritySettings(BaseModel):
    """Who may ask a server."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    keys: tuple[SecretStr, ...] = ()
    """API keys, one of which a request has to carry (`Authorization: Bearer KEY`); none: everybody may ask."""
    hosts: tuple[str, ...] = ("*",)
    """Names by which the server is reached (the Host header); "*" is any. A server on loopback takes loopback's names
    only, or a web page whose own name leads to 127.0.0.1 could ask it (DNS rebinding)."""
    origins: tuple[str, ...] = ()
    """Web pages of other origins that may ask ("https://app.example.org"; CORS). None by default."""
    open_paths: tuple[str, ...] = ("/", "/static", "/health", "/docs", "/openapi.json")
    """Paths that need no key, with what is below them ("/": itself only)."""


def read_keys(file: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> tuple[SecretStr, ...]:
    """The API keys of a file (one a line, # begins a comment), else those of `RELOOK_API_KEYS`.

    Raises:
        UserError: the file cannot be read; a place for keys without one, which would leave the server open; a key of
            fewer than 16 characters, or with other characters than a header takes.
    """
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise UserError(f"{file}: no keys can be read ({reason}); give a text file, one key a line") from None
        found, where = [line.partition("#")[0].strip() for line in lines], str(file)
    elif KEYS in environ:
        found, where = [key.strip() for key in environ[KEYS].split(",")], KEYS
    else:
        return ()
    keys = [key for key in found if key]
    if not keys:
        raise UserError(f"{where}: there is no key in it; write one, or leave it out and anybody may ask")
    for number, key in enumerate(keys, 1):
        if len(key) < 16 or not re.fullmatch(r"[!-~]+", key):
            raise UserError(f"{where}: key {number} is not one; expected 16 or more letters, digits and signs of ASCII")
    return tuple(map(SecretStr, keys))


class Refused(Exception):
    """A request that is answered before the app sees it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    kind = KINDS.get(status, "invalid_request_error")
    message = message.encode("utf-8", "backslashreplace").decode()  # it may quote half a character of the request
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


def protect(app: Any, limits: Limits, settings: SecuritySettings) -> Memory:
    """Put a Starlette or FastAPI app behind the checks of this module. Returns the memory that its requests share."""
    from starlette.middleware.cors import CORSMiddleware

    memory = Memory(limits.memory_bytes)
    app.add_middleware(Guard, limits=limits, settings=settings, memory=memory)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(RequestLog)
    return memory


class RequestLog:
    """The outermost layer: request id, one line in the log, and a 500 without details for what nobody caught."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = _header(scope, b"x-request-id")
        name = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        status, sent, begun = 0, 0, time.monotonic()
        _request_id.set(name)

        async def marked(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, marked)
        except Exception as error:
            log_unexpected(error)
            if status == 0:
                await _answer(marked, 500, "an error inside the server; its log has more under this request's id")
        finally:
            fields = {"client": (scope.get("client") or ("", 0))[0], "method": scope["method"][:20]}
            fields |= {"path": scope["path"][:200], "status": status or None, "bytes": sent}
            log.info("request", extra={"fields": fields | {"seconds": round(time.monotonic() - begun, 4)}})


class Guard:
    """Host, key and body of a request, checked before the app sees it. The body is read whole, bounded and in time."""

    def __init__(self, app: ASGIApp, limits: Limits, settings: SecuritySettings, memory: Memory):
        self.app, self.limits, self.settings, self.memory = app, limits, settings, memory
        self.keys = [key.get_secret_value().encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with self.memory.request():
            try:
                self._check_sender(scope)
                body = await self._body(scope, receive)
            except Refused as error:
                return await _answer(send, error.status, error.message, error.code, **error.headers)
            except EngineBusy as error:
                return await _answer(send, 429, str(error), "server_busy", **{"Retry-After": "1"})
            if body is None:  # the client has gone
                return
            pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
            del body

            async def replay() -> Message:
                return pending.pop() if pending else await receive()

            await self.app(scope, replay, send)

    def _check_sender(self, scope: Scope) -> None:
        host = re.sub(r":\d*$", "", _header(scope, b"host")).strip("[]").lower()
        if "*" not in self.settings.hosts and host not in self.settings.hosts:
            raise Refused(400, f"host {host[:80]!r} is not this server's; it is reached as {self.settings.hosts[0]}")
        path = scope["path"]
        is_open = any(path == p or (p != "/" and path.startswith(f"{p}/")) for p in self.settings.open_paths)
        if self.keys and not is_open:
            scheme, _, key = _header(scope, b"authorization").partition(" ")
            given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            if not any([hmac.compare_digest(given, one) for one in self.keys]):  # a list: all are compared
                sentence = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
                raise Refused(401, sentence, "invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        limit, close = self.limits.body_bytes, {"Connection": "close"}  # what is still sent is not read
        stated = _header(scope, b"content-length")
        if stated.isdigit() and int(stated[:20]) > limit:
            raise Refused(413, f"the body has {int(stated[:20]):,} bytes, this server takes {limit:,}", **close)
        body = bytearray()
        try:
            with anyio.fail_after(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    hold(len(message.get("body", b"")))
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise Refused(413, f"the body has more than the {limit:,} bytes this server takes", **close)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = f"{self.limits.body_seconds:g} seconds"
            raise Refused(408, f"the body did not arrive within {seconds}; send it faster", **close) from None
        # Three bytes of JSON become a list of 60; and reading a million values would keep the others waiting.
        if (values := sum(map(body.count, (b"[", b"{", b",")))) > self.limits.body_values:
            raise Refused(400, f"the body has some {values:,} values, this server takes {self.limits.body_values:,}")
        return bytes(body)


def _header(scope: Scope, name: bytes) -> str:
    """A header's value, "" where there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def _answer(send: Send, status: int, message: str, code: str | None = None, **headers: str) -> None:
    body = json.dumps(error_body(status, message, code)).encode()
    named = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def log_unexpected(error: BaseException) -> None:
    """Log an error by its kind and the places it went through: what it says may quote the request."""
    log.error("unexpected error", extra={"fields": _about(error)})


def _about(error: BaseException) -> dict[str, Any]:
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    places = [f"{Path(p.filename).name}:{p.lineno} {p.name}" for p in traceback.extract_tb(causes[-1].__traceback__)]
    return {"error": " from ".join(type(each).__name__ for each in causes), "at": places[-12:]}


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with the request's id. Of an exception: its kind and places, not what it says."""

    def format(self, record: logging.LogRecord) -> str:
        said = record.getMessage().partition("\n")[0]
        entry: dict[str, Any] = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": said}
        entry |= {"request": _request_id.get(), **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            entry |= _about(record.exc_info[1])
        return json.dumps(entry)


def log_config(level: str = "INFO") -> dict[str, Any]:
    """Logging for `uvicorn.run(log_config=)`: JSON lines on stderr; no access log of its own, which has whole URLs."""
    to_stderr = {"handlers": ["stderr"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "relook.serve.security.JsonLines"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "loggers": {
            "relook": to_stderr,
            "uvicorn": to_stderr,
            "uvicorn.access": {"handlers": [], "propagate": False, "level": "CRITICAL"},
        },
    }
