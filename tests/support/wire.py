"""A server that speaks bytes, for what no HTTP server would send."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["Peer", "Script", "WireServer", "wire_server"]

LIMIT = 10.0
"""Seconds after which a test that waits has failed."""


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._received = b""

    def read_request(self) -> bytes:
        """Return one whole request, head and body; what there is of it if the client closes the connection before."""
        while b"\r\n\r\n" not in self._received and self._read():
            pass
        head, _, _ = self._received.partition(b"\r\n\r\n")
        length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"content-length: ")), 0)
        end = len(head) + 4 + length
        parts, size = [self._received], len(self._received)
        while size < end and (data := self.socket.recv(1 << 20)):
            parts.append(data)
            size += len(data)
        whole = b"".join(parts)
        request, self._received = whole[:end], whole[end:]
        return request

    def send(self, data: bytes, *, bytewise: bool = False) -> None:
        """Send it, at once or each byte in a packet of its own."""
        for piece in (data[i : i + 1] for i in range(len(data))) if bytewise else [data]:
            self.socket.sendall(piece)

    def client_left(self) -> None:
        """Return when the client has closed the connection."""
        with suppress(ConnectionError):
            while self.socket.recv(65536):
                pass

    def reset(self) -> None:
        """Close the connection as a process does that is killed with unread data: by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _read(self) -> bool:
        data = self.socket.recv(65536)
        self._received += data
        return bool(data)


Script = Callable[[Peer], None]


class WireServer:
    """Runs `script` for each connection, in a thread of its own; the connection is closed at its end."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        self.script: Script = lambda peer: None
        self.connections = 0
        self.requests: list[bytes] = []
        """What scripts put here."""
        self.url = f"http{'s' if context else ''}://localhost:{listener.getsockname()[1]}"
        self._listener = listener
        self._context = context
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def answer(self, *answers: bytes, bytewise: bool = False) -> None:
        """Answer one request after the other on a connection, then wait until the client closes it."""

        def script(peer: Peer) -> None:
            for answer in answers:
                self.requests.append(peer.read_request())
                peer.send(answer, bytewise=bytewise)
            peer.client_left()

        self.script = script

    def begin(self, script: Script | None = None) -> None:
        """Forget what was, and answer by another script."""
        self.connections = 0
        self.requests.clear()
        if script is not None:
            self.script = script

    def accept(self) -> None:
        """Serve until the listener is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._run, args=(connection, self.script), daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self) -> None:
        """Wait for the scripts, which must be at their ends."""
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a connection was left open"
        self._threads.clear()

    def _run(self, connection: socket.socket, script: Script) -> None:
        connection.settimeout(LIMIT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                script(Peer(connection))
        except (ConnectionError, ssl.SSLError):
            pass  # the client has closed it, or does not trust it: the test says whether it should
        except BaseException as exc:  # noqa: BLE001 - raised in the test's thread
            self.errors.append(exc)


@contextmanager
def wire_server(context: ssl.SSLContext | None = None) -> Iterator[WireServer]:
    """Serve on 127.0.0.1, over TLS with a `context`. Raises at the end what a script has raised."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = WireServer(listener, context)
        thread = threading.Thread(target=server.accept, daemon=True)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT)
    server.join()
    if server.errors:
        raise server.errors[0]
