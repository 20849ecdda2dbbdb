"""The idle connections to one server."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import Protocol

from .._spawn import Later
from ._parser import Http1Response
from ._protocol import Content

__all__ = ["SMALL", "Pool", "PooledConnection", "probe"]


SMALL = 65536
"""Bytes of a request's body that are sent together with its head."""


class PooledConnection(Protocol):
    """A connection that serves one request after another."""

    def start(self, method: bytes, head: bytes, body: Content, limit: float | None) -> Http1Response:
        """Send a request, its body in one piece if it is `SMALL`.

        `limit`: seconds that the server may be silent, or not take what is sent.
        """
        ...

    def is_fresh(self) -> bool:
        """Say whether the server has neither closed it nor sent anything unasked."""
        ...

    def close(self) -> None:
        """Close at once."""
        ...


class Pool:
    """Hands out the connection that was used last, in constant time.

    One that has been idle for `keepalive` seconds is not used any more, and at most `limit` are kept.
    """

    __slots__ = ("_idle", "_keepalive", "_limit", "_trimming")

    def __init__(self, keepalive: float, limit: int) -> None:
        self._keepalive = keepalive
        self._limit = limit
        self._idle: dict[PooledConnection, float] = {}
        """Since when each is idle; the last one was used last."""
        self._trimming: Later | None = None

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> PooledConnection | None:
        """Return a connection on which a request may be sent, if there is one."""
        idle = self._idle
        while idle:
            connection, since = idle.popitem()
            if time.monotonic() - since < self._keepalive and connection.is_fresh():
                return connection
            connection.close()
        return None

    def put(self, connection: PooledConnection) -> None:
        """Keep a connection whose answer is whole."""
        now = time.monotonic()
        idle = self._idle
        idle[connection] = now
        if len(idle) > self._limit:
            oldest = next(iter(idle))
            del idle[oldest]
            oldest.close()
        if self._trimming is None:
            self._trimming = Later(self._trim, self._keepalive)

    def discard(self, connection: PooledConnection) -> None:
        """Forget a connection that the server has closed, if it is here."""
        self._idle.pop(connection, None)

    def close(self) -> None:
        """Close all of them."""
        if self._trimming is not None:
            self._trimming.stop()
            self._trimming = None
        while self._idle:
            self._idle.popitem()[0].close()

    async def _trim(self) -> None:
        """Close those that are not used any more: their servers close them too, which is not seen under trio."""
        idle, limit = self._idle, time.monotonic() - self._keepalive
        while idle and idle[oldest := next(iter(idle))] <= limit:
            del idle[oldest]
            oldest.close()
        self._trimming = None
        if idle:
            self._trimming = Later(self._trim, max(0.0, next(iter(idle.values())) + self._keepalive - time.monotonic()))


def probe(sock: socket.socket) -> Callable[[int], list[tuple[int, int]]]:
    """Return a function that tells, called with 0, what there is: on an idle connection its end, or an unasked answer.

    It does not wait. The list is empty if there is nothing: no data, no end, no error.
    """
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return poll.poll
