"""A server that answers what the test tells it to, byte for byte. Its control routes are those of an awake vLLM."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

__all__ = ["Exchange", "ScriptedServer", "closing_server", "wait_for"]

Send = Callable[[dict[str, Any]], Awaitable[None]]
Script = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request that reached the server, and the means to answer it."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    send: Send
    receive: Callable[[], Awaitable[dict[str, Any]]]

    async def start(self, content_type: str = "text/event-stream", status: int = 200, *more: tuple[bytes, bytes]) -> None:
        """Send status and headers."""
        headers = [(b"content-type", content_type.encode()), *more]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def chunk(self, data: bytes, *, last: bool = False) -> None:
        """Send a part of the body."""
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})

    async def client_left(self) -> None:
        """Return when the client has closed the connection."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


@dataclass
class ScriptedServer:
    """The ASGI app. `script` answers inference requests; they are kept in `requests`."""

    script: Script | None = None
    asleep: bool = False
    wake_gate: threading.Event | None = None
    """What a wake waits for, if it is there."""
    requests: list[Exchange] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    control_headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    version: str = "0.32.0"
    openapi: bytes = b'{"paths":{"/sleep":{"post":{"parameters":[{"name":"mode","schema":{"enum":["abort","keep"]}}]}}}}'

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path in ("/version", "/is_sleeping", "/sleep", "/wake_up"):
            self.controls.append(path)
            self.control_headers.append(scope["headers"])
            if path == "/wake_up" and self.wake_gate is not None:
                await wait_for(self.wake_gate)
            self.asleep = {"/sleep": True, "/wake_up": False}.get(path, self.asleep)
            answer = {"version": self.version, "is_sleeping": self.asleep}
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": msgspec.json.encode(answer)})
            return
        if path == "/openapi.json":
            await send({"type": "http.response.start", "status": 200 if self.openapi else 404, "headers": []})
            await send({"type": "http.response.body", "body": self.openapi})
            return
        exchange = Exchange(scope["method"], path, scope["query_string"], scope["headers"], body, send, receive)
        self.requests.append(exchange)
        if self.script is not None:
            await self.script(exchange)


async def wait_for(event: threading.Event, limit: float = 5.0) -> None:
    """Wait in a server's event loop for an event that the test sets in its own thread."""
    assert await asyncio.to_thread(event.wait, limit), "the test did not set the event"


@contextmanager
def closing_server(answer: bytes, hold: Callable[[], None] = lambda: None) -> Iterator[tuple[str, list[bytes]]]:
    """A server that reads a request, calls `hold`, sends `answer`, and closes the connection when more comes.

    That is what a kept connection may turn out to be: closed in the moment in which the next request is sent. It closes at
    once if `answer` is empty. Keeps the requests.
    """
    requests: list[bytes] = []

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                request = b""
                while not request.endswith(b"}"):
                    request += connection.recv(65536)
                requests.append(request)
                hold()
                connection.sendall(answer)
                if answer:
                    connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
