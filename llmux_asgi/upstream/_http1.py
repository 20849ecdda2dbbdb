"""The default client: HTTP/1.1 over kept connections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator
from functools import partial

import anyio
import httpx

from .._openai import Headers
from ..config import TimeoutsConfig
from ._asyncio import AsyncioConnection
from ._parser import Http1Response
from ._pool import SMALL, Pool, PooledConnection
from ._protocol import Content, Origin, UpstreamFault, running_loop
from ._request import request_head
from ._streams import StreamConnection

__all__ = ["Http1Upstream"]


class Http1Upstream:
    """`Upstream` over HTTP/1.1, plain or TLS: a connection per request at a time, kept for the next one.

    A connection that has been idle for `keepalive` seconds is not used any more; stay below what the servers allow (vLLM and
    other servers on uvicorn: 5 s). `max_idle` connections are kept for each server. There is no limit to how many are open.
    `ssl_context` is for `https` addresses; by default certificates are checked against certifi's list.

    A request is sent a second time, on a new connection, only if a kept connection turned out to be closed before a byte of
    the request was taken: nothing can have been executed. A server that takes a request and closes the connection without an
    answer may have executed it, or died of it; that is an `UpstreamFault`. Such races are rare because the end of a kept
    connection is looked for before each use, and because none is kept after a 5xx: vLLM closes those without saying so.
    """

    def __init__(self, *, keepalive: float = 4.0, max_idle: int = 512, ssl_context: ssl.SSLContext | None = None) -> None:
        self._keepalive = keepalive
        self._max_idle = max_idle
        self._ssl_context = ssl_context
        self._loop: object = None
        self._pools: dict[str, Pool] = {}
        self._closer: AsyncGenerator[None] | None = None

    async def request(
        self, method: bytes, origin: Origin, target: bytes, headers: Headers, body: Content, timeouts: TimeoutsConfig
    ) -> Http1Response:
        """Send a request; see `Upstream`. Raises `InvalidRequestError` for what HTTP does not allow."""
        if not isinstance(body, bytes):
            body = list(body) if len(body) > 1 else bytes(body[0]) if body else b""
        length = len(body) if isinstance(body, bytes) else sum(map(len, body))
        if length <= SMALL and not isinstance(body, bytes):
            body = b"".join(body)
        head = request_head(method, origin.authority, target, headers, length)
        pool = self._pool(origin)
        connection: PooledConnection | None = pool.take()
        if connection is not None:
            try:
                return await connection.start(method, head, body, timeouts.read).head()
            except UpstreamFault as fault:
                if fault.sent:
                    raise
            except BaseException:
                connection.close()
                raise
        connection = await self._connect(origin, pool, timeouts.connect)
        try:
            return await connection.start(method, head, body, timeouts.read).head()
        except BaseException:
            connection.close()
            raise

    @property
    def idle(self) -> int:
        """How many connections are kept at present."""
        return sum(len(pool) for pool in self._pools.values())

    async def aclose(self) -> None:
        """Close the idle connections. What is on its way goes on."""
        closer, self._closer = self._closer, None
        if closer is not None:
            await closer.aclose()

    def _pool(self, origin: Origin) -> Pool:
        loop = running_loop()
        if loop is not self._loop:
            # A connection belongs to its event loop. An app that is used on a second one (a test client does that) starts anew.
            self._loop, self._pools, self._closer = loop, {}, None
        pool = self._pools.get(origin.url)
        if pool is None:
            pool = self._pools[origin.url] = Pool(self._keepalive, self._max_idle)
        return pool

    async def _connect(self, origin: Origin, pool: Pool, limit: float) -> PooledConnection:
        if self._closer is None:
            self._closer = _close_at_the_end(self._pools)
            await anext(self._closer)
        context = self._context() if origin.tls else None
        try:
            with anyio.move_on_after(limit):
                if isinstance(loop := self._loop, asyncio.AbstractEventLoop):
                    _, connection = await loop.create_connection(
                        partial(AsyncioConnection, loop, pool), origin.host, origin.port, ssl=context
                    )
                    return connection
                if context is None:
                    return StreamConnection(await anyio.connect_tcp(origin.host, origin.port), pool)
                stream = await anyio.connect_tcp(origin.host, origin.port, ssl_context=context, tls_standard_compatible=False)
                return StreamConnection(stream, pool)
        except OSError as exc:
            raise UpstreamFault(f"cannot be reached: {exc}.", sent=False) from exc
        raise UpstreamFault(f"did not accept a connection within {limit:.3g} s.", sent=False)

    def _context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = httpx.create_ssl_context(trust_env=False)
        return self._ssl_context


async def _close_at_the_end(pools: dict[str, Pool]) -> AsyncGenerator[None]:
    """Close the idle connections when this generator is: an event loop does that at its end, if nobody has called `aclose`.

    A mounted app whose lifespan the host does not enter has no other way to learn of it.
    """
    try:
        yield
    finally:
        for pool in pools.values():
            pool.close()
