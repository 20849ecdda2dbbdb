"""Serve an ASGI app over real sockets in a thread: with uvicorn on asyncio, with hypercorn on trio."""

from __future__ import annotations

import functools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import hypercorn.config
import hypercorn.trio
import trio
import uvicorn

__all__ = ["EventLoop", "free_port", "serve"]

EventLoop = Literal["asyncio", "trio"]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serve(app: Any, loop: EventLoop = "asyncio", *, port: int = 0) -> Iterator[str]:
    """Serve `app` and yield its URL; stop the server at the end. Raises what the server's thread raised.

    `port` is for asyncio only; 0 is a free one.
    """
    with _serve_asyncio(app, port) if loop == "asyncio" else _serve_trio(app) as url:
        yield url


@contextmanager
def _serve_asyncio(app: Any, port: int) -> Iterator[str]:
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    listener = socket.create_server(("127.0.0.1", port), backlog=2048)
    config = uvicorn.Config(app, log_level="error", lifespan="auto", timeout_graceful_shutdown=3, ws="wsproto")
    server = Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        assert started.wait(10), "uvicorn did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
    assert not thread.is_alive(), "uvicorn did not stop"


@contextmanager
def _serve_trio(app: Any) -> Iterator[str]:
    port = free_port()
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.graceful_timeout = 3
    config.backlog = 2048
    config.errorlog = None
    box: dict[str, Any] = {}
    started, stopped = threading.Event(), threading.Event()

    async def main() -> None:
        box["token"], box["stop"] = trio.lowlevel.current_trio_token(), trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(functools.partial(hypercorn.trio.serve, app, config, shutdown_trigger=box["stop"].wait))
            started.set()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as exc:  # noqa: BLE001 - handed to the test's thread
            box["error"] = exc
        finally:
            started.set()
            stopped.set()

    threading.Thread(target=run, daemon=True).start()
    assert started.wait(10), "hypercorn did not start"
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        if "error" not in box:
            trio.from_thread.run_sync(box["stop"].set, trio_token=box["token"])
        assert stopped.wait(10), "hypercorn did not stop"
        if "error" in box:
            raise box["error"]
