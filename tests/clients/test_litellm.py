"""LiteLLM, as a library."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from llmux_asgi.sim.text import vector

from .conftest import ARGUMENTS, MODELS, SCHEMA, Gateway, said

# LiteLLM declares read-only items of its dictionaries, and pydantic says each time that it does not enforce them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Items? .* using the `ReadOnly` qualifier:UserWarning"),
]

_USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """The library, told to stay off the network; it takes some seconds to import.

    It asks for the thread's event loop, which would make one that nobody closes, and keeps its connections.
    """
    with closing(asyncio.new_event_loop()) as loop, pytest.MonkeyPatch.context() as patch:
        asyncio.set_event_loop(loop)
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        yield (litellm := importlib.import_module("litellm"))
        for client in litellm.in_memory_llm_clients_cache.cache_dict.values():
            if not client.__class__.__name__.startswith("Async"):
                client.close()
        asyncio.set_event_loop(None)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_it_completes_streams_and_embeds(litellm: Any, gateway: Gateway, provider: str) -> None:
    for name in MODELS:
        to: dict[str, Any] = {"model": f"{provider}/{name}", "api_base": gateway.v1, "api_key": "none", "num_retries": 0}
        answer = litellm.completion(messages=_USER, max_tokens=9, **to)
        assert answer.choices[0].message.content == said(name, "hello", 9)
        chunks = list(litellm.completion(messages=_USER, max_tokens=9, stream=True, **to))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said(name, "hello", 9)
        embedded = litellm.embedding(input=["x"], **to)
        assert embedded.data[0]["embedding"] == pytest.approx(vector(name, "x"))


def test_it_calls_tools_and_tells_errors_apart(litellm: Any, gateway: Gateway) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    for name in MODELS:
        to: dict[str, Any] = {"model": f"openai/{name}", "api_base": gateway.v1, "api_key": "none", "max_retries": 0}
        answer = litellm.completion(messages=_USER, tools=[tool], tool_choice="required", **to)
        assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == ARGUMENTS
        gateway.servers[name].add_faults("request:1:429")
        with pytest.raises(litellm.RateLimitError):
            litellm.completion(messages=_USER, **to)
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(messages=_USER, **{**to, "model": "openai/unknown"})


def test_it_speaks_anthropics_api(litellm: Any, gateway: Gateway) -> None:
    for name in MODELS:
        answer = litellm.completion(
            model=f"anthropic/{name}", api_base=gateway.url, api_key="none", messages=_USER, max_tokens=9, num_retries=0
        )
        assert answer.choices[0].message.content == said(name, "hello", 9)
