"""The relay over real sockets: what arrives, when, and what becomes of it when one side goes away."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx
import pytest

from llmux_asgi import LLMuxMiddleware, ModelSwitcher, TimeoutsConfig, load_config
from llmux_asgi._openai import Headers
from llmux_asgi._proxy import Proxy, UpstreamResponse
from tests.gateway.conftest import Gateway, gateway
from tests.support.eventually import eventually, is_at_rest
from tests.support.serve import EventLoop, free_port, serve
from tests.support.upstream import Exchange, ScriptedServer, cutting_server, wait_for

EVENTS = [b'data: {"n":%d}\n\n' % n for n in range(1000)] + [b"data: [DONE]\n\n"]


def counts_come_back_to_zero(served: Gateway) -> None:
    eventually("nothing is in flight and nobody waits", lambda: is_at_rest(served.app))


def relay_to(served: Gateway, url: str) -> None:
    """Have the requests for `a` sent elsewhere than its control calls, which go on working."""
    targets = served.app._proxy._targets
    targets["a"] = dataclasses.replace(targets["a"], url=url)


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


async def echo(exchange: Exchange) -> None:
    await exchange.start("application/json")
    await exchange.chunk(exchange.body, last=True)


class SlowToEnd:
    """An upstream that has sent every byte it announced and does not come to its end yet."""

    def __init__(self) -> None:
        self.end = threading.Event()

    @asynccontextmanager
    async def request(
        self, method: bytes, url: str, target: bytes, headers: Headers, body: bytes, timeouts: TimeoutsConfig
    ) -> AsyncIterator[UpstreamResponse]:
        async def chunks() -> AsyncGenerator[bytes]:
            yield b"one"
            yield b"two"
            assert await anyio.to_thread.run_sync(self.end.wait, 10)

        async with aclosing(chunks()) as body_chunks:
            yield UpstreamResponse(200, [(b"content-length", b"6")], body_chunks)

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
    assert sent[b"accept-encoding"] == b"br"
    assert sent[b"content-length"] == str(len(body)).encode()
    assert sent[b"host"].startswith(b"127.0.0.1:")
    assert not {b"te", b"x-drop"} & sent.keys()


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
        url = plain.app.config.models["a"].url
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


# Faults of the server


def test_a_kept_connection_that_the_server_has_closed_does_not_fail_a_request(loop: EventLoop) -> None:
    """vLLM closes a connection after it has answered 500, without saying so."""
    with gateway(loop) as served, cutting_server() as (url, accepted):
        relay_to(served, url)
        assert served.chat().json() == {"ok": True}
    assert accepted == [1, 2]


def test_a_server_that_refuses_is_a_502_and_is_asked_again(served: Gateway) -> None:
    served.a.script = echo
    assert served.chat().status_code == 200

    async def cut(exchange: Exchange) -> None:
        """Return without an answer: uvicorn then closes the connection."""
        await exchange.start("application/json", 200, (b"content-length", b"10"))

    served.a.controls.clear()
    served.a.script = cut
    with pytest.raises(httpx.RemoteProtocolError):
        served.chat()  # headers had come: the answer cannot be mended, only cut
    served.a.script = echo
    assert served.chat().status_code == 200
    assert "/is_sleeping" in served.a.controls


def test_a_dead_server_is_a_502_that_says_so(loop: EventLoop) -> None:
    with gateway(loop) as served:
        served.a.script = echo
        assert served.chat().status_code == 200
        relay_to(served, f"http://127.0.0.1:{free_port()}")
        response = served.chat()
        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_error"
        assert "The server of the model 'a' cannot be reached" in response.json()["error"]["message"]
        counts_come_back_to_zero(served)


def test_a_stream_that_breaks_ends_with_an_error_event(served: Gateway) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0] + b"data: {half an ev")
        raise RuntimeError("the engine died")

    served.a.script = script
    response = served.chat(stream=True)
    whole, error, rest = response.content.partition(b'data: {"error"')
    assert (response.status_code, whole) == (200, EVENTS[0])
    event = json.loads((error + rest).removeprefix(b"data: "))
    assert event["error"]["code"] == "upstream_error"
    assert b"[DONE]" not in response.content


def test_an_answer_that_breaks_is_never_taken_for_a_whole_one(served: Gateway) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start("application/json")
        await exchange.chunk(b'{"half":')
        raise RuntimeError("the engine died")

    served.a.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        served.chat()
    counts_come_back_to_zero(served)


def test_a_silent_server_is_given_up_after_its_read_timeout(loop: EventLoop) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.client_left()

    with gateway(loop, a={"timeouts": {"read": 0.05}}) as served:
        served.a.script = script
        response = served.chat()
        assert response.status_code == 502
        assert "was silent for 0.05 s" in response.json()["error"]["message"]


def test_an_endless_event_is_passed_on_rather_than_kept(served: Gateway) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for _ in range(40):
            await exchange.chunk(b"x" * 65536)
        await exchange.chunk(b"", last=True)

    served.a.script = script
    assert len(served.chat(stream=True).content) == 40 * 65536


# Answers that a switch cut short

ABORTED_EVENT = b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("policy", "end"),
    [
        ({"drain": False}, ABORTED_EVENT),
        ({"drain_timeout": 0.01}, ABORTED_EVENT),
        ({"drain": False}, b"data: [DONE]\n\n"),  # what vLLM says when there was no token yet
    ],
)
def test_a_stream_aborted_by_a_switch_ends_with_an_error_event(loop: EventLoop, policy: dict[str, object], end: bytes) -> None:
    aborted = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(aborted)
        await exchange.chunk(EVENTS[1] + end, last=True)

    with gateway(loop, policy=policy) as served:
        served.a.script, served.b.script = script, echo
        with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            assert served.chat("b").status_code == 200
            aborted.set()
            rest = b"".join(chunks)
        assert rest.startswith(EVENTS[1])
        assert json.loads(rest.removeprefix(EVENTS[1] + b"data: "))["error"]["code"] == "request_interrupted"


PLAIN_ANSWERS = [
    (b'{"choices":[{"finish_reason": "abort"}]}', 503),
    (b'{"choices":[{"finish_reason": null}]}', 503),
    (b'{"choices":[{"finish_reason": "stop"}]}', 200),
]


def test_a_stream_that_finished_before_it_could_be_aborted_is_left_alone(loop: EventLoop) -> None:
    switched = threading.Event()
    finished = b'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n'

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(switched)
        await exchange.chunk(finished)
        await exchange.chunk(b"data: [DONE]\n\n", last=True)

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            assert served.chat("b").status_code == 200
            switched.set()
            assert b"".join(chunks) == finished + b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("answer", "status"),
    PLAIN_ANSWERS,
)
def test_a_plain_answer_that_a_switch_cut_short_is_a_503_and_a_whole_one_is_not(
    loop: EventLoop, answer: bytes, status: int
) -> None:
    arrived, aborted = threading.Event(), threading.Event()

    async def script(exchange: Exchange) -> None:
        arrived.set()
        await wait_for(aborted)
        await exchange.start("application/json")
        await exchange.chunk(answer, last=True)

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        responses: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: responses.append(served.chat("a")))
        thread.start()
        assert arrived.wait(5)
        with httpx.Client(base_url=served.url) as other:
            assert other.post("/v1/chat/completions", json={"model": "b"}).status_code == 200
        aborted.set()
        thread.join(5)
        assert responses[0].status_code == status
        if status == 503:
            assert responses[0].json()["error"]["code"] == "request_interrupted"
            assert responses[0].headers["retry-after"] == "1"
        else:
            assert responses[0].content == answer


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_the_sleeping_server_never_ends_is_ended_by_the_gateway(
    loop: EventLoop, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM may take a request in just after the abort: it would hang until the model's next turn."""
    monkeypatch.setattr("llmux_asgi._proxy.INTERRUPTED_GRACE", 0.01)
    arrived = threading.Event()

    async def script(exchange: Exchange) -> None:
        if begun:
            await exchange.start()
            await exchange.chunk(EVENTS[0])
        arrived.set()
        await exchange.client_left()

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        responses: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: responses.append(served.chat("a", stream=begun)))
        thread.start()
        assert arrived.wait(5)
        with httpx.Client(base_url=served.url) as other:
            assert other.post("/v1/chat/completions", json={"model": "b"}).status_code == 200
        thread.join(5)
        assert b"request_interrupted" in responses[0].content
        assert responses[0].status_code == (200 if begun else 503)
        counts_come_back_to_zero(served)


def test_an_answer_that_cannot_say_that_it_was_aborted_is_not_trusted(loop: EventLoop) -> None:
    arrived, aborted = threading.Event(), threading.Event()

    async def script(exchange: Exchange) -> None:
        arrived.set()
        await wait_for(aborted)
        await exchange.start("application/json")
        await exchange.chunk(b"{}", last=True)

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        responses: list[httpx.Response] = []
        send = lambda: responses.append(served.client.post("/v1/responses", json={"model": "a"}))  # noqa: E731
        thread = threading.Thread(target=send)
        thread.start()
        assert arrived.wait(5)
        with httpx.Client(base_url=served.url) as other:
            assert other.post("/v1/chat/completions", json={"model": "b"}).status_code == 200
        aborted.set()
        thread.join(5)
        assert responses[0].status_code == 503
