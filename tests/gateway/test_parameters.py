"""Parameters of models, over real sockets: what the server gets, and what limits count."""

from __future__ import annotations

import json
from typing import Any

from llmux_asgi.access import hash_key
from tests.gateway.conftest import gateway
from tests.gateway.scripts import echo
from tests.support.serve import EventLoop

PARAMETERS = {
    "defaults": {"max_tokens": 512},
    "forced": {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}},
    "strip": ["seed"],
    "aliases": {"a:warm": {"forced": {"temperature": 1.5}}},
}


def test_the_server_gets_the_models_parameters(loop: EventLoop) -> None:
    with gateway(loop, a={"parameters": PARAMETERS, "aliases": ["a:warm", "other"], "served_name": "org/a"}) as served:
        served.a.script = served.b.script = echo
        sent: dict[str, Any] = {"messages": [{"seed": 1}], "top_k": 1, "seed": 2}
        common = {"messages": [{"seed": 1}], "top_k": 20, "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 512}

        def got(model: str) -> Any:
            return served.client.post("/v1/chat/completions", json={"model": model, **sent}).raise_for_status().json()

        assert got("a") == got("other") == {"model": "org/a", **common}
        assert got("a:warm") == {"model": "org/a", **common, "temperature": 1.5}
        assert got("b") == {"model": "b", **sent}
        named = served.client.post("/models/a:warm/v1/completions", json={"max_tokens": 3}).json()
        assert (named["max_tokens"], named["temperature"], named["model"]) == (3, 1.5, "org/a")
        twice = served.client.post("/v1/completions", content=b'{"model": "a", "top_k": 1, "top\\u005fk": 2}')
        assert (twice.status_code, twice.json()["error"]["param"]) == (400, "top_k")


def test_a_form_has_none_and_a_body_in_chunks_has_them(loop: EventLoop) -> None:
    with gateway(loop, a={"parameters": PARAMETERS | {"aliases": {}}}) as served:
        served.a.script = echo
        form = served.client.post("/v1/audio/transcriptions", data={"model": "a", "seed": "1"}, files={"file": b"RIFF"})
        assert b"top_k" not in form.content
        assert b"seed" in form.content
        chunks = served.client.post("/v1/chat/completions", content=iter([b'{"model": "a", ', b'"seed": 1}']))
        assert json.loads(chunks.content).keys() == {"model", "top_k", "chat_template_kwargs", "max_tokens"}


def test_limits_of_tokens_count_what_is_sent(loop: EventLoop) -> None:
    key = {"hash": hash_key("secret"), "tokens_per_minute": 600}
    with gateway(loop, a={"parameters": {"defaults": {"max_tokens": 1000}}}, access={"keys": {"one": key}}) as served:
        served.a.script = echo
        headers = {"authorization": "Bearer secret"}

        def left(**more: Any) -> int:
            body = {"model": "a", "prompt": "x", **more}
            response = served.client.post("/v1/completions", json=body, headers=headers).raise_for_status()
            return int(response.headers["x-ratelimit-remaining-tokens"])

        assert left(max_tokens=5) > 500
        assert left() < 100
