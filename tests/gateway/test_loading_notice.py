"""Notices to a client whose request waits, over real sockets: limits, freezes, and a gateway process of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from llmux_asgi.access import hash_key
from tests.contract.driver import Call
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import EVENTS, counts_come_back_to_zero
from tests.support.eventually import eventually
from tests.support.gateway_process import gateway_process
from tests.support.serve import EventLoop, serve
from tests.support.upstream import Exchange, ScriptedServer, wait_for

HEARTBEAT = 0.05
STREAM = {"model": "b", "stream": True}


@contextmanager
def noticing(loop: EventLoop, **config: Any) -> Iterator[Gateway]:
    with gateway(loop, limits={"heartbeat": HEARTBEAT}, **config) as served:
        yield served


class Holder:
    """Keeps the model a busy until it is told to end."""

    def __init__(self, served: Gateway, headers: dict[str, str] | None = None) -> None:
        arrived, self.over = threading.Event(), threading.Event()

        async def a(exchange: Exchange) -> None:
            await exchange.start("application/json")
            arrived.set()
            await wait_for(self.over)
            await exchange.chunk(b"{}", last=True)

        served.a.script = a
        url = served.url + "/v1/chat/completions"
        self._call = Call(lambda: httpx.post(url, json={"model": "a"}, headers=headers, timeout=10))
        assert arrived.wait(5)

    def end(self) -> None:
        self.over.set()
        assert self._call.response().status_code == 200


async def stream(exchange: Exchange) -> None:
    await exchange.start("text/event-stream", 200, (b"x-theirs", b"1"))
    await exchange.chunk(b"".join(EVENTS[:3]) + EVENTS[-1], last=True)


def test_a_stream_that_waits_has_comments_before_its_answer(loop: EventLoop) -> None:
    with noticing(loop) as served:
        served.b.script = stream
        holder = Holder(served)
        with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["x-accel-buffering"] == "no"
            chunks = response.iter_raw()
            first = json.loads(next(chunks).removeprefix(b": llmux "))
            assert (first["model"], first["state"]) == ("b", "drain")
            assert next(chunks).startswith(b": llmux ")
            holder.end()
            rest = b"".join(chunks)
        assert b"".join(part + b"\n\n" for part in rest.split(b"\n\n") if part[:1] == b"d") == b"".join(EVENTS[:3]) + EVENTS[-1]
        counts_come_back_to_zero(served)


def test_a_client_that_leaves_then_gives_its_place_up(loop: EventLoop) -> None:
    with noticing(loop) as served:
        holder = Holder(served)
        with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as response:
            chunks = response.iter_raw()  # a connection whose reader is gone is closed
            assert next(chunks).startswith(b": llmux ")
            assert served.app.switcher.statistics().waiting["b"] == 1
        eventually("it is forgotten", lambda: served.app.switcher.statistics().waiting["b"] == 0)
        holder.end()
        assert served.b.requests == []
        counts_come_back_to_zero(served)


@pytest.mark.parametrize("refuses", [False, True])
def test_a_key_is_charged_for_the_answer_and_not_for_the_notices(loop: EventLoop, refuses: bool) -> None:
    headers = {"authorization": "Bearer secret"}
    key = {"hash": hash_key("secret"), "tokens_per_minute": 1000, "requests_per_minute": 20}

    async def answer(exchange: Exchange) -> None:
        if refuses:
            await exchange.start("application/json", 400)
            await exchange.chunk(b'{"error": {"message": "no"}}', last=True)
        else:
            await exchange.start()
            usage = b'data: {"choices":[],"usage":{"prompt_tokens":300,"total_tokens":340}}\n\n'
            await exchange.chunk(usage + EVENTS[-1], last=True)

    with noticing(loop, access={"keys": {"one": key}}) as served:
        served.b.script = answer
        holder = Holder(served, headers)
        with served.client.stream("POST", "/v1/chat/completions", json=STREAM, headers=headers) as response:
            chunks = response.iter_raw()
            assert next(chunks).startswith(b": llmux ")
            assert response.headers["x-ratelimit-limit-tokens"] == "1000"
            holder.end()
            rest = b"".join(chunks)
        assert (b'"error"' in rest) == refuses
        left = served.client.get("/v1/models", headers=headers).headers
        assert int(left["x-ratelimit-remaining-requests"]) == 18
        assert (int(left["x-ratelimit-remaining-tokens"]) > 900) == refuses


def test_a_stream_that_has_waited_is_frozen_and_goes_on_like_any_other(loop: EventLoop) -> None:
    policy = {"name": "gated_quantum", "linger": 0, "drain": "preempt", "max_freezes": 3}
    dear = {"costs": {"wake": 1000}}
    with noticing(loop, policy=policy, a=dear, b=dear) as served:
        begun, thawed, over = threading.Event(), threading.Event(), threading.Event()

        async def b(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.chunk(EVENTS[0])
            begun.set()
            await wait_for(thawed)
            await exchange.chunk(EVENTS[1] + EVENTS[-1], last=True)

        async def a(exchange: Exchange) -> None:
            await exchange.start("application/json")
            await exchange.chunk(b"{")
            await wait_for(over)
            await exchange.chunk(b"}", last=True)

        served.b.script = b
        served.b.wake_gate = threading.Event()
        with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as response:
            chunks = response.iter_raw()
            assert next(chunks).startswith(b": llmux ")
            served.b.wake_gate.set()
            assert begun.wait(5)
            served.a.script = a
            call = Call(lambda: httpx.post(served.url + "/v1/chat/completions", json={"model": "a"}, timeout=10))
            eventually("frozen", lambda: served.app.switcher.statistics().frozen["b"] == 1)
            while not next(chunks).startswith(b": the model makes way"):
                pass
            over.set()
            assert call.response().status_code == 200
            eventually("thawed", lambda: served.app.switcher.statistics().frozen["b"] == 0)
            thawed.set()
            assert b"".join(chunks).endswith(EVENTS[1] + EVENTS[-1])
        counts_come_back_to_zero(served)


def test_a_gateway_process_tells_and_ends_with_an_error_event_or_the_answer() -> None:
    a, b = ScriptedServer(), ScriptedServer(stream, asleep=True)
    b.wake_gate = threading.Event()
    with ExitStack() as stack:
        models = {name: {"url": stack.enter_context(serve(each))} for name, each in (("a", a), ("b", b))}
        policy = {"name": "fifo", "min_active_duration": 0, "request_timeout": 20 * HEARTBEAT}
        config = {"models": models, "policy": policy, "limits": {"heartbeat": HEARTBEAT}, "loading_notice": "events"}
        url = stack.enter_context(gateway_process(config)).url + "/llm/v1/chat/completions"

        def ask() -> str:
            return httpx.post(url, json=STREAM, timeout=20, trust_env=False).raise_for_status().text

        *notices, error = ask().removesuffix("\n\n").split("\n\n")
        assert notices
        assert all("Waiting for b (" in each for each in notices)
        assert "it is being loaded" in notices[-1]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "model_queue_timeout"
        b.wake_gate.set()
        assert ask().endswith((b"".join(EVENTS[:3]) + EVENTS[-1]).decode())
