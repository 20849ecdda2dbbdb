"""The limits of API keys as a client sees them, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from llmux_asgi.access import hash_key
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.keys import as_new, ask, bearer, in_flight, key_of, left
from tests.gateway.scripts import counts_come_back_to_zero, echo
from tests.gateway.test_app import error
from tests.support.eventually import eventually
from tests.support.serve import EventLoop
from tests.support.upstream import Exchange, wait_for

LIMITS: dict[str, dict[str, Any]] = {
    "open": {},
    "three": {"requests_per_minute": 3},
    "tokens": {"tokens_per_minute": 100},
    "stream": {"tokens_per_minute": 1000},
    "events": {"tokens_per_minute": 1000},
    "failed": {"tokens_per_minute": 1000, "requests_per_minute": 10},
    "one": {"max_concurrent": 1},
    "leaver": {"max_concurrent": 1},
    "queuer": {"max_concurrent": 1, "requests_per_minute": 5, "tokens_per_minute": 1000},
}


@pytest.fixture(scope="module")
def limited(loop: EventLoop) -> Iterator[Gateway]:
    keys = {name: {"hash": hash_key(key_of(name)), **limits} for name, limits in LIMITS.items()}
    with gateway(loop, access={"keys": keys}) as running:
        yield running


@pytest.fixture
def served(limited: Gateway) -> Gateway:
    as_new(limited)
    return limited


def test_requests_are_counted_and_told_and_the_last_one_is_a_429(served: Gateway) -> None:
    assert [left(ask(served, bearer("three"))) for _ in range(3)] == [2, 1, 0]
    response = ask(served, bearer("three"))
    assert response.status_code == 429
    told = error(response)
    assert (told["type"], told["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "3 requests per minute" in told["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 20
    assert response.headers["x-ratelimit-limit-requests"] == "3"
    assert response.headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-tokens" not in response.headers
    assert left(served.client.get("/v1/models", headers=bearer("three"))) == 0
    assert len(served.a.requests) == 3


def test_tokens_are_taken_from_what_the_answer_says(served: Gateway) -> None:
    assert ask(served, bearer("tokens"), usage={"total_tokens": 60}).status_code == 200  # it is echoed
    response = ask(served, bearer("tokens"), max_tokens=10, usage={"prompt_tokens": 50, "completion_tokens": 41})
    assert response.status_code == 200
    assert left(response, "tokens") < 30  # the estimate is taken already
    response = ask(served, bearer("tokens"))
    assert response.status_code == 429
    assert "100 tokens per minute" in error(response)["message"]
    assert 20 <= int(response.headers["retry-after"]) <= 32  # 51 are missing, 100 a minute come in
    assert left(response, "tokens") == 0


@pytest.mark.parametrize(("name", "tells"), [("stream", True), ("events", False)])
def test_a_stream_takes_what_it_says_or_else_an_estimate(served: Gateway, name: str, tells: bool) -> None:
    async def stream(exchange: Exchange) -> None:
        await exchange.start()
        for _ in range(40):
            await exchange.chunk(b'data: {"choices":[{"delta":{"content":"x"}}],"usage":null}\n\n')
        if tells:
            await exchange.chunk(b'data: {"choices":[],"usage":{"prompt_tokens":300,"total_tokens":340}}\n\n')
        await exchange.chunk(b"data: [DONE]\n\n", last=True)

    served.a.script = stream
    assert ask(served, bearer(name), stream=True).text.count("data:") >= 41
    rest = left(served.client.get("/v1/models", headers=bearer(name)), "tokens")
    assert 655 <= rest <= 680 if tells else 930 <= rest <= 970


def test_an_answer_with_an_error_takes_a_request_and_no_tokens(served: Gateway) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.start("application/json", 400)
        await exchange.chunk(b'{"error": {}, "usage": {"total_tokens": 700}}', last=True)

    served.a.script = refuse
    assert ask(served, bearer("failed")).status_code == 400
    response = served.client.get("/v1/models", headers=bearer("failed"))
    assert (left(response), left(response, "tokens")) == (9, 1000)
    # What never reached a server takes neither.
    assert served.client.post("/v1/completions", content=b"{", headers=bearer("failed")).status_code == 400
    response = ask(served, bearer("failed") | {"x-llmux-priority": "no such class"})
    assert response.status_code == 400
    assert left(response) == 9


def test_only_so_many_requests_of_a_key_run_at_once(served: Gateway) -> None:
    go_on = threading.Event()

    async def hold(exchange: Exchange) -> None:
        await wait_for(go_on)
        await echo(exchange)

    served.a.script = hold
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(ask, served, bearer("one"))
        eventually("it runs", lambda: len(served.a.requests) == 1)
        response = ask(served, bearer("one"))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert "1 requests at once" in error(response)["message"]
        go_on.set()
        assert running.result().status_code == 200
    # A client that has its answer may send the next request at once.
    assert [ask(served, bearer("one")).status_code for _ in range(10)] == [200] * 10
    assert in_flight(served, "one") == 0


def test_a_client_that_leaves_in_the_middle_of_an_answer_gives_its_place_back(served: Gateway) -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b"data: 1\n\n")
        await exchange.client_left()

    served.a.script = endless
    for _ in range(3):
        body = {"model": "a", "stream": True}
        with served.client.stream("POST", "/v1/completions", json=body, headers=bearer("leaver")) as response:
            assert response.status_code == 200
            assert in_flight(served, "leaver") == 1
        eventually("its place is free", lambda: in_flight(served, "leaver") == 0)
    counts_come_back_to_zero(served)


def test_a_client_that_leaves_the_queue_has_taken_nothing(served: Gateway) -> None:
    go_on = threading.Event()

    async def hold(exchange: Exchange) -> None:
        await wait_for(go_on)
        await echo(exchange)

    served.a.script = hold
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(ask, served, bearer("open"))
        eventually("a is busy", lambda: len(served.a.requests) == 1)
        for _ in range(2):
            with httpx.Client(base_url=served.url, timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={"model": "b"}, headers=bearer("queuer"))
            eventually("its place is free", lambda: in_flight(served, "queuer") == 0)
        go_on.set()
        assert running.result().status_code == 200
    response = served.client.get("/v1/models", headers=bearer("queuer"))
    assert (left(response), left(response, "tokens")) == (5, 1000)
    assert served.b.requests == []
