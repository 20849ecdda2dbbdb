"""A gateway as a process of its own: `python -m tests.support.host CONFIG.json LOOP [--ledger PATH]`.

The app is mounted at `/llm` with its lifespan, served by uvicorn on asyncio and by hypercorn on trio, on a free port of
127.0.0.1. `ready http://…` on standard output says that it listens. `GET /statistics` answers `ModelSwitcher.statistics()`.
SIGTERM ends it in order, with exit status 0. With `--ledger` the memory of that simulated GPU is checked after each sleep.
`tests.support.gateway_process` starts it.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import anyio
import hypercorn.config
import hypercorn.trio
import msgspec
import trio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import GpuLedger

__all__ = ["build"]

GRACE = 3
"""Seconds that connections have to end in when the host stops; the gateway's lifespan ends after that."""


def build(llm: LLMuxApp) -> Starlette:
    """The host app."""

    async def statistics(request: Request) -> Response:
        seen = llm.switcher.statistics()
        fields = {field: getattr(seen, field) for field in seen.__slots__}
        answer = {field: dict(value) if isinstance(value, Mapping) else value for field, value in fields.items()}
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return Starlette(routes=[Route("/statistics", statistics), Mount("/llm", llm)], lifespan=llm.lifespan)


def say_ready(url: str) -> None:
    sys.stdout.write(f"ready {url}\n")
    sys.stdout.flush()


async def until_told_to_stop() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            return


class Server(uvicorn.Server):
    """Says where it listens once it does. Signals are not its business: uvicorn would end the process by the same signal."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say_ready(self._url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve_on_asyncio(app: Starlette) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=GRACE)
        server = Server(config, f"http://127.0.0.1:{listener.getsockname()[1]}")

        async def stop_when_told() -> None:
            await until_told_to_stop()
            server.should_exit = True

        async def run() -> None:
            stopper = asyncio.create_task(stop_when_told())
            await server.serve([listener])
            stopper.cancel()

        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(run())


def serve_on_trio(app: Starlette) -> None:
    config = hypercorn.config.Config()
    config.bind = ["127.0.0.1:0"]
    config.graceful_timeout = GRACE
    config.shutdown_timeout = 60  # of the lifespan

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            serve = functools.partial(hypercorn.trio.serve, app, config, shutdown_trigger=until_told_to_stop)  # type: ignore[arg-type]
            urls: list[str] = await nursery.start(serve)
            say_ready(urls[0])

    trio.run(run)


def main() -> None:
    parser = argparse.ArgumentParser(description="A gateway, for tests.")
    parser.add_argument("config", help="the gateway's configuration as JSON")
    parser.add_argument("loop", choices=["asyncio", "trio"])
    parser.add_argument("--ledger", help="the simulated GPU whose memory is checked after each sleep")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(levelname)s %(message)s")
    for noisy in ("httpx", "uvicorn.error", "hypercorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with open(arguments.config, "rb") as file:  # noqa: PTH123
        config = json.load(file)
    app = build(LLMuxApp(config, memory=GpuLedger(arguments.ledger) if arguments.ledger else None))
    serve = serve_on_asyncio if arguments.loop == "asyncio" else serve_on_trio
    serve(app)


if __name__ == "__main__":
    main()
