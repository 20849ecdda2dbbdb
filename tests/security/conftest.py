"""Two gateways a loop, shared by all these tests: one with the default limits, one with tight ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from llmux_asgi import LLMuxApp
from tests.security.wire import Answer, Recorder, Request, post, recording, send_raw
from tests.support.eventually import eventually, is_at_rest
from tests.support.serve import EventLoop, serve

CHAT = "/llm/v1/chat/completions"
MOUNTS = ("", "/llm", "/outer/inner", "/rooted")
"""Where the gateway is found: at the root, mounted, mounted twice, and below a `root_path` as from `uvicorn --root-path`."""

# Written down here, and not taken from the code: what a server may be asked for by a client.
_ROUTES = (
    r"/v1/chat/completions|/v1/completions|/v1/embeddings|/v1/responses(/[\w-]+(/cancel)?)?|/v1/messages(/count_tokens)?"
    r"|/(v1/|v2/)?rerank|/(v1/)?score|/pooling|/classify|/tokenize|/detokenize"
    r"|/v1/audio/(transcriptions|translations|speech)|/v1/images/(generations|edits|variations)"
)
ALLOWED = re.compile(rf"({_ROUTES})(\?[!-~]*)?")


@dataclass
class Fortress:
    """A served gateway and the one server behind it."""

    app: LLMuxApp
    url: str
    server: Recorder
    config: dict[str, Any] = field(default_factory=dict)

    def send(self, *parts: bytes, patience: float = 5.0) -> Answer:
        """Send bytes to the gateway."""
        return send_raw(self.url, *parts, patience=patience)

    def post(self, body: bytes = b'{"model": "a"}', *headers: bytes, target: str = CHAT) -> Answer:
        """Send a request to the gateway."""
        return self.send(post(target, body, *headers))

    @property
    def asked(self) -> list[Request]:
        """What the server was asked since the test began, for a client."""
        return [each for each in self.server.requests if not each.is_own]

    def is_closed(self) -> None:
        """The server was asked for nothing but inference, and nothing is left over in the gateway."""
        assert [each.target for each in self.asked if not ALLOWED.fullmatch(each.target)] == []
        eventually("every count is back to zero", lambda: is_at_rest(self.app))
        eventually("no body is held", lambda: self.app._inference.intake.held == 0)


@contextmanager
def fortress(loop: EventLoop, **config: Any) -> Iterator[Fortress]:
    """Serve a gateway for the model `a` at all of `MOUNTS`."""
    with ExitStack() as stack:
        server = stack.enter_context(recording())
        limits = {"health_interval": None, **config.pop("limits", {})}
        llm = LLMuxApp({"models": {"a": {"url": server.url}}, "limits": limits, **config})
        inner = Starlette(routes=[Mount("/inner", llm)])
        host = Starlette(routes=[Mount("/llm", llm), Mount("/outer", inner), Mount("/", llm)], lifespan=llm.lifespan)

        async def rooted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"].startswith("/rooted"):
                await llm({**scope, "root_path": "/rooted"}, receive, send)
            else:
                await host(scope, receive, send)

        running = Fortress(llm, stack.enter_context(serve(rooted, loop)), server)
        assert httpx.post(running.url + CHAT, json={"model": "a"}).status_code == 200  # from here on all is known
        yield running


@pytest.fixture(params=["asyncio", "trio"], scope="session")
def loop(request: pytest.FixtureRequest) -> EventLoop:
    """The event loop, and with it the server: uvicorn on asyncio, hypercorn on trio."""
    value: EventLoop = request.param
    return value


@pytest.fixture(scope="session")
def shared(loop: EventLoop) -> Iterator[Fortress]:
    with fortress(loop) as running:
        yield running


@pytest.fixture(scope="session")
def shared_tight(loop: EventLoop) -> Iterator[Fortress]:
    limits = {"max_body": 200_000, "max_headers": 4096, "body_timeout": 0.4, "write_timeout": 0.4}
    with fortress(loop, limits=limits) as running:
        yield running


@contextmanager
def _as_new(running: Fortress) -> Iterator[Fortress]:
    running.server.answer = None
    running.server.requests.clear()
    yield running
    running.server.answer = None
    running.is_closed()


@pytest.fixture
def gateway(shared: Fortress) -> Iterator[Fortress]:
    """The gateway with the default limits. At the end of the test its server must not have been asked for anything else."""
    with _as_new(shared) as running:
        yield running


@pytest.fixture
def tight(shared_tight: Fortress) -> Iterator[Fortress]:
    """The gateway with tight limits."""
    with _as_new(shared_tight) as running:
        yield running
