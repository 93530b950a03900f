"""relook's server on Ray Serve: replicas of the model, as many as the load takes, behind one address.

    serve run relook.integrations.ray_serve:build model=receipts-tiny replicas=2
    serve deploy examples/ray-serve.yaml

There are two deployments. Each replica of `Model` runs a `LocalEngine`; `Api` is the HTTP app of `relook serve`, with
an engine that hands every request to a replica. A replica that dies loses no answer: its requests are asked again of
another one, and what the client has got is not sent twice. That works because an answer is a function of its request.
Where the second answer differs from what was sent (in half precision a tie may fall otherwise), the request fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from random import SystemRandom
from threading import Thread
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from relook.errors import RelookError, UserError
from relook.io import validate
from relook.perceive.engine import DeadlineExceeded, EngineClosed, Request, Running
from relook.serve.security import read_keys
from relook.serve.settings import ServeSettings
from relook.trace import Event, Finished, LookTaken, TextDelta

ATTEMPTS = 5  # replicas that a request is asked of, one after the other
FACTS = ("name", "looks", "domain", "warnings", "grid", "regions", "context")  # attributes of `engine.Engine`


class RaySettings(BaseModel):
    """Arguments of `build`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str
    """A shipped model, a folder that every node has, or a hub id."""
    dtype: str | None = None
    device: str | None = None
    replicas: int = Field(1, ge=1)
    """Replicas of the model without any load."""
    max_replicas: int | None = Field(None, ge=1)
    """With load; None: as `replicas`."""
    rows: int = Field(8, ge=1)
    """Requests that a replica answers side by side. Where replicas have more than that, another one is started."""
    waiting: int = Field(64, ge=0)
    """Requests that may wait at a replica; more get status 429."""
    apis: int = Field(1, ge=1)
    """Replicas of the HTTP app."""
    cpus: float = Field(1, ge=0)
    """Of a replica of the model."""
    gpus: float = Field(0, ge=0)
    """Of a replica of the model."""
    serve: ServeSettings = ServeSettings()
    """As of `relook serve`: name, limits, hosts of images, keys (without any here: those of RELOOK_API_KEYS)."""


def build(arguments: Mapping[str, Any]) -> Any:
    """The application, for `serve run`, a config file, or `ray.serve.run(build({"model": ...}))`.

    Args:
        arguments: see `RaySettings`; numbers may be text.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise UserError("Ray Serve is not installed; pip install 'relook[ray-serve]'") from error
    settings: RaySettings = validate(RaySettings, arguments, "ray_serve", "argument")
    if (most := settings.max_replicas or settings.replicas) < settings.replicas:
        raise UserError(f"max_replicas={most} is less than replicas={settings.replicas}")
    if not settings.serve.security.keys:
        security = settings.serve.security.model_copy(update={"keys": read_keys()})
        kept = settings.serve.model_copy(update={"security": security})
        settings = settings.model_copy(update={"serve": kept})
    scaling = {"min_replicas": settings.replicas, "max_replicas": most, "target_ongoing_requests": settings.rows}
    model = serve.deployment(
        Model,
        autoscaling_config=scaling,
        max_ongoing_requests=settings.rows + settings.waiting + 8,  # the engine says when it has too many
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    api = serve.deployment(
        serve.ingress()(Api), num_replicas=settings.apis, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )
    return api.bind(model.bind(settings), settings)


class Model:
    """A replica: the model and its engine."""

    def __init__(self, settings: RaySettings):
        import relook
        from relook.perceive.local import LocalEngine

        options = {"dtype": settings.dtype, "device": settings.device}
        vlm = relook.load(settings.model, **{name: value for name, value in options.items() if value is not None})
        self.engine = LocalEngine(vlm, max_rows=settings.rows, max_waiting=settings.waiting)

    def facts(self) -> dict[str, Any]:
        """What the engine says of itself."""
        return {name: getattr(self.engine, name) for name in FACTS}

    async def answer(self, request: Request) -> AsyncIterator[Event | RelookError | None]:
        """The answer's events, after None once the engine has taken the request; last comes what failed, if so."""
        running = None
        try:
            running = await asyncio.to_thread(self.engine.submit, request)
            yield None
            async for event in running:
                yield event
        except RelookError as error:
            yield error
        finally:
            if running is not None:
                running.cancel()


class Api:
    """A replica of the HTTP app."""

    def __init__(self, model: Any, settings: RaySettings):
        from ray.exceptions import RayActorError, WorkerCrashedError
        from ray.serve.exceptions import ReplicaUnavailableError

        lost = (RayActorError, WorkerCrashedError, ReplicaUnavailableError)
        self.engine, self.settings = RayEngine(model, lost), settings.serve

    def __serve_build_asgi_app__(self) -> Any:
        from relook.serve.app import create_app

        return create_app(self.engine, self.settings)


class RayEngine:
    """Answers requests by replicas of `Model` (`perceive.engine.Engine`).

    Args:
        handle: of the deployment.
        lost: exceptions that say that a replica is gone.
    """

    name: str
    looks: list[str]
    domain: str | None
    warnings: list[str]
    grid: int
    regions: dict[str, Any]
    context: int | None

    def __init__(self, handle: Any, lost: tuple[type[Exception], ...]):
        self.handle = handle.options(stream=True)
        self.gone: tuple[type[Exception], ...] = (*lost, EngineClosed)
        self.running = self.asked_again = 0
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="relook ray engine", daemon=True).start()

        async def facts() -> dict[str, Any]:
            return await handle.facts.remote()

        vars(self).update(asyncio.run_coroutine_threadsafe(facts(), self._loop).result())

    def submit(self, request: Request, timeout: float | None = None) -> Running:
        """See `engine.Engine`. Returns once a replica has taken the request."""
        if request.options.do_sample and request.options.seed is None:  # a second replica has to draw the same
            seeded = request.options.model_copy(update={"seed": SystemRandom().getrandbits(63)})
            request = replace(request, options=seeded)
        running, taken = Running(), Future[None]()
        task = asyncio.run_coroutine_threadsafe(self._answer(request, running, taken, timeout), self._loop)

        def cancel() -> None:
            task.cancel()

        running.on_cancel = cancel
        taken.result()
        return running

    def stats(self) -> dict[str, float]:
        """See `engine.Engine`: requests of this replica of the API, and how many were asked again."""
        return {"running": float(self.running), "asked_again_total": float(self.asked_again)}

    def close(self, drain: float = 0) -> None:
        """See `engine.Engine`. Ray Serve itself waits for requests at work."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _answer(self, request: Request, running: Running, taken: Future[None], timeout: float | None) -> None:
        self.running += 1
        try:
            async with asyncio.timeout(timeout):
                await self._ask(request, running, taken)
        except Exception as error:
            failed: RelookError
            if isinstance(error, TimeoutError):
                failed = DeadlineExceeded(f"not finished in {timeout:g} s; ask for less")
            elif isinstance(error, RelookError):
                failed = error
            else:
                failed = RelookError(f"the answer failed ({type(error).__name__}); ask again")
                failed.__cause__ = error
            if taken.done():
                running.put(failed)
            else:
                taken.set_exception(failed)
        finally:
            self.running -= 1

    async def _ask(self, request: Request, running: Running, taken: Future[None]) -> None:
        """Ask one replica after the other, until one has answered to the end."""
        sent: list[Event] = []
        for attempt in range(ATTEMPTS):
            if attempt:
                self.asked_again += 1
                await asyncio.sleep(0.1 * 2**attempt)  # Ray Serve takes a moment to notice
            again = iter(tuple(sent))
            try:
                async for item in self.handle.answer.remote(request):
                    if isinstance(item, RelookError):
                        raise item
                    if item is None:
                        if not taken.done():
                            taken.set_result(None)
                    elif (before := next(again, None)) is None:
                        sent.append(item)
                        running.put(item)
                        if isinstance(item, Finished):
                            return
                    elif _said(before) != _said(item):
                        raise RelookError("a replica was lost, and another one answers otherwise; ask again")
            except self.gone:
                continue
        raise EngineClosed("no replica of the model stays; ask again later")


def _said(event: Event) -> Any:
    """What two events of one answer have in common when another replica gives it."""
    match event:
        case TextDelta():
            return event.text
        case LookTaken():
            return event.look.kind, event.look.cells
    return Finished
