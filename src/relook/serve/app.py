"""The HTTP server: OpenAI's chat completions and models, `/v1/looks`, health and metrics, over one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from relook import __version__
from relook.errors import RelookError, UserError
from relook.io import checkpoint_name
from relook.options import AskOptions
from relook.perceive import engine as seam
from relook.serve import collect, page
from relook.serve.completions import Reply
from relook.serve.fetch import load_images
from relook.serve.messages import check, read_messages
from relook.serve.metrics import CountRequests, Metrics
from relook.serve.security import error_body, log_unexpected, protect
from relook.serve.settings import ServeSettings
from relook.serve.tools import ZoomTool
from relook.serve.types import BadField, ChatRequest, LooksRequest, Problem
from relook.trace import Answer, Finished, TextDelta

T = TypeVar("T")
PING_SECONDS = 15.0  # between comments in a stream that has nothing to say: proxies close silent connections
STATUS = {seam.EngineBusy: 429, seam.EngineClosed: 503, seam.DeadlineExceeded: 408, UserError: 400}
BROKEN = "an error inside the server; its log has more under this request's id"
CODES = {404: "model_not_found", 408: "timeout", 429: "server_busy", 503: "server_closing"}


class UnknownModel(UserError):
    """A request for a model that this server does not have."""


def create_app(
    engine: seam.Engine, settings: ServeSettings | None = None, collection: collect.Collection | None = None
) -> FastAPI:
    """The ASGI app over an engine; with a `collection` its page saves answers by hand.

    Whoever runs it sets `app.state.draining` before it closes the engine, so that `/health/ready` says so.
    """
    settings = settings or ServeSettings()
    app = FastAPIOffline(
        title="relook", version=__version__, docs_url="/docs", redoc_url=None, static_url="/docs/static",
        responses={"4XX": {"model": Problem}, "5XX": {"model": Problem}},
        summary="A vision-language model that looks again, in the shape of OpenAI's API",
    )  # fmt: skip
    app.state.draining = False
    app.state.server = server = Server(engine, settings)
    app.add_exception_handler(RelookError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    _answering(app, server)
    _monitoring(app, server)
    if collection is not None:
        server.collects = True
        collect.mount(app, server, collection)
    page.mount(app)
    protect(app, settings.limits, settings.security)
    app.add_middleware(CountRequests, metrics=server.metrics)
    return app


class Server:
    """What the routes share: the engine, its name in the API, settings and counters."""

    def __init__(self, engine: seam.Engine, settings: ServeSettings):
        self.engine, self.settings, self.metrics = engine, settings, Metrics(engine)
        self.name = settings.name or checkpoint_name(engine.name)
        self.created = int(time.time())
        self.collects = False

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise UnknownModel(f"the model {name[:80]!r} does not exist here; this server has {self.name!r}")

    def model(self) -> dict[str, Any]:
        """The entry of `/v1/models`."""
        engine = self.engine
        own = {"looks": engine.looks, "grid": engine.grid, "domain": engine.domain, "warnings": engine.warnings}
        own |= {"regions": engine.regions}
        own |= {"collects": True} if self.collects else {}
        named = {"id": self.name, "object": "model", "created": self.created, "owned_by": "relook"}
        return {**named, "relook": {**own, "context_window": engine.context}}

    async def chat(self, body: ChatRequest) -> tuple[seam.Request, Reply]:
        """The engine's request for a chat, and what writes its answer."""
        self.check_model(body.model)
        body.check_others()
        tool, warnings = ZoomTool.of(body)
        talk = read_messages(body.messages, self.engine.grid)
        check(talk, body, self.settings)
        images = await load_images(talk.addresses, self.settings.limits, self.settings.fetch)
        request = talk.request(body, images, tool, self.engine.grid, self.settings.max_tokens)
        shown = self.settings.crops_in_text
        return request, Reply(body, self.name, tool, talk.target, shown, [*warnings, *talk.warnings])

    async def submit(self, request: seam.Request) -> seam.Running:
        """Hand a request to the engine, which prepares it first; one whose client has gone by then is cancelled."""

        def cancel(done: asyncio.Future[seam.Running]) -> None:
            if not done.cancelled() and done.exception() is None:
                done.result().cancel()

        most = self.settings.limits.looks
        if request.options.max_looks is None and self.engine.regions["max_looks"] > most:  # what was not asked for
            request = replace(request, options=request.options.model_copy(update={"max_looks": most}))
        handing = asyncio.ensure_future(to_thread.run_sync(self.engine.submit, request, self.settings.limits.seconds))
        try:
            return await asyncio.shield(handing)
        except asyncio.CancelledError:
            handing.add_done_callback(cancel)
            raise

    async def answer(self, request: seam.Request, began: float) -> Answer:
        """The whole answer to a request that came at `began`."""
        with self.metrics.answering(began) as watch:
            running = await self.submit(request)
            try:
                async for event in running:
                    watch.saw(event)
                    if isinstance(event, Finished):
                        return event.answer
                raise RelookError("the engine ended without an answer")
            finally:
                running.cancel()

    async def stream(self, running: seam.Running, reply: Reply, began: float) -> AsyncIterator[bytes]:
        """The answer as chunks, each an event; an error after the first is one, too."""
        yield format_sse_event(data_str=reply.begin())
        with self.metrics.answering(began) as watch:
            try:
                async for event in running:
                    watch.saw(event)
                    chunks = reply.chunks(event)  # pictures take their time
                    for chunk in chunks if isinstance(event, TextDelta) else await to_thread.run_sync(list, chunks):
                        yield format_sse_event(data_str=chunk)
            except Exception as error:
                yield format_sse_event(data_str=bytes(_refusal(error).body).decode())


def _answering(app: FastAPI, server: Server) -> None:
    """The routes that ask the model."""

    @app.post("/v1/chat/completions", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """A chat completion as in OpenAI's API; with `stream` as server-sent events."""
        began = time.perf_counter()
        request, reply = await server.chat(body)
        if body.stream:
            running = await server.submit(request)
            return Events(server.stream(running, reply, began), running.cancel)
        answer = await _while_connected(http, server.answer(request, began))
        return JSONResponse(await to_thread.run_sync(reply.whole, answer)) if answer else Response(status_code=499)

    @app.post("/v1/looks", response_model=None)
    async def looks(body: LooksRequest, http: Request) -> Response:
        """A question about images; the answer with every look, as `Answer.to_dict(images=True)` has it."""
        began = time.perf_counter()
        server.check_model(body.model)
        options = body.model_dump(include=set(AskOptions.model_fields), exclude_unset=True)
        addresses = [body.image] if isinstance(body.image, str) else body.image
        server.settings.limits.check([body.question], len(addresses), body.max_looks or 0)
        checked = AskOptions.of(options)
        images = await load_images(addresses, server.settings.limits, server.settings.fetch)
        request = seam.Request(body.question, tuple(images), checked)
        answer = await _while_connected(http, server.answer(request, began))
        return JSONResponse(await to_thread.run_sync(answer.to_dict, True)) if answer else Response(status_code=499)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served, with the looks it can take."""
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model()


def _monitoring(app: FastAPI, server: Server) -> None:
    """The routes for whoever runs the server."""

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.head("/health", include_in_schema=False)
    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """Whether requests are taken."""
        closing = app.state.draining
        return JSONResponse({"status": "closing" if closing else "ok"}, status_code=503 if closing else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _while_connected(http: Request, work: Awaitable[T]) -> T | None:
    """What `work` returns; None, and the work is cancelled, where the client goes away first."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class Events(EventSourceResponse):
    """Server-sent events, with a comment wherever there was nothing to say for a while.

    A task beside the stream writes these, and no timeout around each event: that would cost more than the event.

    Args:
        events: encoded.
        at_end: called when the response has been sent, or cannot be sent any more (even before its first event).
    """

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()

    async def stream_response(self, send: Send) -> None:
        last = time.monotonic()

        async def marked(message: Message) -> None:
            nonlocal last
            last = time.monotonic()
            await send(message)

        async def ping() -> None:
            while True:
                await asyncio.sleep(PING_SECONDS)
                if time.monotonic() - last >= PING_SECONDS:
                    await send({"type": "http.response.body", "body": KEEPALIVE_COMMENT, "more_body": True})

        pinging = asyncio.ensure_future(ping())
        try:
            await super().stream_response(marked)
        finally:
            pinging.cancel()


# -- errors ----------------------------------------------------------------------------------------------------------


async def _refuse(request: Request, error: Exception) -> Response:
    return _refusal(error)


def _refusal(error: Exception) -> JSONResponse:
    """An error as OpenAI's API writes it: a sentence, never a trace."""
    headers: dict[str, str] = {}
    param = error.param if isinstance(error, BadField) else None
    if isinstance(error, RequestValidationError):
        status, (message, param) = 400, _first_problem(error)
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    else:
        status = next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)
        status = 404 if isinstance(error, UnknownModel) else status
        message = str(error) if isinstance(error, RelookError) else BROKEN
    if status == 500:
        log_unexpected(error)
    if isinstance(error, seam.EngineBusy):
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    code = CODES.get(status) if isinstance(error, RelookError) else None
    return JSONResponse(error_body(status, message, code, param), status_code=status, headers=headers)


def _first_problem(error: RequestValidationError) -> tuple[str, str]:
    """What is wrong with a body, in a sentence, and the name of the field."""
    if isinstance(error.body, bytes):
        return "the body is not read as JSON; send it with Content-Type: application/json", ""
    problem = max(error.errors(), key=lambda each: len(each["loc"]))  # of several forms, the one that fits furthest
    name, at = "", error.body
    for part in problem["loc"]:  # what names no value is the name of a form
        if isinstance(part, int) and isinstance(at, list) and part < len(at):
            name, at = f"{name}[{part}]", at[part]
        elif isinstance(at, dict) and (part in at or problem["type"] == "missing") and part != "body":
            name, at = f"{name}.{part}", at.get(part)
    name = name.lstrip(".")[:200]
    return f"{name or 'the body'}: {problem['msg'].removeprefix('Value error, ')}", name
