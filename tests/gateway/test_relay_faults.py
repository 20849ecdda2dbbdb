"""Servers that refuse, break off, fall silent or misbehave while a request is relayed to them."""

from __future__ import annotations

import json
import threading
import zlib

import httpx
import pytest

from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import EVENTS, counts_come_back_to_zero, echo, relay_to
from tests.support.serve import EventLoop, free_port
from tests.support.upstream import Exchange, closing_server, wait_for


def test_a_request_that_got_no_answer_is_not_sent_again(loop: EventLoop) -> None:
    """It may have been executed, and have been what killed the engine."""
    with gateway(loop) as served, closing_server(b"") as (url, requests):
        relay_to(served, url)
        response = served.chat()
        assert response.status_code == 502
        assert "The server of the model 'a' broke off: " in response.json()["error"]["message"]
        assert len(requests) == 1


def test_a_server_that_closes_its_connection_after_each_error_fails_no_other_request(loop: EventLoop) -> None:
    """As vLLM does after a 500, without saying so."""
    with gateway(loop) as served, closing_server(b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\n{}") as (url, requests):
        relay_to(served, url)
        assert [served.chat().content for _ in range(20)] == [b"{}"] * 20
        assert len(requests) == 20


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


def test_a_stream_that_breaks_ends_with_an_error_event_and_is_logged_once(
    served: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert [record.levelname for record in caplog.records if event["error"]["message"] in record.message] == ["WARNING"]


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
    arrived = threading.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.start()
        for _ in range(40):
            await exchange.chunk(b"x" * 65536)
        await wait_for(arrived)
        await exchange.chunk(b"", last=True)

    served.a.script = script
    with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        size = 0
        for chunk in response.iter_raw():
            size += len(chunk)
            arrived.set()
    assert size == 40 * 65536


def test_a_stream_that_is_compressed_all_the_same_arrives_chunk_by_chunk(served: Gateway) -> None:
    arrived = threading.Event()
    compressor = zlib.compressobj(wbits=31)
    first = compressor.compress(EVENTS[0]) + compressor.flush(zlib.Z_SYNC_FLUSH)
    last = compressor.compress(EVENTS[1]) + compressor.flush()

    async def script(exchange: Exchange) -> None:
        await exchange.start("text/event-stream", 200, (b"content-encoding", b"gzip"))
        await exchange.chunk(first)
        await wait_for(arrived)
        await exchange.chunk(last, last=True)

    served.a.script = script
    with served.client.stream("POST", "/v1/chat/completions", json={"model": "a", "stream": True}) as response:
        chunks = response.iter_raw()
        assert next(chunks) == first
        arrived.set()
        assert b"".join(chunks) == last
