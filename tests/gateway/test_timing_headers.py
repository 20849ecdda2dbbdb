"""What answers tell of their times: `Server-Timing` and the headers of the gateway's own."""

from __future__ import annotations

import re

import httpx
import pytest

from llmux_asgi import LLMuxMiddleware, UpstreamError
from llmux_asgi._timing import with_times
from tests.gateway.conftest import gateway
from tests.gateway.scripts import echo
from tests.support.pool import Pool
from tests.support.serve import EventLoop
from tests.support.upstream import Exchange
from tests.test_middleware import Connection, call


def timing(answer: httpx.Response) -> dict[str, float]:
    """The last of the `Server-Timing` headers, which is the gateway's."""
    last = answer.headers.get_list("server-timing")[-1]
    assert re.fullmatch(r"\w+;dur=\d+\.\d{3}(, \w+;dur=\d+\.\d{3})*", last)
    return {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", last)}


def ours(answer: httpx.Response) -> set[str]:
    return {name for name in answer.headers if name.startswith("x-llmux-") or name == "server-timing"}


def test_an_answer_tells_what_its_request_waited_for(loop: EventLoop) -> None:
    async def telling(exchange: Exchange) -> None:
        await exchange.start("text/event-stream", 200, (b"server-timing", b"gpu;dur=7"), (b"X-LLMux-Model", b"forged"))
        await exchange.chunk(b"data: 1\n\n")
        await exchange.chunk(b"data: [DONE]\n\n", last=True)

    with gateway(loop, timing_headers=True, b={"aliases": ["other"]}) as running:
        running.a.script, running.b.script = echo, telling
        running.chat("a")
        at_once, switched = running.chat("a"), running.chat("other")
    assert timing(at_once).keys() == {"queue", "upstream"}
    assert timing(at_once)["queue"] == 0
    assert (at_once.headers["x-llmux-switched"], at_once.headers["x-llmux-queue-time"]) == ("false", "0.000000")
    assert switched.text.endswith("[DONE]\n\n")
    times = timing(switched)
    assert times.keys() == {"queue", "switch", "upstream"}
    assert times["queue"] >= times["switch"] > 0
    assert float(switched.headers["x-llmux-queue-time"]) * 1000 == pytest.approx(times["queue"])
    assert switched.headers["x-llmux-switched"] == "true"
    assert switched.headers.get_list("x-llmux-model") == ["b"]
    assert switched.headers.get_list("server-timing")[0] == "gpu;dur=7"


def test_an_error_tells_what_is_known() -> None:
    with gateway("asyncio", timing_headers=True, b={"url": "http://127.0.0.1:9"}) as running:
        no_model, no_server = running.chat("nobody"), running.chat("b")
    assert (no_model.status_code, ours(no_model)) == (404, set())
    assert no_server.status_code == 503
    assert no_server.headers["x-llmux-model"] == "b"
    assert timing(no_server).keys() == {"queue"}
    assert timing(no_server)["queue"] > 0


@pytest.mark.anyio
async def test_an_error_of_the_gateways_own_has_no_time_of_a_server() -> None:
    pool = Pool(awake="a")

    async def inner(scope: object, receive: object, send: object) -> None:
        raise UpstreamError("a", "broke off")

    connection = Connection(b'{"model": "a"}')
    await call(LLMuxMiddleware(inner, pool.switcher, timing_headers=True), connection)
    await pool.switcher.aclose()
    headers = dict(connection.sent[0]["headers"])
    assert connection.status == 502
    assert headers[b"x-llmux-model"] == b"a"
    assert b"upstream" not in headers[b"server-timing"]


def test_it_is_off_unless_it_is_configured() -> None:
    with gateway("asyncio") as running:
        running.a.script = echo
        assert ours(running.chat("a")) == set()


def test_a_name_that_no_header_could_carry_is_percent_encoded() -> None:
    for model, told in (('Qwen/Qwen3-14B: "best"', b'Qwen/Qwen3-14B: "best"'), ("ü%\r\n", b"%C3%BC%25%0D%0A")):
        assert with_times([], model, queue=None) == [(b"x-llmux-model", told)]
