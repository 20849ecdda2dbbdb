"""A client over any transport of httpx: client certificates, HTTP/2, proxies, mocks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import anyio
import httpx

from .._body import Body
from .._openai import Headers
from ..config import TimeoutsConfig
from ._protocol import Content, Origin, UpstreamFault, running_loop

__all__ = ["HttpxUpstream"]


class HttpxUpstream:
    """`Upstream` over `transport`, called directly: `httpx.AsyncClient` would add headers, cookies and redirects.

    `aclose` closes the transport. Without one, `httpx.AsyncHTTPTransport` is used and keeps no connection: httpx cannot tell
    whether a request that was sent on a stale one has been executed.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._given = transport
        self._made: httpx.AsyncHTTPTransport | None = None
        self._loop: object = None

    async def request(
        self, method: bytes, origin: Origin, target: bytes, headers: Headers, body: Content, timeouts: TimeoutsConfig
    ) -> _Response:
        """Send a request; see `Upstream`."""
        pieces = [body] if isinstance(body, bytes) else body
        request = httpx.Request(
            method.decode("ascii"),
            origin.url,
            headers=[(b"host", origin.authority), *headers, (b"content-length", b"%d" % sum(map(len, pieces)))],
            stream=Body(pieces),
            extensions={
                "target": target,  # as it came: httpx would quote it anew
                "timeout": {"connect": timeouts.connect, "read": timeouts.read, "write": timeouts.read, "pool": None},
            },
        )
        with _faults(timeouts):
            return _Response(await self._transport().handle_async_request(request), timeouts)

    async def aclose(self) -> None:
        """Close the transport."""
        transport, self._made = self._given or self._made, None
        if transport is not None:
            await transport.aclose()

    def _transport(self) -> httpx.AsyncBaseTransport:
        if self._given is not None:
            return self._given
        # A connection belongs to its event loop; an app that is used on a second one (a test client does that) starts anew.
        loop = running_loop()
        if self._made is None or loop is not self._loop:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self._made, self._loop = httpx.AsyncHTTPTransport(limits=limits, trust_env=False), loop
        return self._made


class _Response:
    """An answer on its way (an `UpstreamResponse`)."""

    def __init__(self, response: httpx.Response, timeouts: TimeoutsConfig) -> None:
        self._response = response
        self._timeouts = timeouts
        self._chunks: AsyncIterator[bytes] = response.aiter_raw()
        self.status = response.status_code
        self.headers: Headers = response.headers.raw
        self.ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            with _faults(self._timeouts):
                return await anext(self._chunks)
        except StopAsyncIteration:
            self.ended = True
            raise

    async def aclose(self) -> None:
        # Also when the client is gone and this task is being cancelled: the server must stop generating.
        with anyio.CancelScope(shield=True):
            await self._response.aclose()
            # httpx nests generators that cannot be closed from here, and trio warns of one that is left half-way.
            # On a closed response they come to their end at once.
            with suppress(httpx.HTTPError, httpx.StreamError):
                async for _ in self._chunks:
                    pass


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
