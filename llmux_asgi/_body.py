"""The body of a request to a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import httpx

__all__ = ["Body"]


class Body(httpx.AsyncByteStream):
    """The pieces of a body.

    Not a generator, as the one of httpx is: trio warns of one that a cancelled request has left half-way.
    """

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Start from the beginning."""
        return _Pieces(list(self._pieces))


class _Pieces(AsyncIterator[bytes]):
    def __init__(self, pieces: list[bytes | memoryview]) -> None:
        self._pieces = pieces

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return bytes(self._pieces.pop(0))
