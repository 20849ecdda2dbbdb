"""A server that records what it is sent byte for byte, and a client that sends what a test tells it to."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

__all__ = ["Answer", "Recorder", "Request", "opened", "post", "recording", "send_raw"]

LIMIT = 5.0
"""Seconds after which a socket that says nothing has failed the test."""
CONTROL = {
    "/version": b'{"version": "0.32.0"}',
    "/is_sleeping": b'{"is_sleeping": false}',
    "/openapi.json": b'{"paths": {"/sleep": {"post": {"parameters": []}}}}',
}
"""What an awake vLLM tells the gateway."""


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def is_own(self) -> bool:
        """Whether it is a control call of the gateway's own; the clients of these tests send no user agent."""
        return any(value.startswith("python-httpx/") for value in self.values("user-agent"))

    def values(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for each, value in self.headers if each.lower() == name]


@dataclass
class Recorder:
    """What a server was asked. `answer` makes the whole answer to an inference request, by default the request's body."""

    url: str
    requests: list[Request] = field(default_factory=list)
    answer: Callable[[Request], bytes] | None = None

    def reply(self, request: Request) -> bytes:
        """Note a request and return the bytes to answer it with."""
        self.requests.append(request)
        if self.answer is not None and not (request.method == "GET" and request.path in CONTROL):
            return self.answer(request)
        body = CONTROL.get(request.path, request.body) if request.method == "GET" else request.body
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@contextmanager
def recording() -> Iterator[Recorder]:
    """Run a recording server."""
    connections: set[socket.socket] = set()

    def serve(connection: socket.socket) -> None:
        data = b""
        with connection, suppress(OSError):
            while True:
                while b"\r\n\r\n" not in data:
                    if not (more := connection.recv(65536)):
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                method, _, target = first.removesuffix(" HTTP/1.1").partition(" ")
                headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
                length = int(next((value for name, value in headers if name.lower() == "content-length"), "0"))
                while len(data) < length:
                    data += connection.recv(65536)
                request, data = Request(method, target, headers, data[:length]), data[length:]
                connection.sendall(recorder.reply(request))

    def run() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.add(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        recorder = Recorder(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield recorder
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def opened(url: str, data: bytes = b"", *, window: int = 1 << 16) -> socket.socket:
    """Connect, and send the beginning of something. `window` is about how many bytes the client takes without reading."""
    address = urlsplit(url)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    client.settimeout(LIMIT)
    client.connect((address.hostname, address.port))
    client.sendall(data)
    return client


@dataclass(frozen=True)
class Answer:
    """All that came back on one connection until it was closed, or had been silent."""

    raw: bytes
    closed: bool

    @property
    def statuses(self) -> list[int]:
        """The status of each answer, interim ones left out."""
        return [int(each) for each in re.findall(rb"HTTP/1\.[01] ([2-5]\d\d)[ \r]", self.raw)]

    @property
    def head(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[0]

    @property
    def error(self) -> dict[str, str]:
        """The error object of the first answer."""
        found = re.search(rb'\{"error":\{.*?\}\}', self.raw)
        assert found is not None, self.raw[:500]
        error: dict[str, str] = msgspec.json.decode(found[0])["error"]
        return error


def send_raw(url: str, *parts: bytes, patience: float = LIMIT) -> Answer:
    """Send bytes and read until the server closes, or is silent for `patience` seconds."""
    address = urlsplit(url)
    received = b""
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=LIMIT) as client:
        with suppress(OSError):  # it may have answered and closed in the middle of what is sent
            for part in parts:
                client.sendall(part)
        client.settimeout(patience)
        try:
            while data := client.recv(65536):
                received += data
        except TimeoutError:
            return Answer(received, closed=False)
        except OSError:
            return Answer(received, closed=True)
    return Answer(received, closed=True)


def post(target: str | bytes, body: bytes = b'{"model": "a"}', *headers: bytes, method: bytes = b"POST") -> bytes:
    """Return the bytes of a request after which the server closes the connection."""
    path = target.encode("latin-1") if isinstance(target, str) else target
    lines = [b"host: gateway", b"connection: close", b"content-length: %d" % len(body), *headers]
    return method + b" " + path + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body
