"""A server on a free port of this machine, over real HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from relook.serve.app import create_app
from relook.serve.settings import ServeSettings


@contextmanager
def serving(engine, **settings) -> Iterator[str]:
    """Serve an engine while the block runs; yields the address, without a slash at its end."""
    app = create_app(engine, ServeSettings.model_validate(settings))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
