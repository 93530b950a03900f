"""A server on a free port of this machine, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from relook.serve.app import create_app
from relook.serve.settings import ServeSettings


@contextmanager
def running(app: Any, **config: Any) -> Iterator[str]:
    """Serve an app while the block runs; yields the address, without a slash at its end."""
    config = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 2, **config}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it had begun"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def serving(engine, **settings) -> Iterator[str]:
    """Serve an engine while the block runs; yields the address."""
    with running(create_app(engine, ServeSettings.model_validate(settings))) as url:
        yield url
