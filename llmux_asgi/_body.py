"""The body of a request to a server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

__all__ = ["Body"]


class Body(httpx.AsyncByteStream):
    """`content` in one piece.

    Not a generator, as the one of httpx is: trio warns of one that a cancelled request has left half-way.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Start from the beginning."""
        return _Pieces([self._content])


class _Pieces(AsyncIterator[bytes]):
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop(0)
