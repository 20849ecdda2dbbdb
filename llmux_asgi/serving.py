"""What `llmux-asgi serve` does to be quick, for hosts that run uvicorn themselves. Needs the extra `server`.

tune_garbage_collection()
uvicorn.run(app, http=GatheringProtocol)
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any, cast

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError as error:
    raise ImportError(f"llmux_asgi.serving needs the extra server: pip install 'llmux-asgi[server]' ({error})") from error

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
    """uvicorn's HTTP protocol; what is sent within one turn of the event loop goes out by one system call.

    An answer's headers and its body are two messages in ASGI, and uvicorn sends each by itself.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(cast("asyncio.Transport", _Gathering(transport, self.loop)))


class _Gathering:
    """A transport that writes at the end of the present turn of the loop."""

    __slots__ = ("_loop", "_parts", "_size", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > _MOST_GATHERED:  # so that the transport can say when it is too much
            self._flush()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts = self._parts
        if parts:
            self._parts, self._size = [], 0
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
