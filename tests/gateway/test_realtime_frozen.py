"""WebSockets of a model that a switch stops in the middle and that go on at its next turn (`drain: preempt`)."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.contract.driver import Call
from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import EVENTS, counts_come_back_to_zero
from tests.gateway.test_realtime import Talker, end_of, opened
from tests.support.eventually import eventually
from tests.support.serve import EventLoop
from tests.support.upstream import Exchange, wait_for

HEARTBEAT = 0.05


@contextmanager
def preempting(loop: EventLoop, *, idle: float = 60, **policy: float) -> Iterator[Gateway]:
    """A gateway that leaves the model a at once when b is asked for, and b when it is idle."""
    chosen = {"name": "gated_quantum", "linger": 0, "drain": "preempt", **policy}
    dear = {"costs": {"wake": 1000}}
    limits = {"heartbeat": HEARTBEAT, "websocket_idle": idle}
    servers = (Talker(), Talker(asleep=True))
    with gateway(loop, servers, policy=chosen, limits=limits, loading_notice="none", a=dear, b=dear) as served:
        yield served


class Other:
    """A request for b that holds it until it is told to end."""

    def __init__(self, served: Gateway, frozen: int = 1) -> None:
        self._served = served
        self._over = threading.Event()

        async def script(exchange: Exchange) -> None:
            await exchange.start("application/json")
            await wait_for(self._over)
            await exchange.chunk(b"{}", last=True)

        served.b.script = script
        self._call = Call(lambda: httpx.post(served.url + "/v1/chat/completions", json={"model": "b"}, timeout=10))
        eventually("frozen", lambda: served.app.switcher.statistics().frozen["a"] == frozen)

    def end(self) -> None:
        self._over.set()
        assert self._call.response().status_code == 200


def test_a_frozen_websocket_goes_on_at_its_models_next_turn(loop: EventLoop) -> None:
    with preempting(loop) as served:
        with opened(served) as websocket:
            assert json.loads(websocket.recv(timeout=10)) == {"type": "session.created"}
            other = Other(served)
            assert served.a.asleep
            other.end()
            eventually("thawed", lambda: not served.a.asleep)
            websocket.send("hello")
            assert websocket.recv(timeout=10) == "hello"
        counts_come_back_to_zero(served)


def test_the_silence_of_a_frozen_websocket_is_no_idleness(loop: EventLoop) -> None:
    idle = 30 * HEARTBEAT  # on a busy machine it takes a while until it is frozen
    go_on = threading.Event()

    async def stream(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(EVENTS[0])
        await wait_for(go_on)
        await exchange.chunk(EVENTS[-1], last=True)

    with preempting(loop, idle=idle) as served:
        served.a.script = stream
        body = {"model": "a", "stream": True}
        with opened(served) as websocket, served.client.stream("POST", "/v1/chat/completions", json=body) as response:
            websocket.recv(timeout=10)
            chunks = response.iter_raw()
            assert next(chunks) == EVENTS[0]
            other = Other(served, frozen=2)
            for _ in range(35):  # longer than it may be silent otherwise
                assert next(chunks).startswith(b": ")
            other.end()
            eventually("thawed", lambda: not served.a.asleep)
            websocket.send("hello")
            assert websocket.recv(timeout=10) == "hello"
            go_on.set()
            assert b"".join(chunks).endswith(EVENTS[-1])
        counts_come_back_to_zero(served)


def test_a_websocket_that_is_frozen_for_too_long_is_closed_and_says_why(loop: EventLoop) -> None:
    with preempting(loop, max_frozen=3 * HEARTBEAT) as served:
        with opened(served) as websocket:
            websocket.recv(timeout=10)
            other = Other(served)
            code, reason = end_of(websocket)
            assert (code, reason) == (1013, "the model's next turn did not come")
            eventually("its place is free", lambda: served.app.switcher.statistics().frozen["a"] == 0)
            other.end()
        counts_come_back_to_zero(served)
