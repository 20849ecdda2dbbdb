"""The relay over real sockets: what arrives, when, and what becomes of it when one side goes away."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import threading
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
import pytest

from llmux_asgi import LLMuxApp, LLMuxMiddleware, ModelSwitcher, TimeoutsConfig, load_config
from llmux_asgi._openai import Headers
from llmux_asgi._proxy import SCOPE_LEASE, Proxy
from llmux_asgi.upstream import Content, Origin
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import EVENTS, counts_come_back_to_zero, echo
from tests.support.eventually import eventually
from tests.support.serve import EventLoop, serve
from tests.support.upstream import Exchange, ScriptedServer, wait_for


def test_a_thousand_chunks_arrive_byte_for_byte_and_the_first_before_the_last_is_produced(served: Gateway) -> None:
    first_arrived = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(first_arrived)
        for event in EVENTS[1:]:
            await exchange.chunk(event)
        await exchange.chunk(b"", last=True)

    served.a.script = script
    with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        chunks = response.iter_raw()
        received = next(chunks)
        assert received == EVENTS[0]
        first_arrived.set()
        received += b"".join(chunks)
    assert received == b"".join(EVENTS)
    counts_come_back_to_zero(served)


def test_each_event_is_passed_on_when_it_comes(served: Gateway) -> None:
    """Every one of a hundred events is seen by the client before the next one is sent."""
    turn = [threading.Event() for _ in range(100)]

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for event, seen in zip(EVENTS, turn, strict=False):
            await exchange.chunk(event)
            await wait_for(seen)
        await exchange.chunk(b"", last=True)

    served.a.script = script
    with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        for index, chunk in enumerate(response.iter_raw()):
            assert chunk == EVENTS[index]
            turn[index].set()


def test_an_event_cut_in_pieces_by_the_network_arrives_whole(served: Gateway) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for piece in (b"data: one\n", b"\ndata: tw", b"o\n\nda", b"ta: three"):
            await exchange.chunk(piece)
        await exchange.chunk(b"", last=True)

    served.a.script = script
    assert served.chat(stream=True).content == b"data: one\n\ndata: two\n\ndata: three"


def test_an_answer_keeps_its_status_headers_and_bytes(served: Gateway) -> None:
    content = b'{"error": {"message": "too long",  "code": 400}}'

    async def script(exchange: Exchange) -> None:
        more = [(b"x-request-id", b"7"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"keep-alive", b"timeout=5")]
        await exchange.start("application/json", 422, *more, (b"content-length", str(len(content)).encode()))
        await exchange.chunk(content, last=True)

    served.a.script = script
    response = served.chat()
    assert (response.status_code, response.content) == (422, content)
    assert response.headers["x-request-id"] == "7"
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert response.headers["content-length"] == str(len(content))
    assert "keep-alive" not in response.headers
    assert len(response.headers.get_list("date")) == 1
    assert len(response.headers.get_list("server")) <= 1


class SlowToEnd:
    """An upstream, and its answer, that has sent every byte it announced and does not come to its end yet."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.status = 200
        self.headers = [(b"content-length", b"6")]
        self.ended = False
        self.chunks = [b"one", b"two"]

    async def request(
        self, method: bytes, origin: Origin, target: bytes, headers: Headers, body: Content, timeouts: TimeoutsConfig
    ) -> SlowToEnd:
        return self

    def __aiter__(self) -> SlowToEnd:
        return self

    async def __anext__(self) -> bytes:
        if not self.chunks:
            assert await anyio.to_thread.run_sync(self.end.wait, 10)
            raise StopAsyncIteration
        return self.chunks.pop(0)

    async def aclose(self) -> None:
        pass


def test_an_answer_is_over_with_its_last_byte_whatever_the_server_does_then(loop: EventLoop) -> None:
    upstream = SlowToEnd()
    with serve(ScriptedServer()) as url:
        config = load_config({"models": {"a": {"url": url}}})
        app = LLMuxMiddleware(Proxy(config.models, upstream), switcher := ModelSwitcher.from_config(config))
        with serve(app, loop) as gateway_url:
            assert httpx.post(gateway_url + "/v1/completions", json={"model": "a"}).content == b"onetwo"
            eventually("the lease is given back", lambda: not switcher.statistics().in_flight["a"])
            upstream.end.set()


def test_the_request_arrives_unchanged_but_for_what_belongs_to_the_connection(served: Gateway) -> None:
    served.a.script = echo
    body = b'{ "model" : "a", "x": [1.0, 1e5, "\\u00e9"] }'
    headers = {"x-mine": "1", "connection": "keep-alive, x-drop", "x-drop": "1", "te": "trailers", "accept-encoding": "br"}
    response = served.client.post("/v1/completions?beta=1&b=%2F", content=body, headers=headers)
    assert response.content == body
    [exchange] = served.a.requests
    sent = dict(exchange.headers)
    assert (exchange.method, exchange.path, exchange.query) == ("POST", "/v1/completions", b"beta=1&b=%2F")
    assert sent[b"x-mine"] == b"1"
    assert sent[b"accept-encoding"] == b"identity"  # the answer is looked into
    assert sent[b"content-length"] == str(len(body)).encode()
    assert sent[b"host"].startswith(b"127.0.0.1:")
    assert not {b"te", b"x-drop"} & sent.keys()


def test_the_query_arrives_as_it_was_sent(served: Gateway) -> None:
    served.a.script = echo
    parts = urlsplit(served.url)
    query = 'a="<>|\\^`{}&b=%2f%zz&c=[1]'
    connection = http.client.HTTPConnection(parts.netloc)
    connection.request("POST", f"{parts.path}/v1/completions?{query}", '{"model": "a"}')
    assert connection.getresponse().status == 200
    connection.close()
    assert served.a.requests[0].query == query.encode()


def test_as_many_streams_at_once_as_there_are_clients(loop: EventLoop) -> None:
    """httpx's own limit is a hundred connections."""
    streams = 150
    arrived: list[Exchange] = []
    all_arrived = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        arrived.append(exchange)
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        if len(arrived) == streams:
            all_arrived.set()
        await all_arrived.wait()
        await exchange.chunk(EVENTS[1], last=True)

    with gateway(loop) as served:
        served.a.script = script

        async def main() -> list[bytes]:
            answers: list[bytes] = []

            async def one() -> None:
                body = {"model": "a", "stream": True}
                answers.append((await client.post(served.url + "/v1/chat/completions", json=body)).content)

            client = httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=None))
            async with client, anyio.create_task_group() as tasks:
                for _ in range(streams):
                    tasks.start_soon(one)
            return answers

        assert anyio.run(main) == [EVENTS[0] + EVENTS[1]] * streams


def test_only_the_model_is_rewritten_when_the_backend_serves_another_name(loop: EventLoop) -> None:
    with gateway(loop, a={"served_name": "org/Model", "aliases": ["gpt"]}) as served:
        served.a.script = echo
        body = b'{"temperature": 1.0, "model": "gpt", "nested": {"model": "gpt"}}'
        received = served.client.post("/v1/completions", content=body).json()
        assert received == {"temperature": 1.0, "model": "org/Model", "nested": {"model": "gpt"}}
        same = b'{"model":   "org/Model"}'
        served.client.post("/v1/completions", content=same, headers={"x-llmux-model": "a"})
        assert served.a.requests[-1].body == same


def test_a_path_in_the_url_of_the_backend_is_kept(loop: EventLoop) -> None:
    with gateway(loop) as plain:
        url = plain.app.config.models["a"].address
        with gateway(loop, a={"url": url + "/behind/"}) as served:
            served.app.switcher.distrust()
            response = served.chat()
            assert response.status_code == 503  # the control calls go there too, where this server has none
    assert plain.a.requests[0].path == "/behind/version"


def test_the_servers_generation_is_cancelled_and_the_lease_ends_when_the_client_leaves_a_stream(served: Gateway) -> None:
    noticed = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await exchange.client_left()
        noticed.set()

    served.a.script = script
    with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        assert next(response.iter_raw()) == EVENTS[0]
    assert noticed.wait(5)
    # b can have its turn: the lease on a is gone.
    served.b.script = echo
    assert served.chat("b").status_code == 200
    counts_come_back_to_zero(served)


def test_the_servers_generation_is_cancelled_when_the_client_leaves_before_the_answer(served: Gateway) -> None:
    arrived, noticed = threading.Event(), threading.Event()

    async def script(exchange: Exchange) -> None:
        arrived.set()
        await exchange.client_left()
        noticed.set()

    served.a.script = script
    parts = urlsplit(served.url)
    connection = http.client.HTTPConnection(parts.netloc)
    connection.request("POST", f"{parts.path}/v1/chat/completions", json.dumps({"model": "a"}))
    assert arrived.wait(5)
    connection.close()
    assert noticed.wait(5)


def test_a_client_that_leaves_is_noticed_on_a_second_event_loop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test client runs an app on one after the other; the first has ended before its timer was due."""
    server, generating, noticed = ScriptedServer(), threading.Event(), threading.Event()

    async def script(exchange: Exchange) -> None:
        generating.set()
        await exchange.client_left()
        noticed.set()

    with serve(server) as url:
        llm = LLMuxApp({"models": {"a": {"url": url}}})
        server.script = echo
        with monkeypatch.context() as patch, serve(llm) as first:
            patch.setattr("llmux_asgi._proxy._WATCH_AFTER", 600.0)
            assert httpx.post(f"{first}/v1/chat/completions", json={"model": "a"}).status_code == 200
        server.script = script
        with serve(llm) as second:
            connection = http.client.HTTPConnection(urlsplit(second).netloc)
            connection.request("POST", "/v1/chat/completions", json.dumps({"model": "a"}))
            assert generating.wait(5)
            connection.close()
            assert noticed.wait(5)


@pytest.mark.anyio
async def test_a_stream_holds_its_request_no_longer_than_needed() -> None:
    """A thousand streams that take minutes would otherwise keep a thousand prompts in memory."""

    gone = threading.Event()

    class Body(bytes):
        def __del__(self) -> None:
            gone.set()

    body = b'{"model":"a","messages":[],"stream":true}'
    messages: list[dict[str, object]] = [{"type": "http.request", "body": Body(body), "more_body": False}]
    go_on, first = threading.Event(), anyio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(go_on)
        await exchange.chunk(b"", last=True)

    async def receive() -> dict[str, object]:
        if not messages:
            await anyio.sleep_forever()
        return messages.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        if message.get("body"):
            first.set()

    with serve(ScriptedServer(script)) as url:
        llm = LLMuxApp({"models": {"a": {"url": url}}})
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
        async with llm.lifespan(llm), anyio.create_task_group() as tasks:
            tasks.start_soon(llm, scope, receive, send)
            with anyio.fail_after(10):
                await first.wait()
            gc.collect()
            was_gone = gone.is_set()
            scopes = [each for each in gc.get_objects() if type(each) is dict and SCOPE_LEASE in each]
            go_on.set()
    assert was_gone
    assert not scopes


def test_nothing_is_kept_of_a_request_that_is_over(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmux_asgi._proxy._WATCH_AFTER", 600.0)
    with gateway(loop) as served:
        served.a.script = echo
        assert served.chat().status_code == 200
        proxy = served.app._proxy
        eventually("it is neither kept nor watched later", lambda: not (proxy.relays or proxy.clients._unwatched), 5.0)


def test_a_client_that_leaves_the_queue_lets_the_active_model_go_on(served: Gateway) -> None:
    finish = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(finish)
        await exchange.chunk(EVENTS[1], last=True)

    served.a.script = script
    with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        chunks = response.iter_raw()
        assert next(chunks) == EVENTS[0]
        parts = urlsplit(served.url)
        waiting = http.client.HTTPConnection(parts.netloc)
        waiting.request("POST", f"{parts.path}/v1/chat/completions", json.dumps({"model": "b"}))
        eventually("the request is queued", lambda: served.app.switcher.statistics().waiting["b"] == 1)
        waiting.close()
        eventually("it has left the queue", lambda: served.app.switcher.statistics().waiting["b"] == 0)
        finish.set()
        assert list(chunks) == [EVENTS[1]]
    assert "/sleep" not in served.a.controls
    assert served.b.requests == []
