"""LangChain's models over OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from llmux_asgi.sim.text import vector

from .conftest import ARGUMENTS, MODELS, SCHEMA, Gateway, said

pytestmark = pytest.mark.slow

_TOOL = {"type": "function", "function": {"name": "weather", "description": "tells it", "parameters": SCHEMA}}


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


def _check(model: Any, name: str) -> None:
    assert model.invoke("hello").text == said(name, "hello", 40)
    assert "".join(chunk.text for chunk in model.stream("hello")) == said(name, "hello", 40)
    calls = model.bind_tools([_TOOL], tool_choice="weather").invoke("sunny?").tool_calls
    assert [(call["name"], call["args"]) for call in calls] == [("weather", ARGUMENTS)]


def test_chat_openai(gateway: Gateway) -> None:
    langchain_openai = importlib.import_module("langchain_openai")
    for name in MODELS:
        to: dict[str, Any] = {"model": name, "base_url": gateway.v1, "api_key": "none", "max_retries": 0}
        _check(langchain_openai.ChatOpenAI(max_tokens=40, **to), name)
        # Without the switch it would download a tokenizer, to cut texts that no vLLM cuts like that.
        embeddings = langchain_openai.OpenAIEmbeddings(check_embedding_ctx_length=False, **to)
        assert embeddings.embed_documents(["x", "y"]) == [pytest.approx(vector(name, text)) for text in "xy"]


def test_chat_openai_over_responses(gateway: Gateway) -> None:
    langchain_openai = importlib.import_module("langchain_openai")
    for name in MODELS:
        model = langchain_openai.ChatOpenAI(
            model=name, base_url=gateway.v1, api_key="none", max_retries=0, max_tokens=40, use_responses_api=True
        )
        assert model.invoke("hello").text == said(name, "hello", 40)


def test_chat_anthropic(gateway: Gateway) -> None:
    langchain_anthropic = importlib.import_module("langchain_anthropic")
    for name in MODELS:
        _check(
            langchain_anthropic.ChatAnthropic(model=name, base_url=gateway.url, api_key="none", max_retries=0, max_tokens=40),
            name,
        )
