"""Priorities and queue limits as a client sees them, over real sockets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from llmux_asgi._openai import relayed_request_headers
from tests.gateway.conftest import gateway
from tests.gateway.scripts import echo
from tests.gateway.test_app import error
from tests.support.eventually import eventually
from tests.support.serve import EventLoop

CLASSES = {"interactive": 30, "batch": 0}


@pytest.mark.parametrize("priority", ["interactive", "batch", None])
def test_a_priority_is_the_gateways_affair_and_not_passed_on(loop: EventLoop, priority: str | None) -> None:
    with gateway(loop, priorities=CLASSES, b={"priority": "batch"}) as served:
        served.a.script = served.b.script = echo
        for model, server in (("a", served.a), ("b", served.b)):
            headers = {"x-other": "1", **({"X-LLMux-Priority": priority} if priority is not None else {})}
            response = served.client.post("/v1/completions", json={"model": model, "priority": 7}, headers=headers)
            assert response.json() == {"model": model, "priority": 7}  # vLLM's own parameter is
            names = {name.lower() for name, _ in server.requests[-1].headers}
            assert b"x-other" in names
            assert b"x-llmux-priority" not in names


def test_a_header_of_the_gateways_is_dropped_whatever_its_case() -> None:
    assert relayed_request_headers([(b"x-llmux-priority", b"batch")]) == [(b"accept-encoding", b"identity")]


@pytest.mark.parametrize(
    ("classes", "words"),
    [(CLASSES, "It must be one of interactive, batch."), ({}, "It must be none: no priorities are configured.")],
)
def test_a_class_that_does_not_exist_is_a_400_that_lists_those_that_do(
    loop: EventLoop, classes: dict[str, int], words: str
) -> None:
    with gateway(loop, priorities=classes) as served:
        served.a.script = served.b.script = echo
        for model in "ab":  # whether its model is active or not
            response = served.client.post("/v1/completions", json={"model": model}, headers={"x-llmux-priority": "urgent"})
            assert response.status_code == 400
            told = error(response)
            assert (told["type"], told["code"], told["param"]) == ("invalid_request_error", None, "x-llmux-priority")
            assert told["message"] == f"The priority 'urgent' does not exist. {words}"
        assert served.a.requests == served.b.requests == []


@pytest.mark.parametrize("which", ["all models together", "it"])
def test_a_full_queue_is_a_429_with_retry_after(loop: EventLoop, which: str) -> None:
    limits = ({"max_waiting": 2}, {}) if which != "it" else ({"max_waiting": 9}, {"max_waiting": 2})
    policy = {"name": "gated_quantum", "min_active_duration": 3600}
    with gateway(loop, limits=limits[0], policy=policy, a={"timeouts": {"request": 2}, **limits[1]}) as served:
        served.a.script = served.b.script = echo
        assert served.chat("b").status_code == 200  # a was found awake: it owes no turn
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(served.chat, "a") for _ in range(2)]
            eventually("both wait", lambda: served.app.switcher.statistics().waiting["a"] == 2)
            response = served.chat("a")
            assert response.status_code == 429
            told = error(response)
            assert (told["type"], told["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert f"2 requests wait for {which}" in told["message"]
            assert 3590 <= int(response.headers["retry-after"]) <= 3601
            assert served.chat("b").status_code == 200  # it is active, and meets no limit
            assert {each.result().status_code for each in waiting} == {504}
