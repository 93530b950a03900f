"""Running the app under uvicorn: a bound address first, and an end that lets running answers finish."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from relook.errors import UserError
from relook.serve.app import create_app
from relook.serve.connections import Connection
from relook.serve.security import log_config
from relook.serve.settings import ServeSettings

if TYPE_CHECKING:
    from relook.perceive.engine import Engine
    from relook.serve.collect import Collection

LEFT_SECONDS = 5  # for responses that are still being sent when the engine has closed


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on an address: who connects while the model is loaded waits for it.

    Raises:
        UserError: nothing can listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port} ({reason}); choose another --host or --port") from None
    return bound


def serve(
    engine: Engine, settings: ServeSettings, bound: socket.socket, drain: float, collection: Collection | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C; then running answers get `drain` seconds, and new requests a 503."""
    app = create_app(engine, settings, collection)
    config = uvicorn.Config(
        app, http=Connection, log_config=log_config(), access_log=False, server_header=False,
        ws="none", proxy_headers=False,  # what is refused there is logged with its query; who asks is who connects
        timeout_graceful_shutdown=LEFT_SECONDS,
    )  # fmt: skip
    try:
        _Server(config, engine, drain).run(sockets=[bound])
    finally:
        engine.close()


class _Server(uvicorn.Server):
    """uvicorn's server; the first signal to end closes the engine, the second the connections, too."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain: float):
        super().__init__(config)
        self.engine, self.drain_seconds, self.draining = engine, drain, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            print(f"relook: {self.engine.name} at http://{name}:{port} (API: /docs)", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.draining:
            self.force_exit = self.should_exit = True
            return
        self.draining = self.config.app.state.draining = True  # type: ignore[union-attr]
        print(f"relook: {signal.Signals(sig).name}: finishing what has begun", file=sys.stderr, flush=True)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self.engine.close(self.drain_seconds)
        self.should_exit = True
