"""Answers that a switch stops in the middle and that go on at their model's next turn (`drain: preempt`)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import BackendUnsupportedError, LLMuxApp
from tests.contract.driver import Call
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import EVENTS, counts_come_back_to_zero, echo, relay_to
from tests.support.eventually import eventually
from tests.support.serve import EventLoop, serve
from tests.support.upstream import Exchange, ScriptedServer, closing_server, wait_for

HEARTBEAT = 0.05


@contextmanager
def preempting(loop: EventLoop, *, a: dict[str, Any] | None = None, **policy: Any) -> Iterator[Gateway]:
    """A gateway that leaves the model a at once when b is asked for, and b when it is idle."""
    chosen = {"name": "gated_quantum", "linger": 0, "drain": "preempt", **policy}
    dear = {"costs": {"wake": 1000}}
    limits = {"heartbeat": HEARTBEAT}
    # No other comments than those of a freeze, however long a busy machine takes to admit a request.
    with gateway(loop, policy=chosen, limits=limits, loading_notice="none", a={**dear, **(a or {})}, b=dear) as served:
        yield served


class Scene:
    """The model a stops in the middle of an answer, and b holds it up until it is told to end."""

    def __init__(self, served: Gateway, head: bytes = EVENTS[0], kind: str = "text/event-stream") -> None:
        self.arrived, self.thawed, self.left, self.over = (threading.Event() for _ in range(4))

        async def a(exchange: Exchange) -> None:
            if head:
                await exchange.start(kind)
                await exchange.chunk(head)
            self.arrived.set()
            await wait_for(self.thawed)
            if not head:
                await exchange.start(kind)
            await exchange.chunk(EVENTS[1] + EVENTS[-1], last=True)

        async def b(exchange: Exchange) -> None:
            await exchange.start("application/json")
            await exchange.chunk(b"{")
            await wait_for(self.over)
            await exchange.chunk(b"}", last=True)

        served.a.script, served.b.script = a, b
        self.served = served

    def freeze(self) -> Call:
        """Have the running requests frozen. Returns what b is asked."""
        assert self.arrived.wait(5)
        call = Call(lambda: httpx.post(self.served.url + "/v1/chat/completions", json={"model": "b"}, timeout=10))
        eventually("frozen", lambda: self.frozen == 1)
        return call

    @property
    def frozen(self) -> int:
        return self.served.app.switcher.statistics().frozen["a"]

    def thaw(self, call: Call) -> None:
        self.over.set()
        assert call.response().status_code == 200
        eventually("thawed", lambda: self.frozen == 0)
        self.thawed.set()


def test_a_frozen_stream_gets_comments_and_goes_on(loop: EventLoop) -> None:
    with preempting(loop) as served:
        scene = Scene(served)
        with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            call = scene.freeze()
            comment = next(chunks)
            assert comment.startswith(b": ")
            assert comment.endswith(b"\n\n")
            scene.thaw(call)
            rest = b"".join(chunks)
        assert rest.replace(comment, b"") == EVENTS[1] + EVENTS[-1]
        counts_come_back_to_zero(served)


def test_openais_client_does_not_see_the_comments(loop: EventLoop) -> None:
    with preempting(loop) as served:
        scene = Scene(served, head=b'data: {"choices":[{"text":"one"}]}\n\n')
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
        with client, client.completions.create(model="a", prompt="x", stream=True) as stream:
            parts = iter(stream)
            assert next(parts).choices[0].text == "one"
            call = scene.freeze()
            scene.thaw(call)
            assert len(list(parts)) == 1


def test_a_plain_answer_is_whole_however_long_it_was_frozen(loop: EventLoop) -> None:
    with preempting(loop) as served:
        scene = Scene(served, head=b"", kind="application/json")
        plain = Call(lambda: httpx.post(served.url + "/v1/chat/completions", json={"model": "a"}, timeout=10))
        call = scene.freeze()
        scene.thaw(call)
        assert plain.response().content == EVENTS[1] + EVENTS[-1]
        counts_come_back_to_zero(served)


def test_the_silence_of_a_frozen_server_is_not_held_against_it(loop: EventLoop) -> None:
    read = 3 * HEARTBEAT
    with preempting(loop, a={"timeouts": {"read": read}}) as served:
        scene = Scene(served)
        with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            call = scene.freeze()
            for _ in range(6):  # twice as long as its silence may be otherwise
                assert next(chunks).startswith(b": ")
            scene.thaw(call)
            assert b"".join(chunks).endswith(EVENTS[1] + EVENTS[-1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_frozen_for_too_long_gets_a_clear_error(loop: EventLoop, stream: bool) -> None:
    with preempting(loop, max_frozen=3 * HEARTBEAT) as served:
        scene = Scene(served, head=EVENTS[0] if stream else b"")
        body = {"model": "a", "stream": stream}
        frozen = Call(lambda: httpx.post(served.url + "/v1/chat/completions", json=body, timeout=10))
        call = scene.freeze()
        response = frozen.response()
        if stream:
            error = json.loads(response.content.rpartition(b"data: ")[2])["error"]
        else:
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["code"] == "model_queue_timeout"
        assert "within 0.15 s: the request was frozen" in error["message"]
        eventually("its place is free", lambda: scene.frozen == 0)
        scene.thawed.set()
        scene.over.set()
        assert call.response().status_code == 200
        counts_come_back_to_zero(served)
        assert served.app.switcher.statistics().switches == 1  # nobody needs the model a any more


def test_a_client_that_leaves_while_frozen_frees_its_place_and_the_servers(loop: EventLoop) -> None:
    gone = threading.Event()
    with preempting(loop) as served:
        scene = Scene(served)

        async def script(exchange: Exchange) -> None:
            await exchange.start()
            await exchange.chunk(EVENTS[0])
            scene.arrived.set()
            await exchange.client_left()
            gone.set()

        served.a.script = script
        with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            call = scene.freeze()
        assert gone.wait(5)
        eventually("its place is free", lambda: scene.frozen == 0)
        scene.over.set()
        assert call.response().status_code == 200
        counts_come_back_to_zero(served)


def test_when_the_server_dies_a_frozen_request_ends_with_a_clear_error(loop: EventLoop) -> None:
    die, arrived = threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        assert die.wait(5)

    with preempting(loop) as served, closing_server(b"", hold) as (url, _):
        scene = Scene(served)
        relay_to(served, url)
        frozen = Call(lambda: httpx.post(served.url + "/v1/chat/completions", json={"model": "a"}, timeout=10))
        assert arrived.wait(5)
        scene.arrived.set()
        call = scene.freeze()
        die.set()
        assert (frozen.response().status_code, frozen.response().json()["error"]["code"]) == (502, "upstream_error")
        eventually("it is noticed", lambda: scene.frozen == 0)
        scene.over.set()
        assert call.response().status_code == 200


def test_a_request_whose_model_fell_asleep_before_it_was_sent_waits(loop: EventLoop) -> None:
    """It is not sent to a sleeping server."""
    with preempting(loop) as served:
        scene = Scene(served)
        served.a.script = echo
        proxy = served.app._proxy
        reached, go_on = threading.Event(), threading.Event()
        relay = proxy.__class__.__call__

        async def late(scope: Any, receive: Any, send: Any) -> None:
            if scope["llmux.lease"].model == "a":
                reached.set()
                await anyio.to_thread.run_sync(go_on.wait, 5)
            await relay(proxy, scope, receive, send)

        served.app._inference.app = late
        asked = Call(lambda: httpx.post(served.url + "/v1/chat/completions", json={"model": "a"}, timeout=10))
        assert reached.wait(5)
        scene.arrived.set()
        call = scene.freeze()
        go_on.set()
        scene.over.set()
        assert call.response().status_code == 200
        assert asked.response().status_code == 200
        assert [kind for kind in served.a.controls if kind in ("/sleep", "/wake_up")] == ["/sleep", "/wake_up"]
        assert len(served.a.requests) == 1


# Servers that cannot


def too_old(server: ScriptedServer) -> None:
    server.version = "0.13.0"


def without_modes(server: ScriptedServer) -> None:
    server.openapi = b'{"paths":{"/sleep":{"post":{}}}}'


@pytest.mark.parametrize("spoil", [too_old, without_modes])
def test_a_server_that_cannot_freeze_is_an_error_at_the_start(loop: EventLoop, spoil: Callable[[ScriptedServer], None]) -> None:
    server = ScriptedServer()
    spoil(server)
    server.script = echo
    with serve(server) as url:
        config: dict[str, Any] = {"models": {"a": {"url": url}}, "policy": {"drain": "preempt"}}
        llm = LLMuxApp(config)
        with pytest.raises(BackendUnsupportedError, match=r"drain: preempt needs .* Upgrade it to 0.17"):
            start_and_stop(loop, llm)
        # Mounted, without the lifespan, the first request is told.
        with serve(Starlette(routes=[Mount("/llm", LLMuxApp(config))]), loop) as gateway_url:
            response = httpx.post(gateway_url + "/llm/v1/chat/completions", json={"model": "a"})
            assert response.status_code == 503
            assert "Upgrade it to 0.17 or later, or choose drain: wait." in response.json()["error"]["message"]


@pytest.mark.parametrize("openapi", [b"", b"not json"])
def test_a_server_that_keeps_its_document_to_itself_is_judged_by_its_version(loop: EventLoop, openapi: bytes) -> None:
    server = ScriptedServer(openapi=openapi)
    with serve(server) as url:
        start_and_stop(loop, LLMuxApp({"models": {"a": {"url": url}}, "policy": {"drain": "preempt"}}))


def test_a_server_that_is_not_there_yet_does_not_hinder_the_start(loop: EventLoop) -> None:
    start_and_stop(loop, LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:9"}}, "policy": {"drain": "preempt"}}))


def start_and_stop(loop: EventLoop, llm: LLMuxApp) -> None:
    """Start a gateway and stop it."""

    async def main() -> None:
        async with llm.lifespan():
            pass

    anyio.run(main, backend=loop)
