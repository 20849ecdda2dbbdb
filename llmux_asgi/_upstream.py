"""The HTTP client that sends requests to the servers, behind the seam at which it can be replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import anyio
import httpx

from ._body import Body
from ._openai import Headers
from .config import TimeoutsConfig

__all__ = ["HttpxUpstream", "Upstream", "UpstreamFault", "UpstreamResponse"]


class UpstreamFault(Exception):
    """A server refused, broke off or timed out. The message completes 'The server of the model … '.

    `sent` is False if nothing of the request can have reached it.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True, slots=True)
class UpstreamResponse:
    """A server's answer: `chunks` yields the body's bytes as they come, and raises `UpstreamFault`."""

    status: int
    headers: Headers
    chunks: AsyncIterator[bytes]


class Upstream(Protocol):
    """Sends one request. The seam at which the HTTP client can be replaced."""

    def request(
        self, method: bytes, url: str, target: bytes, headers: Headers, body: bytes, timeouts: TimeoutsConfig
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Send `method target` to the server at `url` (scheme, host and port). Leaving the block ends the exchange.

        Raises `UpstreamFault` if no answer comes.
        """
        ...

    async def aclose(self) -> None:
        """Close idle connections; the next request opens new ones."""
        ...


class HttpxUpstream:
    """`Upstream` over httpx's transport, called directly: `AsyncClient` would add headers, cookies and redirects."""

    def __init__(self) -> None:
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._loop: int | None = None

    @asynccontextmanager
    async def request(
        self, method: bytes, url: str, target: bytes, headers: Headers, body: bytes, timeouts: TimeoutsConfig
    ) -> AsyncIterator[UpstreamResponse]:
        """Send a request; see `Upstream`."""
        base = httpx.URL(url)
        request = httpx.Request(
            method.decode("ascii"),
            base,
            headers=[(b"host", base.netloc), *headers, (b"content-length", str(len(body)).encode())],
            stream=Body(body),
            extensions={
                "target": target,  # as it came: httpx would quote it anew
                "timeout": {"connect": timeouts.connect, "read": timeouts.read, "write": timeouts.read, "pool": None},
            },
        )
        with _faults(timeouts):
            response = await self._open().handle_async_request(request)
        chunks = self._chunks(response, timeouts)
        try:
            yield UpstreamResponse(response.status_code, response.headers.raw, chunks)
        finally:
            # Also when the client is gone and this task is being cancelled: the server must stop generating.
            with anyio.CancelScope(shield=True):
                await response.aclose()
                # httpx nests generators that cannot be closed from here, and trio warns of one that is left half-way.
                # On a closed response they come to their end at once.
                with suppress(UpstreamFault, httpx.StreamError):
                    async for _ in chunks:
                        pass

    async def aclose(self) -> None:
        """Close the connections."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    def _open(self) -> httpx.AsyncHTTPTransport:
        # A connection belongs to its event loop; an app that is used on a second one (a test client does that) starts anew.
        loop = _running_loop()
        if self._transport is None or loop != self._loop:
            # No connection is kept. vLLM closes them when it has been idle for 5 s or has answered 500, and a request that
            # meets that must not be sent again: it cannot be told whether it was executed.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._transport, self._loop = httpx.AsyncHTTPTransport(limits=limits, trust_env=False), loop
        return self._transport

    async def _chunks(self, response: httpx.Response, timeouts: TimeoutsConfig) -> AsyncIterator[bytes]:
        with _faults(timeouts):
            async for chunk in response.aiter_raw():
                yield chunk


@contextmanager
def _faults(timeouts: TimeoutsConfig) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectTimeout as exc:
        raise UpstreamFault(f"did not accept a connection within {timeouts.connect:.3g} s.", sent=False) from exc
    except httpx.ConnectError as exc:
        raise UpstreamFault(f"cannot be reached: {exc or 'connection failed'}.", sent=False) from exc
    except httpx.TimeoutException as exc:
        raise UpstreamFault(f"was silent for {timeouts.read:.3g} s.") from exc
    except httpx.HTTPError as exc:
        raise UpstreamFault(f"broke off: {str(exc).rstrip('.') or type(exc).__name__}.") from exc


def _running_loop() -> int:
    try:
        return id(asyncio.get_running_loop())
    except RuntimeError:
        return 0  # trio
