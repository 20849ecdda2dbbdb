"""A WebSocket connection to a server: wsproto (RFC 6455) over anyio's streams, on asyncio and on trio.

Compression is not offered: a small message could grow to any size.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from ._openai import Headers
from ._upstream import UpstreamFault

__all__ = ["SocketClosed", "UpstreamSocket", "connect_websocket"]

_READ = 65536
_GOODBYE = 1.0
"""Seconds that the last bytes to a server may take."""


class SocketClosed(Exception):
    """The connection is over: `code` by RFC 6455 section 7.4, `reason` in words. 1006: it broke off."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class UpstreamSocket:
    """An open connection. One task may receive while another one sends."""

    def __init__(self, stream: ByteStream, max_message: int) -> None:
        self._stream = stream
        self._max_message = max_message
        self._wire = WSConnection(ConnectionType.CLIENT)
        self._sending = anyio.Lock()
        self.subprotocol: str | None = None
        """What the server has chosen among those that were offered."""

    async def handshake(self, request: Request) -> None:
        """Open the connection. Raises `UpstreamFault` if the server refuses, and if it breaks off."""
        try:
            await self._stream.send(self._wire.send(request))
            while True:
                for event in self._wire.events():
                    if isinstance(event, AcceptConnection):
                        self.subprotocol = event.subprotocol
                        return
                    if isinstance(event, RejectConnection):
                        raise UpstreamFault(f"refused the WebSocket with status {event.status_code}.")
                self._wire.receive_data(await self._stream.receive(_READ))
        except (anyio.EndOfStream, anyio.BrokenResourceError, RemoteProtocolError) as exc:
            raise UpstreamFault("broke off while the WebSocket was opened.") from exc

    async def receive(self) -> str | bytes:
        """Return the next whole message. Raises `SocketClosed`, with code 1009 if the message is too large."""
        parts: list[str | bytes] = []
        size = 0
        while True:
            for event in self._wire.events():
                if isinstance(event, CloseConnection):
                    with suppress(LocalProtocolError, SocketClosed):  # it may be the answer to ours
                        await self._send(event.response())
                    raise SocketClosed(event.code, event.reason or "")
                if isinstance(event, Ping):
                    await self._send(event.response())
                elif isinstance(event, TextMessage | BytesMessage):
                    parts.append(event.data if isinstance(event, TextMessage) else bytes(event.data))
                    size += len(event.data)
                    if size > self._max_message:
                        raise SocketClosed(1009, f"a message is larger than {self._max_message} bytes")
                    if event.message_finished:
                        return "".join(parts) if isinstance(event, TextMessage) else b"".join(parts)  # type: ignore[arg-type]
            try:
                self._wire.receive_data(await self._stream.receive(_READ))
            except (anyio.EndOfStream, anyio.BrokenResourceError, RemoteProtocolError) as exc:
                raise SocketClosed(1006, "the connection broke off") from exc

    async def send(self, message: str | bytes) -> None:
        """Send a message. Raises `SocketClosed`."""
        await self._send(TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message))

    async def close(self, code: int, reason: str) -> None:
        """Tell the server that it is over, if that still can be said."""
        with suppress(SocketClosed, LocalProtocolError):
            await self._send(CloseConnection(code=code, reason=reason))

    async def _send(self, event: Event) -> None:
        async with self._sending:
            try:
                await self._stream.send(self._wire.send(event))
            except anyio.BrokenResourceError as exc:
                raise SocketClosed(1006, "the connection broke off") from exc


@asynccontextmanager
async def connect_websocket(
    url: str, target: bytes, headers: Headers, subprotocols: list[str], *, timeout: float, max_message: int
) -> AsyncIterator[UpstreamSocket]:
    """Open a WebSocket to the server at `url` (http or https), and close its connection with the block.

    `timeout` is for the whole handshake, in seconds; `max_message` in bytes. Raises `UpstreamFault`.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    request = Request(
        host=parts.netloc,
        target=target.decode("ascii"),
        extra_headers=[pair for pair in headers if not pair[0].startswith(b"sec-websocket-")],
        subprotocols=subprotocols,
    )
    stream: ByteStream | None = None
    try:
        try:
            with anyio.fail_after(timeout):
                host, port = parts.hostname or "", parts.port or (443 if secure else 80)
                if secure:
                    stream = await anyio.connect_tcp(host, port, tls=True, tls_standard_compatible=False)
                else:
                    stream = await anyio.connect_tcp(host, port)
                socket = UpstreamSocket(stream, max_message)
                await socket.handshake(request)
        except TimeoutError as exc:
            raise UpstreamFault(f"did not open a WebSocket within {timeout:.3g} s.", sent=stream is not None) from exc
        except OSError as exc:
            raise UpstreamFault(f"cannot be reached: {exc}.", sent=False) from exc
        yield socket
    finally:
        if stream is not None:
            with anyio.move_on_after(_GOODBYE, shield=True):
                await stream.aclose()
