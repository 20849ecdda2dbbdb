"""Answers that a switch cut short: draining off, or its deadline passed."""

from __future__ import annotations

import json
import socket
import threading
from urllib.parse import urlsplit

import httpx
import pytest

from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import EVENTS, counts_come_back_to_zero, echo, relay_to
from tests.support.eventually import eventually
from tests.support.serve import EventLoop
from tests.support.upstream import Exchange, closing_server, wait_for


def interrupt(served: Gateway) -> None:
    """Have the model a put to sleep, by a request for the other one."""
    with httpx.Client(base_url=served.url, timeout=10) as other:
        assert other.post("/v1/chat/completions", json={"model": "b"}).status_code == 200


def interrupted_answer(
    served: Gateway, arrived: threading.Event, asleep: threading.Event, path: str = "/v1/chat/completions", **body: object
) -> httpx.Response:
    """Return what becomes of a request for the model a that is put to sleep when it has `arrived`; sets `asleep` then."""
    responses: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: responses.append(served.client.post(path, json={"model": "a", **body})))
    thread.start()
    assert arrived.wait(5)
    interrupt(served)
    asleep.set()
    thread.join(10)
    return responses[0]


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
        response = interrupted_answer(served, arrived, aborted)
        assert response.status_code == status
        if status == 503:
            assert response.json()["error"]["code"] == "request_interrupted"
            assert response.headers["retry-after"] == "1"
        else:
            assert response.content == answer


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
        response = interrupted_answer(served, arrived, threading.Event(), stream=begun)
        assert b"request_interrupted" in response.content
        assert response.status_code == (200 if begun else 503)
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
        response = interrupted_answer(served, arrived, aborted, "/v1/responses")
        assert response.status_code == 503


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\n{}"])
def test_a_server_that_breaks_off_after_the_sleep_has_been_interrupted_and_is_not_at_fault(
    loop: EventLoop, answer: bytes
) -> None:
    arrived, asleep = threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        assert asleep.wait(5)

    with gateway(loop, policy={"drain": False}) as served, closing_server(answer, hold) as (url, _):
        served.b.script = echo
        relay_to(served, url)
        response = interrupted_answer(served, arrived, asleep)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "request_interrupted")
        assert response.headers["retry-after"] == "1"
        assert served.app.switcher.statistics().active_model == "b"


def test_an_error_of_the_servers_own_is_passed_on_though_a_switch_came_between(loop: EventLoop) -> None:
    arrived, asleep = threading.Event(), threading.Event()

    async def script(exchange: Exchange) -> None:
        arrived.set()
        await wait_for(asleep)
        await exchange.start("application/json", 400)
        await exchange.chunk(b'{"error": "too long"}', last=True)

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        response = interrupted_answer(served, arrived, asleep)
        assert (response.status_code, response.content) == (400, b'{"error": "too long"}')


@pytest.mark.parametrize(
    ("path", "end", "interrupted"),
    [
        ("/v1/chat/completions", b"", True),  # neither finished nor done
        ("/v1/chat/completions", b'data: {"choices":[{"finish_reason":"stop"}]}\n\n', False),
        ("/v1/responses", b"", True),
        ("/v1/responses", b'data: {"type":"response.completed"}\n\n', True),  # it says so of aborted ones too
    ],
)
def test_a_stream_that_just_ends_after_the_sleep_is_believed_only_if_it_was_finished(
    loop: EventLoop, path: str, end: bytes, interrupted: bool
) -> None:
    asleep = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(asleep)
        await exchange.chunk(end, last=True)

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        with served.client.stream("POST", path, json={"model": "a", "stream": True}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            interrupt(served)
            asleep.set()
            rest = b"".join(chunks)
    assert (b"request_interrupted" in rest) is interrupted
    if not interrupted:
        assert rest == end


def test_an_answer_of_unknown_length_that_goes_on_after_the_sleep_is_cut_off(loop: EventLoop) -> None:
    asleep = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start("audio/wav")
        await exchange.chunk(b"one")
        await wait_for(asleep)
        await exchange.chunk(b"two", last=True)

    with gateway(loop, policy={"drain": False}) as served:
        served.a.script, served.b.script = script, echo
        with served.client.stream("POST", "/v1/chat/completions", json={"model": "a"}) as response:
            chunks = response.iter_raw()
            assert next(chunks) == b"one"
            interrupt(served)
            asleep.set()
            with pytest.raises(httpx.RemoteProtocolError):
                next(chunks)
        counts_come_back_to_zero(served)


def test_a_client_that_reads_no_more_holds_up_nobody_once_its_model_sleeps(loop: EventLoop) -> None:
    stop = threading.Event()

    async def endless(exchange: Exchange) -> None:
        await exchange.start()
        while not stop.is_set():
            await exchange.chunk(b"data: " + b"x" * 60_000 + b"\n\n")

    with gateway(loop, policy={"drain_timeout": 0.2}) as served:
        served.a.script, served.b.script = endless, echo
        parts = urlsplit(served.url)
        body = b'{"model":"a","stream":true}'
        with socket.create_connection((parts.hostname or "", parts.port or 0)) as stalled:
            head = f"POST {parts.path}/v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            stalled.sendall(head.encode() + body)
            eventually("it is being served", lambda: served.app.switcher.statistics().in_flight["a"] == 1)
            interrupt(served)
            counts_come_back_to_zero(served)  # although the client is still there
            stop.set()
