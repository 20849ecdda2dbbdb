"""A connection on a transport of asyncio or uvloop: no task, no stream, one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import cast

from .._turn import Turn
from ._parser import Http1Response, ResponseParser, silence
from ._pool import SMALL, Pool, probe
from ._protocol import Content

__all__ = ["AsyncioConnection"]

_PIECE = 262_144
"""Bytes of a large body that are handed to the transport at a time: it may copy what the socket does not take."""
_HIGH_WATER = 131_072
"""Bytes of an answer that may lie here before the server is made to wait."""


class AsyncioConnection(asyncio.Protocol):
    """One connection to a server, with at most one request on its way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool) -> None:
        self._loop = loop
        self._turn = Turn.of(loop)
        self._pool = pool
        self._parser = ResponseParser()
        self._response: Http1Response | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._request: tuple[bytes, bytes] | None = None
        """The method of a request and what is sent of it in one piece, until that is done."""
        self._unsent: list[memoryview] = []
        self._stalled = False
        """Whether the transport has as much to send as it will take."""
        self._paused = False
        """Whether the server is made to wait."""
        self._closed = False
        self._limit: float | None = None
        self._since = 0.0
        """When the present silence began, on the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer fires. It is not moved when the silence is broken: it looks when it fires."""

    def start(self, method: bytes, head: bytes, body: Content, limit: float | None) -> Http1Response:
        """Send a request. `limit`: seconds that the server may be silent, or not take what is sent."""
        self._response = response = Http1Response(self)
        self._limit = limit
        if isinstance(body, bytes) and len(body) <= SMALL:
            self._request = method, head + body
        else:
            self._request = method, head
            self._unsent = [memoryview(piece) for piece in ([body] if isinstance(body, bytes) else body) if piece]
        self._turn.at_end(self._send)
        if self._turn.alone:
            self._send()
        return response

    def advance(self) -> Awaitable[None]:
        """Wait for the server."""
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        loop = self._loop
        self._waiter = waiter = loop.create_future()
        if (limit := self._limit) is not None:
            self._since = now = loop.time()
            if self._timer is None or self._due > now + limit:
                self._set_timer(now + limit)
        return waiter

    def is_fresh(self) -> bool:
        """Say whether the server has neither closed it nor sent anything unasked; also what the event loop has not seen yet."""
        return not self._closed and not self._probe(0)

    def close(self) -> None:
        """Close at once."""
        if self._closed:
            return
        self._closed = True
        if self._request is not None and self._response is not None:
            self._request = None
            self._response.sent = False
            self._response.fault = "broke off: the connection was closed."
        self._parser.fail("was given up.")
        self._unsent = []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._probe = probe(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Take a piece of the answer."""
        response = self._response
        parser = self._parser
        parser.feed(data)
        if response is None or self._request is not None:  # nothing was asked, or not yet
            self._lost(None)
            return
        if response.whole:
            self._response = None
            # Something is left to be sent if the server did not want all of the request.
            if parser.reusable and not self._transport.get_write_buffer_size():
                self._pool.put(self)
            else:
                self.close()
        elif response.fault:
            self.close()
        elif response.size > _HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """The server sends no more."""
        self._lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._lost(exc)

    def pause_writing(self) -> None:
        """The server does not take what is sent as fast as it comes."""
        self._stalled = True

    def resume_writing(self) -> None:
        """It has taken most of it."""
        self._stalled = False
        self._since = self._loop.time()
        self._send_on()

    def _lost(self, exc: Exception | None) -> None:
        self._parser.end(exc)
        self._pool.discard(self)
        self.close()
        self._wake()

    def _send(self) -> None:
        if self._request is None or self._response is None:  # it was given up meanwhile
            return
        method, data = self._request
        self._parser.expect(method, self._response)
        self._transport.write(data)
        if self._transport.is_closing():  # the first byte already was refused
            self.close()
            self._wake()
            return
        self._request = None
        if self._unsent:
            self._send_on()

    def _send_on(self) -> None:
        unsent = self._unsent
        while unsent and not self._stalled:
            piece, rest = unsent[0][:_PIECE], unsent[0][_PIECE:]
            if rest:
                unsent[0] = rest
            else:
                del unsent[0]
            self._transport.write(piece)

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._waiter is None or self._limit is None:
            return  # nobody waits for the server
        due = self._since + self._limit
        if due > self._loop.time():
            self._set_timer(due)
            return
        self._parser.fail(silence(self._limit, reads=not self._unsent))
        self.close()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
