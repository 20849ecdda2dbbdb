"""What `llmux-asgi serve` does to be quick, for hosts that run uvicorn themselves. Needs the extra `server`.

tune_garbage_collection()
uvicorn.run(app, http=GatheringProtocol)
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError as error:
    raise ImportError(f"llmux_asgi.serving needs the extra server: pip install 'llmux-asgi[server]' ({error})") from error

from ._intake import SCOPE_HEAD_BYTES
from ._turn import Turn

__all__ = ["GatheringProtocol", "tune_garbage_collection"]

_MOST_GATHERED = 65536
"""Bytes that are not held back any longer."""


def tune_garbage_collection() -> None:
    """Take what is in memory now out of the collector's sight, and let it look at the rest less often.

    A request makes some dozens of objects, and with a few requests at once the collector's defaults have it look at all of
    them again and again: about a tenth of what a request costs. For a process that does nothing else; call it when all is
    imported and set up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


class GatheringProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with fewer system calls and timers.

    An answer's headers and its body are two messages in ASGI, and uvicorn sends each by itself. Here what is sent within one
    turn of the event loop goes out by one system call, and for all connections in a row. A connection has one timer for all
    its pauses between requests, not a new one for each.
    """

    _idle_since: float | None = None
    """Since when the connection waits for its next request; `None`: it does not."""
    _head_bytes = 0
    """How many bytes have come with the head of the present request."""
    _in_head = False
    """Whether it is not complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        self._gathering = _Gathering(transport, self.loop)
        super().connection_made(self._gathering)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        super()._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._head_bytes = len(data) + (self._head_bytes if self._in_head else 0)
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start the app, or have the request wait for the one before it."""
        self._in_head = False
        # httptools refuses line breaks and null bytes.
        self.scope[SCOPE_HEAD_BYTES] = self._head_bytes  # type: ignore[literal-required] # not one of ASGI's own keys
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Send the end of the answer, and wait for the next request."""
        if self._gathering.turn.alone:  # not after all that the app has to put away behind it
            self._gathering.flush()
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._set_timer(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if no request has come for as long as it may be idle."""
        self.timeout_keep_alive_task = None
        if self._idle_since is not None:
            left = self._idle_since + self.timeout_keep_alive - self.loop.time()
            if left > 0:
                self._set_timer(left)
            else:
                super().timeout_keep_alive_handler()

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _set_timer(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)


class _Gathering(asyncio.Transport):
    """A transport that writes at the end of the present turn of the loop; all else is done by the one that it is given."""

    # Each method by name: with a `__getattr__` a look at any attribute would cost several times as much.
    __slots__ = ("_parts", "_size", "_transport", "is_closing", "turn")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self.is_closing = transport.is_closing  # type: ignore[method-assign] # asked for several times a request
        self.turn = Turn.of(loop)
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write `data` soon."""
        if not self._parts:
            self.turn.at_end(self.flush)
        self._parts.append(bytes(data))
        self._size += len(data)
        if self._size > _MOST_GATHERED:  # so that the transport can say when it is too much
            self.flush()

    def flush(self) -> None:
        """Write what there is."""
        parts = self._parts
        if parts:
            self._parts, self._size = [], 0
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def close(self) -> None:
        """Close when all is written."""
        self.flush()
        self._transport.close()

    def write_eof(self) -> None:
        """Write no more."""
        self.flush()
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        """Whether `write_eof` can be called."""
        return self._transport.can_write_eof()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection."""
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Have another protocol told of what happens."""
        self._transport.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who is told of what happens."""
        return self._transport.get_protocol()

    def is_reading(self) -> bool:
        """Whether what arrives is read."""
        return self._transport.is_reading()

    def pause_reading(self) -> None:
        """Read no more for a while."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._transport.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """From how many bytes on the protocol is told to pause."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Those limits, the lower first."""
        return self._transport.get_write_buffer_limits()

    def get_write_buffer_size(self) -> int:
        """How many bytes wait to be written."""
        return self._size + self._transport.get_write_buffer_size()
