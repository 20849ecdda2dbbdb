"""Anthropic's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import ARGUMENTS, MODELS, SCHEMA, Gateway, said

pytestmark = pytest.mark.slow

_USER: Any = [{"role": "user", "content": "hello"}]
_TOOLS: dict[str, Any] = {"tools": [{"name": "weather", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Any]:
    import anthropic

    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_messages(client: Any) -> None:
    for name in (*MODELS, *MODELS):
        answer = client.messages.create(model=name, messages=_USER, max_tokens=9)
        assert answer.content[0].text == said(name, "hello", 9)
        assert (answer.model, answer.stop_reason, answer.usage.output_tokens) == (name, "max_tokens", 9)


def test_messages_streamed(client: Any) -> None:
    for name in MODELS:
        with client.messages.stream(model=name, messages=_USER, max_tokens=30) as stream:
            assert "".join(stream.text_stream) == said(name, "hello", 30)
            final = stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 30)


def test_tools(client: Any) -> None:
    for name in MODELS:
        wanted: dict[str, Any] = {"model": name, "messages": _USER, "max_tokens": 100, **_TOOLS}
        answer = client.messages.create(**wanted)
        with client.messages.stream(**wanted) as stream:
            streamed = stream.get_final_message()
        for each in (answer, streamed):
            (call,) = each.content
            assert (call.type, call.name, call.input, each.stop_reason) == ("tool_use", "weather", ARGUMENTS, "tool_use")


def test_tokens_are_counted_as_they_are_used(client: Any) -> None:
    for name in MODELS:
        used = client.messages.create(model=name, messages=_USER, max_tokens=1, system="short").usage.input_tokens
        assert client.messages.count_tokens(model=name, messages=_USER, system="short").input_tokens == used


def test_errors_have_the_clients_classes(client: Any, gateway: Gateway) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="unknown", messages=_USER, max_tokens=1)
    body: Any = unknown.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    for name in MODELS:
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model=name, messages=[], max_tokens=1)
        gateway.servers[name].add_faults("request:1:429")
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(model=name, messages=_USER, max_tokens=1)
