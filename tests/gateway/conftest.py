"""A gateway over scripted servers, on both event loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp
from tests.support.serve import EventLoop, serve
from tests.support.upstream import ScriptedServer


@dataclass
class Gateway:
    """A served gateway: `a` and `b` answer for the models of the same names."""

    app: LLMuxApp
    client: httpx.Client
    url: str
    a: ScriptedServer
    b: ScriptedServer

    def chat(self, model: str = "a", **options: Any) -> httpx.Response:
        """Send a chat request."""
        body = {"model": model, "messages": [], **options}
        return self.client.post("/v1/chat/completions", json=body)


@contextmanager
def gateway(loop: EventLoop, servers: tuple[ScriptedServer, ScriptedServer] | None = None, **config: Any) -> Iterator[Gateway]:
    """Serve a gateway at /llm. `config` goes into the configuration; `a` and `b` add to the models."""
    with ExitStack() as stack:
        a, b = servers or (ScriptedServer(), ScriptedServer(asleep=True))
        models = {
            "a": {"url": stack.enter_context(serve(a)), **config.pop("a", {})},
            "b": {"url": stack.enter_context(serve(b)), **config.pop("b", {})},
        }
        policy = {"name": "fifo", "min_active_duration": 0, **config.pop("policy", {})}
        llm = LLMuxApp({"models": models, "policy": policy, **config})
        host = Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan)
        url = stack.enter_context(serve(host, loop)) + "/llm"
        client = stack.enter_context(httpx.Client(base_url=url, timeout=10))
        yield Gateway(llm, client, url, a, b)


@pytest.fixture(params=["asyncio", "trio"], scope="module")
def loop(request: pytest.FixtureRequest) -> EventLoop:
    """The event loop that the gateway runs on."""
    value: EventLoop = request.param
    return value


@pytest.fixture(scope="module")
def shared(loop: EventLoop) -> Iterator[Gateway]:
    """A gateway with the default configuration, but for a policy that switches at once; starting one costs 0.5 s."""
    with gateway(loop) as running:
        yield running


@pytest.fixture
def served(shared: Gateway) -> Gateway:
    """The shared gateway as if it were new: `a` awake, `b` asleep, nothing known of either."""
    for server, asleep in ((shared.a, False), (shared.b, True)):
        server.script = None
        server.asleep = asleep
        server.requests.clear()
        server.controls.clear()
    shared.app.switcher.distrust()
    return shared
