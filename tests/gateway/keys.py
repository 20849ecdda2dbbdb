"""Requests with API keys, to a gateway that has access control."""

from __future__ import annotations

from typing import Any

import httpx

from tests.gateway.conftest import Gateway
from tests.gateway.scripts import echo

__all__ = ["as_new", "ask", "bearer", "in_flight", "key_of", "left"]


def key_of(name: str) -> str:
    return f"llmux-{name}-0123456789"


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(name)}"}


def ask(served: Gateway, headers: Any, model: str = "a", **fields: Any) -> httpx.Response:
    return served.client.post("/v1/completions", json={"model": model, **fields}, headers=headers)


def left(response: httpx.Response, kind: str = "requests") -> int:
    return int(response.headers[f"x-ratelimit-remaining-{kind}"])


def in_flight(served: Gateway, name: str) -> int:
    assert served.app._access is not None
    return served.app._access._accounts["key", name].in_flight


def as_new(served: Gateway) -> None:
    """`a` awake, `b` asleep, nothing known of either; what the keys have used stays used: each test has keys of its own."""
    for server, asleep in ((served.a, False), (served.b, True)):
        server.script = echo
        server.asleep = asleep
        server.requests.clear()
        server.controls.clear()
        server.control_headers.clear()
    served.app.switcher.distrust()
