"""A connection on a stream of anyio, for trio: it is read when somebody waits for its answer, and not between."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

import anyio
from anyio.abc import ByteStream, SocketAttribute

from ._parser import Http1Response, ResponseParser, silence
from ._pool import SMALL, Pool, probe
from ._protocol import Content

__all__ = ["StreamConnection"]

_PIECE = 262_144
"""Bytes of a larger one whose sending breaks the silence."""
_READ = 65536


class StreamConnection:
    """One connection to a server, with at most one request on its way."""

    def __init__(self, stream: ByteStream, pool: Pool) -> None:
        self._stream = stream
        self._pool = pool
        self._socket: socket.socket = stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - not Django's
        self._probe = probe(self._socket)
        self._parser = ResponseParser()
        self._response = Http1Response(self)
        self._unsent: tuple[bytes, Content] | None = None
        """The request, until its sending begins."""
        self._sending = False
        """Whether the server has not been sent all of it."""
        self._limit = math.inf
        self._silence = anyio.CancelScope()
        self._closed = False

    def start(self, method: bytes, head: bytes, body: Content, limit: float | None) -> Http1Response:
        """Begin a request; the first `advance` sends it. `limit`: seconds that the server may be silent, or take nothing."""
        self._response = Http1Response(self)
        self._parser.expect(method, self._response)
        self._limit = math.inf if limit is None else limit
        self._unsent = (head, body)
        self._sending = True
        return self._response

    async def advance(self) -> None:
        """Send what is to be sent, then wait for the server."""
        request, self._unsent = self._unsent, None
        if request is None:
            await self._receive()
        elif isinstance(body := request[1], bytes) and len(body) <= SMALL:
            await self._send_small(request[0] + body)
        else:
            await self._send_large(request[0], [body] if isinstance(body, bytes) else body)
        response = self._response
        if response.whole and self._parser.reusable and not self._sending:
            self._pool.put(self)
        elif response.whole or response.fault:
            self.close()

    def is_fresh(self) -> bool:
        """Say whether the server has neither closed it nor sent anything unasked."""
        return not self._closed and not self._probe(0)

    def close(self) -> None:
        """Close at once."""
        if not self._closed:
            self._closed = True
            self._parser.fail("was given up.")
            # The socket itself: to close the stream one has to wait, which a cancelled task must not. Nobody waits on it.
            self._socket.close()

    async def _receive(self) -> None:
        with anyio.CancelScope(deadline=anyio.current_time() + self._limit) as self._silence:
            try:
                self._parser.feed(await self._stream.receive(_READ))
            except anyio.EndOfStream:
                self._parser.end()
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
                self._parser.end(_reason(exc))
        if self._silence.cancelled_caught:
            self._parser.fail(silence(self._limit, reads=not self._sending))

    async def _send_small(self, request: bytes) -> None:
        with anyio.move_on_after(self._limit) as scope:
            try:
                await self._stream.send(request)
                self._sending = False
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
                self._response.sent = False  # at least not all of it
                self._parser.end(_reason(exc))
                return
        if scope.cancelled_caught:
            self._parser.fail(silence(self._limit, reads=False))
        else:
            await self._receive()

    async def _send_large(self, head: bytes, body: Sequence[bytes | memoryview]) -> None:
        response = self._response
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._send_pieces, head, body)
            while not (response.status or response.fault):
                await self._receive()
            if response.status >= 400 or response.fault or response.whole:
                tasks.cancel_scope.cancel()  # the server does not want the rest

    async def _send_pieces(self, head: bytes, body: Sequence[bytes | memoryview]) -> None:
        try:
            await self._stream.send(head)
            for part in body:
                rest = memoryview(part)
                while rest:
                    await self._stream.send(bytes(rest[:_PIECE]))
                    rest = rest[_PIECE:]
                    self._silence.deadline = anyio.current_time() + self._limit
            self._sending = False
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            return  # who waits for the answer will be told; there may be one


def _reason(error: Exception) -> Exception:
    """Return the operating system's error behind one of anyio's, which says nothing."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause or error
