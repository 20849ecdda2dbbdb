"""`llmux-asgi serve`: the gateway by itself, under uvicorn."""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import anyio
import msgspec
import typer
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from ..app import LLMuxApp
from ..exceptions import ConfigError, LLMuxError
from ..serving import GatheringProtocol, tune_garbage_collection
from ._app import FAILED, SETUP, UNUSABLE, app, fail
from ._tracing import tracer_provider

__all__ = ["Server", "ready_line", "serve"]

logger = logging.getLogger(__name__)

_MARGIN = 5.0
"""Seconds that connections have beyond `limits.shutdown`: for the errors that aborted requests end with."""


class LogLevel(enum.StrEnum):
    """How much is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command(rich_help_panel=SETUP)
def serve(
    config: Annotated[Path, typer.Argument(help="The configuration: YAML, TOML or JSON.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 or :: for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    prefix: Annotated[str, typer.Option(help="Path to mount the gateway at, such as /llm.")] = "",
    root_path: Annotated[str, typer.Option(help="Prefix that a proxy in front strips.")] = "",
    log_level: Annotated[LogLevel, typer.Option(help="How much is logged, to standard error.")] = LogLevel.INFO,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log a line for each HTTP request.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Say in a line of JSON where it listens: models, url, admin.")] = False,
) -> None:
    """Run the gateway. Says in one line where it listens. SIGTERM and SIGINT end it in order; SIGHUP reloads the configuration.

    With OTEL_EXPORTER_OTLP_ENDPOINT set, and the extra otlp, its spans are sent there.

    Exit status: 0 ended by a signal; 1 the port is taken, or a server cannot do what the configuration asks for; 2 the
    configuration cannot be used.
    """
    prefix = prefix.rstrip("/")
    if prefix and not prefix.startswith("/"):
        fail(f"serve: --prefix {prefix}: it begins with a slash", UNUSABLE)
    _set_up_logging(log_level)
    try:
        gateway = LLMuxApp(config, tracer_provider=tracer_provider())
    except ConfigError as error:
        fail(f"serve: {error}", UNUSABLE)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        mend = ": choose another --port, or end what listens there" if error.errno == errno.EADDRINUSE else ""
        fail(f"serve: cannot listen on {host} port {port}: {error.strerror or error}{mend}", FAILED)
    with listener:
        address = f"http://[{host}]" if ":" in host else f"http://{host}"
        root = f"{address}:{listener.getsockname()[1]}{prefix}"
        admin = None if gateway.config.admin is None else root + gateway.config.admin.prefix
        if admin is not None:
            logger.info("the admin page is at %s/", admin)
        ready = ready_line(gateway.config.models, root, admin, as_json=json)
        settings = uvicorn.Config(
            Starlette(routes=[Mount(prefix, gateway)]) if prefix else gateway,
            lifespan="off",  # the server enters the gateway's own
            http=GatheringProtocol,
            ws="wsproto",
            log_config=None,
            access_log=access_log,
            root_path=root_path.rstrip("/"),
            timeout_graceful_shutdown=int(gateway.config.limits.shutdown + _MARGIN),
        )
        tune_garbage_collection()
        try:
            Server(settings, gateway, ready).run([listener])
        except LLMuxError as error:
            fail(f"serve: {error}", FAILED)


def ready_line(models: Iterable[str], root: str, admin: str | None, *, as_json: bool = False) -> str:
    """What is printed when the gateway listens at `root`. The URL is the last word."""
    if as_json:
        return msgspec.json.encode({"models": list(models), "url": f"{root}/v1", "admin": admin}).decode()
    return f"llmux-asgi serves {', '.join(models)} at {root}/v1"


class Server(uvicorn.Server):
    """Keeps to the gateway's lifespan: a server that cannot be used ends the command, and not a log full of it."""

    def __init__(self, config: uvicorn.Config, gateway: LLMuxApp, ready: str) -> None:
        super().__init__(config)
        self._gateway, self._ready = gateway, ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        with self.told_to_stop():
            async with self._gateway.lifespan():
                with self.told_to_reload():
                    await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sys.stdout.write(self._ready + "\n")
        with suppress(BrokenPipeError):  # nobody reads it
            sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn waits for the connections, and those for the gateway: it has to know that it is over.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(super().shutdown, sockets)
            await self._gateway.aclose()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: uvicorn would end the process by the one that it has caught."""
        yield

    @contextmanager
    def told_to_stop(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT for the wish to stop."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self.should_exit:  # told twice: at once. What the gateway has started ends all the same.
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def told_to_reload(self) -> Iterator[None]:
        """Take SIGHUP, where there is one, for the wish to read the configuration anew."""
        if (number := getattr(signal, "SIGHUP", None)) is None:
            yield
            return
        loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

        def reload() -> None:
            task = loop.create_task(self.reload())
            tasks.add(task)  # asyncio keeps only weak references
            task.add_done_callback(tasks.discard)

        loop.add_signal_handler(number, reload)
        try:
            yield
        finally:
            loop.remove_signal_handler(number)
            for task in tasks:
                task.cancel()

    async def reload(self) -> None:
        """Read the configuration anew; one that cannot be used is logged, and nothing changes."""
        try:
            await self._gateway.reload()
        except LLMuxError as error:
            logger.error("the configuration was not read anew, that of before stays valid: %s", error)
        else:
            self.config.timeout_graceful_shutdown = int(self._gateway.config.limits.shutdown + _MARGIN)


def _set_up_logging(level: LogLevel) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if level is not LogLevel.DEBUG:
        for noisy in ("httpx", "httpcore", "uvicorn.error"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
