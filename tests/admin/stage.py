"""An admin API over fake backends, without sockets: the models `a`, `b` (whose process is the gateway's own) and `org/c`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
from starlette.types import Message

from llmux_asgi import FifoPolicy, ModelSwitcher, load_config
from llmux_asgi.access import hash_key
from llmux_asgi.admin import AdminApp
from llmux_asgi.config import Config, ReloadReport
from tests.support.fakes import GPU, FakeBackend, StoppableFake

__all__ = ["CLIENT_KEY", "KEY", "LIMIT", "Answer", "Client", "Stage", "events_of"]

LIMIT = 10.0
"""Seconds after which a test that waits for something has failed."""
KEY = "llmux-admin-0123456789"
CLIENT_KEY = "llmux-client-0123456789"


class Client:
    """One request: what it sends, and what it has received."""

    def __init__(self, *chunks: bytes) -> None:
        parts = chunks or (b"",)
        self.incoming: list[Message] = [
            {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
        ]
        self.gone = anyio.Event()
        self.sent: list[Message] = []
        self.reads = anyio.Event()
        """Until it is set the first message is not taken, even if the sender is cancelled: hypercorn on trio is like that."""
        self.reads.set()
        self.news = anyio.Event()
        """Set by the next message that comes."""

    async def receive(self) -> Message:
        if self.incoming:
            return self.incoming.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent.append(message)
        self.news.set()
        self.news = anyio.Event()
        with anyio.CancelScope(shield=True):
            await self.reads.wait()

    @property
    def body(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.sent[1:])

    @property
    def ended(self) -> bool:
        """Whether the answer came to its end."""
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)

    async def until(self, condition: Callable[[bytes], bool]) -> None:
        """Wait until what has come is as expected."""
        with anyio.fail_after(LIMIT):
            while not condition(self.body):
                await self.news.wait()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The code of the error object."""
        return self.json["error"]["code"]


class Stage:
    """The gateway that the admin API belongs to."""

    policy_name = "fifo"

    def __init__(self, **config: Any) -> None:
        models = {
            "a": {"url": "http://10.1.2.3:8001", "aliases": ["gpt-4o"], "sleep_level": 2},
            "b": {"command": ["server", "--token", "swordfish", "{port}"]},
            "org/c": {"url": "http://10.1.2.3:8003"},
        }
        admin = {"keys": {"ops": {"hash": hash_key(KEY)}}, **config.pop("admin", {})}
        self.config: Config = load_config({"models": models, "admin": admin, **config})
        self.gpu = GPU()
        self.backends = {
            name: (StoppableFake if name == "b" else FakeBackend)(name, self.gpu, awake=name == "a") for name in models
        }
        self.switcher = ModelSwitcher(
            self.backends, FifoPolicy(min_active_duration=0), aliases=self.config.aliases, backoff=(30.0, 30.0)
        )
        assert self.config.admin is not None
        self.admin = AdminApp(self, self.config.admin)

    def is_client_key(self, key: str) -> bool:
        return key == CLIENT_KEY

    async def reload(self) -> ReloadReport:
        """There is no file here to read anew; `test_reload.py` has one."""
        return ReloadReport()

    def scope(self, method: str, path: str, query: str = "", **headers: str) -> Message:
        pairs = {"authorization": f"Bearer {KEY}", **headers}
        return {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": "/llm/admin" + path,
            "raw_path": ("/llm/admin" + path).encode(),
            "root_path": "/llm",
            "query_string": query.encode(),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs.items() if value],
        }

    async def ask(self, method: str, path: str, query: str = "", *chunks: bytes, **headers: str) -> Answer:
        """Send a request and return its answer. `authorization=""` sends no key."""
        client = Client(*chunks)
        with anyio.fail_after(LIMIT):
            await self.admin(self.scope(method, path, query, **headers), client.receive, client.send)
        start = client.sent[0]
        return Answer(start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, client.body)

    @asynccontextmanager
    async def connected(self, method: str, path: str, query: str = "", **headers: str) -> AsyncIterator[Client]:
        """A request that goes on while the block does. At its end the client leaves."""
        client = Client()
        with anyio.fail_after(2 * LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.admin, self.scope(method, path, query, **headers), client.receive, client.send)
                yield client
                client.gone.set()


def events_of(body: bytes) -> list[tuple[str | None, str, Any]]:
    """The events of a stream: id, kind, data."""
    found = []
    for block in body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("id"), fields.get("event", "message"), json.loads(fields["data"])))
    return found
