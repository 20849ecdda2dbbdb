"""Clients' libraries read streams that began while their model was asleep, whatever they are told meanwhile."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmux_asgi import LLMuxApp
from llmux_asgi.sim import SimOptions, start_sims
from tests.support.serve import serve

from .conftest import ARGUMENTS, MODELS, SCHEMA, said

openai: Any = importlib.import_module("openai")

_USER: Any = [{"role": "user", "content": "hello"}]
_WAKE = 0.4
"""Seconds that a model takes to wake: some heartbeats."""
_NOTICE = b'"waited":'


class Wire:
    """The host around the gateway: counts the notices that leave it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.url = ""
        self.notices = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            self.notices += _NOTICE in message.get("body", b"")
            await send(message)

        await self.app(scope, receive, counting)


@pytest.fixture(scope="module")
def served() -> Iterator[Wire]:
    options = [SimOptions(name=name, start_asleep=1, tokens_per_second=2000, wake_seconds=_WAKE) for name in MODELS]
    with ExitStack() as stack:
        models = {server.name: {"url": server.url} for server in stack.enter_context(start_sims(*options))}
        policy = {"name": "fifo", "min_active_duration": 0, "request_timeout": 20}
        notice = {"loading_notice": "events", "limits": {"heartbeat": _WAKE / 8}}
        llm = LLMuxApp({"models": models, "policy": policy, **notice})
        wire = Wire(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan))
        wire.url = stack.enter_context(serve(wire)) + "/llm"
        yield wire


@pytest.fixture
def url(served: Wire) -> Iterator[str]:
    """Where the gateway is. A test proves nothing unless its client has been told something."""
    before = served.notices
    yield served.url
    assert served.notices >= before + len(MODELS)


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_chats(client: Any) -> None:
    for name in MODELS:
        chunks = client.chat.completions.create(model=name, messages=_USER, max_tokens=20, stream=True)
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == said(name, "hello", 20)


def test_chats_put_together_by_the_library(client: Any) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    for name in MODELS:
        wanted: dict[str, Any] = {"model": name, "messages": _USER, "tools": [tool], "tool_choice": "required"}
        with client.chat.completions.stream(**wanted) as stream:
            (call,) = stream.get_final_completion().choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == ARGUMENTS


def test_completions(client: Any) -> None:
    for name in MODELS:
        chunks = client.completions.create(model=name, prompt="once", max_tokens=5, stream=True)
        assert sum(bool(chunk.choices[0].text) for chunk in chunks) == 5


def test_responses(client: Any) -> None:
    for name in MODELS:
        with client.responses.stream(model=name, input="hello", max_output_tokens=20) as stream:
            kinds = [event.type for event in stream]
        assert (kinds[0], kinds[-1], kinds.count("response.output_text.delta")) == (
            "response.created",
            "response.completed",
            20,
        )


def test_errors_have_the_librarys_class(client: Any) -> None:
    for name in MODELS:
        with pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(model=name, messages=_USER, max_tokens=0, stream=True))
        assert "max_tokens" in caught.value.message


@pytest.mark.slow
def test_messages(url: str) -> None:
    anthropic: Any = importlib.import_module("anthropic")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
        for name in MODELS:
            with client.messages.stream(model=name, messages=_USER, max_tokens=20) as stream:
                assert "".join(stream.text_stream) == said(name, "hello", 20)
        stream = client.messages.create(model=MODELS[0], messages=_USER, max_tokens=0, stream=True)
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(stream)
        assert caught.value.body["type"] == "error"
