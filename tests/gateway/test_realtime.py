"""`/v1/realtime`: messages both ways under a lease, how each side learns of the end, and what is refused before that."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection

from tests.gateway.conftest import Gateway, gateway
from tests.gateway.scripts import counts_come_back_to_zero, relay_to
from tests.support.eventually import eventually
from tests.support.serve import EventLoop, free_port
from tests.support.upstream import ScriptedServer


class Talker(ScriptedServer):
    """Speaks WebSocket too: echoes every message, and closes or breaks off when it is told to."""

    def __init__(self, *, asleep: bool = False) -> None:
        super().__init__(asleep=asleep)
        self.paths: list[str] = []
        self.closed: list[tuple[int, str]] = []
        self.refuses = False
        self.offered: list[str] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            await super().__call__(scope, receive, send)
            return
        await receive()
        self.paths.append(f"{scope['path']}?{scope['query_string'].decode()}")
        self.offered = scope["subprotocols"]
        if self.refuses:
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "websocket.accept", "subprotocol": next(iter(self.offered), None)})
        await send({"type": "websocket.send", "text": '{"type": "session.created"}'})
        while (message := await receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            if text == "close":
                await send({"type": "websocket.close", "code": 4321, "reason": "enough"})
            elif text == "large":
                await send({"type": "websocket.send", "bytes": b"x" * 5000})
            elif text == "break":
                raise RuntimeError("breaks off")
            elif text is not None:
                await send({"type": "websocket.send", "text": text})
            else:
                await send({"type": "websocket.send", "bytes": message["bytes"]})
        self.closed.append((message["code"], message.get("reason") or ""))


@contextmanager
def talking(loop: EventLoop, **config: Any) -> Iterator[Gateway]:
    limits = {"max_message": 4096, **config.pop("limits", {})}
    models: dict[str, Any] = {"a": {"served_name": "A"}, "b": {"aliases": ["org/b"], "tasks": ["realtime"]}}
    with gateway(loop, servers=(Talker(), Talker(asleep=True)), limits=limits, **models, **config) as running:
        yield running


@pytest.fixture(scope="module")
def spoken(loop: EventLoop) -> Iterator[Gateway]:
    with talking(loop) as running:
        yield running


def opened(served: Gateway, path: str = "/v1/realtime?model=a", **options: Any) -> ClientConnection:
    """The WebSocket, for a `with` block."""
    options = {"open_timeout": 10, "close_timeout": 5, "compression": None, **options}
    websocket: ClientConnection = connect(served.url.replace("http", "ws") + path, **options)
    return websocket


def talker(server: ScriptedServer) -> Talker:
    assert isinstance(server, Talker)
    server.closed.clear()
    server.paths.clear()
    server.refuses = False
    return server


def end_of(websocket: ClientConnection) -> tuple[int | None, str | None]:
    with suppress(ConnectionClosed):
        while True:
            websocket.recv(timeout=10)
    return websocket.close_code, websocket.close_reason


def test_a_websocket_is_counted_and_logged_as_any_request_is(loop: EventLoop, tmp_path: Path) -> None:
    reader, log = InMemoryMetricReader(), tmp_path / "requests.jsonl"
    meters = {"meter_provider": MeterProvider([reader])}
    with talking(loop, app=meters, request_log=str(log)) as served:
        with opened(served, "/v1/realtime?model=b") as websocket:
            websocket.recv(timeout=10)
        talker(served.b).refuses = True
        with pytest.raises(InvalidStatus), opened(served, "/v1/realtime?model=b"):
            pass
        with pytest.raises(InvalidStatus), opened(served, "/v1/realtime?model=unknown"):
            pass
        counts_come_back_to_zero(served)
        eventually("both lines are there", lambda: log.exists() and len(log.read_text().splitlines()) == 2)
        expected = {("b", 101): 1, ("b", 502): 1, ("", 404): 1}
        eventually("all are counted", lambda: _counted(reader) == expected)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(entry["model"], entry["status"]) for entry in entries] == [("b", 101), ("b", 502)]
    assert entries[0]["waited"] > 0  # for the switch


def _counted(reader: InMemoryMetricReader) -> dict[tuple[Any, Any], Any]:
    """`llmux.requests` by model and status."""
    data = reader.get_metrics_data()
    assert data is not None
    points: list[Any] = [
        point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "llmux.requests"
        for point in metric.data.data_points
    ]
    return {(each.attributes["llmux.model"], each.attributes["http.response.status_code"]): each.value for each in points}


def test_messages_go_both_ways_under_a_lease(spoken: Gateway, loop: EventLoop) -> None:
    a = talker(spoken.a)
    with opened(spoken, subprotocols=["realtime"]) as websocket:
        assert websocket.subprotocol == "realtime"
        assert json.loads(websocket.recv(timeout=10)) == {"type": "session.created"}
        assert spoken.app.switcher.statistics().in_flight["a"] == 1
        for message in ("héllo", "", b"\x00\xff", "x" * 4000, '{"type": "other", "model": "q"}', "{"):
            websocket.send(message)
            assert websocket.recv(timeout=10) == message
        assert a.paths == ["/v1/realtime?model=a"]
        websocket.close(4000, "done")
    counts_come_back_to_zero(spoken)
    # hypercorn does not tell its app which code the client has sent.
    told = (4000, "done") if loop == "asyncio" else (1001, "")
    eventually("the server is told", lambda: a.closed == [told])


@pytest.mark.parametrize("named", ['"a"', '"A"', '"q"', "null"])
def test_a_session_update_gets_the_name_that_the_server_knows(spoken: Gateway, named: str) -> None:
    with opened(spoken) as websocket:
        websocket.recv(timeout=10)
        websocket.send(f'{{"type": "session\\u002eupdate", "model": {named}, "é": 1.0}}')
        assert websocket.recv(timeout=10) == '{"type": "session\\u002eupdate", "model": "A", "é": 1.0}'


def test_a_session_update_that_names_two_models_ends_it(spoken: Gateway) -> None:
    with opened(spoken) as websocket:
        websocket.send('{"type": "session.update", "model": "a", "model": "b"}')
        assert end_of(websocket)[0] == 1008


def test_the_model_is_woken_first_and_may_be_named_by_the_path(spoken: Gateway) -> None:
    talker(spoken.b)
    with opened(spoken, "/models/org/b/v1/realtime") as websocket:
        websocket.recv(timeout=10)
        assert talker(spoken.b).asleep is False
    with opened(spoken, "/v1/realtime", additional_headers={"x-llmux-model": "a"}) as websocket:
        websocket.recv(timeout=10)
        assert spoken.app.switcher.statistics().in_flight["a"] == 1
    counts_come_back_to_zero(spoken)


@pytest.mark.parametrize(
    ("word", "code", "reason"),
    [
        ("close", 4321, "enough"),
        ("large", 1009, "a message is larger than 4096 bytes"),
        ("x" * 5000, 1009, "a message is larger than 4096 bytes"),
    ],
)
def test_the_end_is_passed_on_with_its_code(spoken: Gateway, word: str, code: int, reason: str) -> None:
    with opened(spoken) as websocket:
        websocket.send(word)
        assert end_of(websocket) == (code, reason)
    counts_come_back_to_zero(spoken)


def is_doubted(served: Gateway) -> None:
    """No request is let in before the servers have been asked for their state."""
    counts_come_back_to_zero(served)
    assert served.app.switcher.try_acquire("a") is None


@contextmanager
def breaking_server() -> Iterator[str]:
    """Accepts one WebSocket, sends half a frame, and cuts the connection."""

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            wire = WSConnection(ConnectionType.SERVER)
            wire.receive_data(request)
            list(wire.events())
            connection.sendall(wire.send(AcceptConnection()) + b"\x81\x05ab")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def test_a_server_that_breaks_off_is_told_of_and_doubted(loop: EventLoop) -> None:
    with talking(loop) as served, breaking_server() as url:
        relay_to(served, url)
        with opened(served) as websocket:
            assert end_of(websocket) == (1011, "the server of the model broke off")
        is_doubted(served)


def test_a_server_that_cannot_be_reached_is_a_502(loop: EventLoop) -> None:
    with talking(loop) as served:
        relay_to(served, f"http://127.0.0.1:{free_port()}")
        with pytest.raises(InvalidStatus) as caught, opened(served):
            pass
        assert caught.value.response.status_code == 502
        is_doubted(served)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/realtime?model=nobody", 404),
        ("/v1/realtime", 400),
        ("/v1/realtime?model=a&model=b", 400),
        ("/v1/chat/completions?model=a", 404),
        ("/sleep", 404),
        ("/models/nobody/v1/realtime", 404),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_is_accepted(spoken: Gateway, path: str, status: int) -> None:
    a = talker(spoken.a)
    with pytest.raises(InvalidStatus) as caught, opened(spoken, path):
        pass
    assert caught.value.response.status_code == status
    assert a.paths == []


def test_a_server_that_refuses_is_a_502(spoken: Gateway) -> None:
    talker(spoken.a).refuses = True
    with pytest.raises(InvalidStatus) as caught, opened(spoken):
        pass
    assert caught.value.response.status_code == 502
    assert json.loads(caught.value.response.body or b"")["error"]["code"] == "upstream_error"
    counts_come_back_to_zero(spoken)
    talker(spoken.a)


def test_a_plain_request_for_it_is_not_allowed(spoken: Gateway) -> None:
    assert spoken.client.get("/v1/realtime?model=a").status_code == 404


def test_a_silent_one_is_closed_and_makes_way(loop: EventLoop) -> None:
    with talking(loop, limits={"websocket_idle": 0.2}) as served, opened(served) as websocket:
        with opened(served, "/v1/realtime?model=b"):  # waits for it
            assert talker(served.b).asleep is False
        assert end_of(websocket) == (1001, "no message for 0.2 s")


def test_one_whose_model_is_put_to_sleep_is_told_to_come_again(loop: EventLoop) -> None:
    with talking(loop, policy={"drain": "abort"}) as served, opened(served) as websocket:
        websocket.recv(timeout=10)
        with opened(served, "/v1/realtime?model=b"):
            assert end_of(websocket) == (1012, "the model was put to sleep, or ended")
        counts_come_back_to_zero(served)
