"""What the page is looked at over: a gateway as `llmux-asgi serve` runs it, simulated vLLM servers, traffic, a proxy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tests.support.serve import free_port, serve

__all__ = ["KEY", "MANAGED", "Gateway", "Proxy", "admin", "journal", "proxied", "simulated", "traffic"]

KEY = "llmux-admin-0123456789"
_COMMAND = [sys.executable, "-c", "from llmux_asgi.cli import main; main()"]
MANAGED = [*_COMMAND, "sim-vllm", "--name", "managed", "--port", "{port}"]
"""The command of a server that the gateway starts and ends."""


@dataclass
class Gateway:
    """`llmux-asgi serve`, on a port that it keeps when it is started again."""

    folder: Path
    models: dict[str, dict[str, Any]]
    prefix: str = ""
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "fifo", "min_active_duration": 0.2, "request_timeout": 30})
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where its API and its admin API are mounted."""
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def write(self) -> Path:
        """Write the configuration, for the next start or a reload."""
        config = {
            "models": self.models,
            "policy": self.policy,
            "admin": {"keys": {"tests": {"env": "UI_TEST_KEY"}}},
            "limits": {"shutdown": 1, "health_interval": 1},
        }
        path = self.folder / "llmux.json"
        path.write_text(json.dumps(config))
        return path

    def start(self) -> None:
        """Start it and wait until it listens."""
        options = ["--port", str(self.port), *(["--prefix", self.prefix] if self.prefix else []), "--log-level", "warning"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_COMMAND, "serve", str(self.write()), *options],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "UI_TEST_KEY": KEY},
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline(), (self.folder / "log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it. A stopped one is left alone."""
        if self.process is None:
            return
        self.process.send_signal(number)
        self.process.communicate(timeout=30)
        self.process = None

    @contextmanager
    def running(self) -> Iterator[Gateway]:
        """Run it as long as the block."""
        self.start()
        try:
            yield self
        finally:
            self.stop()


def admin(gateway: Gateway, method: str, path: str) -> Any:
    """Make a call to the admin API."""
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(timeout=30, trust_env=False) as client:
        answer = client.request(method, f"{gateway.url}/admin/api/{path}", headers=headers)
        return answer.raise_for_status().json()


def journal(gateway: Gateway) -> list[tuple[str, dict[str, Any]]]:
    """All entries that the gateway keeps so far."""
    entries: list[tuple[str, dict[str, Any]]] = []
    last: int = admin(gateway, "GET", "status")["last_event"]
    headers = {"authorization": f"Bearer {KEY}"}
    number, kind = 0, ""
    with (
        httpx.Client(timeout=30, trust_env=False) as client,
        client.stream("GET", f"{gateway.url}/admin/api/events", headers=headers) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("id:"):
                number = int(line.rpartition("-")[2])
            elif line.startswith("event:"):
                kind = line[6:].strip()
            elif line.startswith("data:") and kind != "status":
                entries.append((kind, json.loads(line[5:])))
            if not line and number >= last:
                return entries
    raise AssertionError("the stream has ended")


@contextmanager
def traffic(gateway: Gateway, *models: str) -> Iterator[None]:
    """Ask each model again and again, one request at a time. A gateway that is away for a while is asked again too."""
    over = threading.Event()

    def ask(model: str) -> None:
        body = {"model": model, "prompt": "one two three", "max_tokens": 12}
        with httpx.Client(base_url=gateway.url, timeout=60, trust_env=False) as client:
            while not over.is_set():
                try:
                    client.post("/v1/completions", json=body)
                except httpx.TransportError:
                    over.wait(0.05)

    threads = [threading.Thread(target=ask, args=(model,), daemon=True) for model in models]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


class Proxy:
    """An ASGI app that passes on what comes below `prefix`, without the prefix, as it comes."""

    def __init__(self, target: str, prefix: str) -> None:
        self._target = target
        self._prefix = prefix
        self.last_event_ids: list[str | None] = []
        """What the event streams so far have asked for."""
        self._dropped = 0
        self._client = httpx.AsyncClient(timeout=60, trust_env=False)
        methods = ["GET", "HEAD", "POST", "DELETE"]
        self.app = Starlette(routes=[Route(f"{prefix}/{{path:path}}", self._relay, methods=methods)], lifespan=self._lifespan)

    def drop(self) -> None:
        """Have the streams that run end with their next chunk."""
        self._dropped += 1

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self._client.aclose()

    async def _relay(self, request: Request) -> Response:
        unwanted = {"host", "connection", "content-length"}
        headers = {name: value for name, value in request.headers.items() if name not in unwanted}
        if request.url.path.endswith("/events"):
            self.last_event_ids.append(headers.get("last-event-id"))
        url = self._target + request.scope["raw_path"].decode().removeprefix(self._prefix)
        asked = self._client.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await self._client.send(asked, stream=True)
        passed = {name: value for name, value in answer.headers.items() if name not in {"transfer-encoding", "connection"}}
        return StreamingResponse(self._body(answer), answer.status_code, passed)

    async def _body(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        dropped = self._dropped
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
                if self._dropped != dropped:
                    return
        finally:
            await answer.aclose()


@contextmanager
def proxied(gateway: Gateway, prefix: str) -> Iterator[tuple[str, Proxy]]:
    """Put a proxy before it and yield the gateway's URL there."""
    proxy = Proxy(gateway.url, prefix)
    with ExitStack() as stack:
        url = stack.enter_context(serve(proxy.app))
        yield url + prefix, proxy


def simulated(names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Models by name with the URLs of their servers."""
    return {name: {"url": url, "served_name": "sim"} for name, url in names.items()}
