"""Connections on which nothing happens are closed, or enough of them would leave no place for others.

uvicorn itself waits for the header of a request, and for a client to read its answer, however long that takes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 30.0


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol (`uvicorn.Config(http=Connection)`) with a look at each connection now and then."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: tuple[Any, int] = (None, 0)
        self._timer = self.loop.call_later(IDLE_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close it where no request has begun since the last look, or nothing of an answer has been read."""
        unread = self.transport.get_write_buffer_size()
        now, no_request = (self.cycle, unread), self.cycle is None or self.cycle.response_complete
        if now == self._seen and (unread or no_request):
            self.transport.abort()
            return
        self._seen = now
        self._timer = self.loop.call_later(IDLE_SECONDS, self._look)
