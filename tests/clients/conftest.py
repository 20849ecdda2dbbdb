"""A gateway over two simulated servers, and what their models say: clients' libraries are to see no difference.

The libraries are imported by the tests that use them, not when tests are collected: some take seconds.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimOptions, SimProcess, start_sims
from llmux_asgi.sim.text import TOKENS, sample
from tests.support.serve import serve

MODELS = ("alpha", "beta")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"], "type": "string"}},
    "required": ["city", "unit"],
}
ARGUMENTS = {"city": "the quick brown fox", "unit": "c"}


def said(model: str, prompt: str, tokens: int) -> str:
    """What the model says to a user who says `prompt`, told without asking it."""
    return "".join(TOKENS[each] for each in sample(model, f"user: {prompt}\n", tokens))


@dataclass(frozen=True)
class Gateway:
    """A served gateway. `url` ends without a slash and without `/v1`."""

    url: str
    servers: dict[str, SimProcess]

    @property
    def v1(self) -> str:
        return self.url + "/v1"

    def wakes(self) -> int:
        return sum(server.state().wakes for server in self.servers.values())


@pytest.fixture(scope="session")
def served() -> Iterator[Gateway]:
    options = [SimOptions(name=name, start_asleep=index, tokens_per_second=2000) for index, name in enumerate(MODELS)]
    with ExitStack() as stack:
        servers = {server.name: server for server in stack.enter_context(start_sims(*options))}
        models = {name: {"url": server.url} for name, server in servers.items()}
        llm = LLMuxApp({"models": models, "policy": {"name": "fifo", "min_active_duration": 0}})
        url = stack.enter_context(serve(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan)))
        yield Gateway(url + "/llm", servers)


@pytest.fixture
def gateway(served: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """The gateway, for a test that makes it switch at least once and a library that talks to nobody else."""
    asked: list[object] = []
    resolve = socket.getaddrinfo

    def only_here(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1"):
            asked.append(host)
            raise OSError(f"a client wants to talk to {host!r}")
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    before = served.wakes()
    yield served
    assert not asked
    assert served.wakes() > before
    assert not any(server.state().requests_while_asleep for server in served.servers.values())
