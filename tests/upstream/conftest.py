"""Clients for the relay on each event loop, and a server of bytes."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from llmux_asgi import Http1Upstream, HttpxUpstream, Origin, TimeoutsConfig, Upstream, UpstreamResponse
from llmux_asgi.upstream import Content
from tests.support.wire import WireServer, wire_server

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
    "httpx": ("asyncio", {}),
    "httpx-trio": ("trio", {}),
}


@dataclass
class Client:
    """A client and the server that it talks to."""

    upstream: Upstream
    server: WireServer
    origin: Origin
    timeouts: TimeoutsConfig

    async def send(self, method: bytes = b"POST", target: bytes = b"/v1/x?q=%2F", body: Content = b"{}") -> UpstreamResponse:
        """Send a request."""
        return await self.upstream.request(method, self.origin, target, [(b"x-a", b"1")], body, self.timeouts)

    async def read(self, method: bytes = b"POST", body: Content = b"{}") -> tuple[int, bytes]:
        """Send a request and return the status and body of its answer."""
        response = await self.send(method, body=body)
        try:
            return response.status, b"".join([chunk async for chunk in response])
        finally:
            await response.aclose()


@pytest.fixture(params=list(BACKENDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Which client."""
    return str(request.param)


@pytest.fixture
def anyio_backend(kind: str) -> tuple[str, dict[str, Any]]:
    """The event loop that the client runs on."""
    return BACKENDS[kind]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[WireServer]:
    """One for all tests of a module."""
    with wire_server() as server:
        yield server


@pytest.fixture
def server(shared_server: WireServer) -> Iterator[WireServer]:
    """The server; at the end of the test all its connections must have been closed."""
    shared_server.begin()
    yield shared_server
    shared_server.join()
    errors, shared_server.errors = shared_server.errors, []
    if errors:
        raise errors[0]


@pytest.fixture
async def client(kind: str, server: WireServer) -> AsyncIterator[Client]:
    """The client, with time limits that no test waits for."""
    upstream: Upstream = HttpxUpstream() if kind.startswith("httpx") else Http1Upstream()
    yield Client(upstream, server, Origin(server.url), TimeoutsConfig(connect=10, read=10))
    await upstream.aclose()


async def until(event: threading.Event) -> None:
    """Wait for an event of a server's thread."""
    assert await anyio.to_thread.run_sync(event.wait, 10), "never happened"
