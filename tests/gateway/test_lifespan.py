"""What the lifespan adds: watching, preloading, an orderly end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from llmux_asgi import LLMuxApp, Mode
from tests.support.eventually import eventually
from tests.support.serve import EventLoop, serve
from tests.support.upstream import Exchange, wait_for

from .conftest import Gateway, gateway


@pytest.fixture
def watched(loop: EventLoop) -> Iterator[Gateway]:
    with gateway(loop, limits={"health_interval": 0.01}) as served:
        yield served


async def answer(exchange: Exchange) -> None:
    await exchange.start("application/json")
    await exchange.chunk(b"{}", last=True)


def test_a_model_that_was_put_to_sleep_behind_the_gateways_back_is_noticed_without_a_request(watched: Gateway) -> None:
    watched.a.script = answer
    assert watched.chat().status_code == 200
    watched.a.asleep = True
    eventually("noticed", lambda: watched.app.switcher.statistics().mode is Mode.IDLE)
    assert watched.app.switcher.statistics().servers == {"a": "asleep", "b": "asleep"}
    assert watched.chat().status_code == 200


def test_who_does_not_want_it_is_not_watched(loop: EventLoop) -> None:
    with gateway(loop, limits={"health_interval": None}) as served:
        served.a.script = answer
        assert served.chat().status_code == 200
        asked = len(served.a.controls)
        for _ in range(20):
            assert served.chat().status_code == 200
        assert len(served.a.controls) == asked


def test_a_request_that_is_sent_twice_has_the_same_body(loop: EventLoop) -> None:
    async def fail_once(exchange: Exchange) -> None:
        if len(served.a.requests) == 1:
            await exchange.start("application/json", 500)
            await exchange.chunk(b"no", last=True)
        else:
            await answer(exchange)

    with gateway(loop, a={"retry": True}) as served:
        served.a.script = fail_once
        assert served.chat(text="x" * 100_000).status_code == 200
        first, second = served.a.requests
        assert first.body == second.body
        assert len(first.body) > 100_000


def test_an_error_in_a_stream_has_the_servers_asked(loop: EventLoop) -> None:
    async def fail(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b'data: {"error": {"message": "EngineCore encountered an issue"}}\n\n')
        await exchange.chunk(b"data: [DONE]\n\n", last=True)

    with gateway(loop) as served:
        served.a.script = answer
        served.chat()
        asked = len(served.a.controls)
        served.a.script = fail
        assert b"EngineCore" in served.chat(stream=True).content
        served.a.script = answer
        served.chat()
        assert served.a.controls[asked:] == ["/is_sleeping"]


@contextmanager
def closing(served: Gateway) -> Iterator[None]:
    """Leave the gateway's lifespan meanwhile, in its own event loop."""
    thread = threading.Thread(target=lambda: httpx.post(served.url.removesuffix("/llm") + "/close", timeout=10))
    thread.start()
    yield
    thread.join()


@pytest.fixture
def closable(loop: EventLoop, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    with gateway(loop, limits={"shutdown": request.param}) as served:

        async def close(request: Request) -> Response:
            await served.app.aclose()
            return Response()

        host = Starlette(routes=[Route("/close", close, methods=["POST"]), Mount("/llm", served.app)])
        with serve(host, loop) as url, httpx.Client(base_url=url + "/llm", timeout=10) as client:
            yield Gateway(served.app, client, url + "/llm", served.a, served.b)


@pytest.mark.parametrize("closable", [10], indirect=True)
def test_at_the_end_running_answers_finish_and_new_requests_are_refused(closable: Gateway) -> None:
    go_on, begun = threading.Event(), threading.Event()

    async def slowly(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b"data: {}\n\n")
        begun.set()
        await wait_for(go_on)
        await exchange.chunk(b"data: [DONE]\n\n", last=True)

    closable.a.script = slowly
    with closable.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        assert begun.wait(5)
        with closing(closable):
            eventually("new requests are refused", lambda: closable.chat("b").status_code == 503)
            assert "shutting down" in closable.chat("b").text
            go_on.set()
            assert response.read().endswith(b"[DONE]\n\n")


@pytest.mark.parametrize("closable", [0.05], indirect=True)
def test_the_end_does_not_wait_for_ever(closable: Gateway) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def endlessly(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b"data: {}\n\n")
        begun.set()
        await wait_for(ended)

    closable.a.script = endlessly
    with closable.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}):
        assert begun.wait(5)
        with closing(closable):
            pass
        ended.set()


def test_a_preloaded_model_is_awake_without_a_request(loop: EventLoop) -> None:
    import sys

    command = [sys.executable, "-m", "llmux_asgi.sim"]
    models = {
        name: {"command": [*command, f'{{"name": "{name}", "port": {{port}}, "start_seconds": 0}}'], "preload": preload}
        for name, preload in (("first", True), ("second", True), ("third", False))
    }
    llm = LLMuxApp({"models": models, "policy": {"name": "fifo", "min_active_duration": 0}})
    with serve(Starlette(routes=[Mount("/llm", llm)], lifespan=llm.lifespan), loop):
        eventually("the first one is the last", lambda: llm.switcher.statistics().switches == 2)
        statistics = llm.switcher.statistics()
        assert statistics.active_model == "first"
        assert dict(statistics.servers) == {"first": "awake", "second": "asleep", "third": "stopped"}


def test_a_server_that_runs_already_is_preloaded_too(loop: EventLoop) -> None:
    with gateway(loop, b={"preload": True}) as served:
        eventually("it is awake", lambda: served.app.switcher.statistics().active_model == "b")
        assert not any(request.method == "POST" for request in served.b.requests)
