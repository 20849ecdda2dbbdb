"""The seam: what a client for the relay has to do."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeAlias

import httpx

from .._openai import Headers
from ..config import TimeoutsConfig

__all__ = ["Content", "Origin", "Upstream", "UpstreamFault", "UpstreamResponse", "running_loop"]


Content: TypeAlias = bytes | Sequence[bytes | memoryview]
"""A request's body, in one piece or in several."""


class UpstreamFault(Exception):
    """A server refused, broke off or timed out. The message completes 'The server of the model … '.

    `sent` is False if nothing of the request can have reached it.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class Origin:
    """Where a server listens, taken apart once: `http://10.0.0.7:8000`. A path in `url` is not looked at."""

    __slots__ = ("authority", "host", "port", "tls", "url")

    def __init__(self, url: str) -> None:
        parsed = httpx.URL(url)
        self.tls = parsed.scheme == "https"
        self.host = parsed.raw_host.decode("ascii")
        """What to connect to; a version 6 address without its brackets."""
        self.port: int = parsed.port or (443 if self.tls else 80)
        self.authority = parsed.netloc
        """The value of the `Host` header."""
        self.url = f"{parsed.scheme}://{self.authority.decode('ascii')}"


class UpstreamResponse(Protocol):
    """A server's answer. Iterating yields the body's bytes as they come, and raises `UpstreamFault` if it breaks off."""

    @property
    def status(self) -> int:
        """The status code, 200 to 999."""
        ...

    @property
    def headers(self) -> Headers:
        """The header pairs as they came, hop-by-hop ones included."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it is known that nothing more comes: the answer is whole, and iterating has yielded all of it."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Return itself: the body can be iterated once."""
        ...

    async def __anext__(self) -> bytes:
        """Return a part of the body that is not empty, as soon as there is one."""
        ...

    async def aclose(self) -> None:
        """End the exchange. If the answer is not whole yet the connection is closed, so that the server stops generating.

        Has to be called, also when the task is being cancelled; must not wait for the server.
        """
        ...


class Upstream(Protocol):
    """Sends requests to servers. The seam at which the HTTP client can be replaced."""

    async def request(
        self, method: bytes, origin: Origin, target: bytes, headers: Headers, body: Content, timeouts: TimeoutsConfig
    ) -> UpstreamResponse:
        """Send `method target` to `origin` and return the answer as soon as its headers are there.

        `body` is in one piece or in several, which are sent as one. `headers` are without `Host`, `Content-Length` and
        hop-by-hop ones. `timeouts.connect` limits opening a connection, `timeouts.read` the silence of a server that is to
        take or send bytes. The caller closes the answer. Raises `UpstreamFault` if none comes; if the call is cancelled the
        connection is closed.
        """
        ...

    async def aclose(self) -> None:
        """Close idle connections; the next request opens new ones."""
        ...


def running_loop() -> object:
    """Return what is one and the same in one run of an event loop: asyncio's loop, or trio's token."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return sys.modules["trio"].lowlevel.current_trio_token()
