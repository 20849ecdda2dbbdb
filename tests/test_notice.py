"""What a streaming request is told while it waits, with hand-written receive and send. On asyncio and on trio."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from opentelemetry.trace import SpanKind
from starlette.types import Message, Receive, Scope, Send

from llmux_asgi import BackendError, LLMuxMiddleware, UpstreamError
from tests.support.fakes import Gate
from tests.support.pool import LIMIT, Pool
from tests.test_middleware import Connection, call
from tests.test_telemetry import Recorded

pytestmark = pytest.mark.anyio

STREAM = b'{"model": "b", "stream": true}'
HEARTBEAT = 0.01
EVENTS = b'data: {"n":1}\n\ndata: [DONE]\n\n'
SSE = [(b"content-type", b"text/event-stream")]


class Inner:
    """The app behind the middleware: answers in the given way, or raises."""

    def __init__(self, status: int = 200, headers: Any = SSE, *parts: bytes, faults: tuple[Exception, ...] = ()) -> None:
        self.status, self.headers, self.parts = status, headers, parts or (EVENTS[:16], EVENTS[16:])
        self.faults = list(faults)
        self.entered, self.go_on = anyio.Event(), anyio.Event()
        self.go_on.set()
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        await receive()
        self.entered.set()
        await self.go_on.wait()
        if self.faults:
            raise self.faults.pop()
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Scene:
    """A request for b, whose wake stands in a gate."""

    def __init__(self, inner: Inner | None = None, body: bytes = STREAM, **options: Any) -> None:
        self.inner = inner or Inner()
        self.connection = Connection(body, path=options.pop("path", "/v1/chat/completions"))
        pool_options = options.pop("pool", {})
        self.pool = Pool(awake="a", **pool_options)
        self.gate: Gate = self.pool.backends["b"].gate("wake")
        options = {"loading_notice": "comments", "heartbeat": HEARTBEAT, **options}
        self.app = LLMuxMiddleware(self.inner, self.pool.switcher, **options)
        self.early = 0
        """How many notices were out before b was being woken: there may be some on a busy machine."""

    async def run(self, act: Callable[[], Any]) -> None:
        """Have the request wait, do something meanwhile, and return when it is over."""
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.app, self.connection.scope, self.connection.receive, self.connection.send)
                await self.gate.entered.wait()
                self.early = max(len(self.connection.sent) - 1, 0)
                await act()
            self.gate.open.set()
            await self.pool.switcher.aclose()
        self.pool.check()

    async def noticed(self, count: int = 2) -> None:
        """Return when so many notices are out since b is being woken."""
        while len(self.connection.sent) < 1 + self.early + count:
            await anyio.lowlevel.checkpoint()

    async def noticed_and_woken(self) -> None:
        await self.noticed()
        self.gate.open.set()

    @property
    def notices(self) -> bytes:
        """The answer's body up to the last notice."""
        return b"".join(part for part in self.parts if part.startswith(b": "))

    @property
    def rest(self) -> bytes:
        """The answer's body without the notices."""
        return b"".join(part for part in self.parts if not part.startswith(b": "))

    @property
    def parts(self) -> list[bytes]:
        return [message.get("body", b"") for message in self.connection.sent[1:]]

    def assert_one_answer(self) -> None:
        """One head, then parts of a body, of which the last one is the last."""
        sent = self.connection.sent
        assert [message["type"] for message in sent[:2]] == ["http.response.start", "http.response.body"]
        assert {message["type"] for message in sent[1:]} == {"http.response.body"}
        assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]


def error_of(event: bytes) -> Any:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])["error"]


async def test_a_stream_that_waits_gets_comments_and_then_its_answer() -> None:
    scene = Scene()
    await scene.run(scene.noticed_and_woken)
    scene.assert_one_answer()
    assert scene.connection.sent[0]["status"] == 200
    assert dict(scene.connection.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert scene.rest == EVENTS
    first = json.loads(scene.parts[scene.early].removeprefix(b": llmux "))
    assert first.keys() == {"model", "waited", "state", "expected"}
    assert (first["model"], first["state"]) == ("b", "wake")


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (STREAM, {"heartbeat": 1000.0}),  # it is served before the first one is due
        (STREAM, {"loading_notice": "none"}),
        (b'{"model": "b", "stream": false}', {}),
        (b'{"model": "b"}', {}),
        (STREAM, {"path": "/v1/embeddings"}),
    ],
)
async def test_others_get_their_own_status_and_headers(body: bytes, options: Any) -> None:
    scene = Scene(Inner(202, [(b"x-mine", b"1")]), body, **options)

    async def act() -> None:
        if scene.app.notices.interval < 1:
            await anyio.sleep(3 * HEARTBEAT)
        scene.gate.open.set()

    await scene.run(act)
    scene.assert_one_answer()
    assert (scene.connection.status, scene.connection.sent[0]["headers"]) == (202, [(b"x-mine", b"1")])
    assert scene.connection.body == EVENTS


async def test_what_is_expected_gets_less_while_the_switch_goes_on() -> None:
    scene = Scene()
    assert scene.pool.switcher.progress("b") == ("queued", 5.0)  # nothing was measured yet

    async def act() -> None:
        before = scene.pool.switcher.progress("b")
        await scene.noticed()
        after = scene.pool.switcher.progress("b")
        assert (before.state, after.state) == ("wake", "wake")
        assert 0 < after.expected < before.expected <= 5
        assert scene.pool.switcher.progress("a").state == "queued"
        scene.gate.open.set()

    await scene.run(act)


async def test_a_request_that_does_not_wait_has_no_notice() -> None:
    scene = Scene(Inner(201), b'{"model": "a", "stream": true}')
    await scene.pool.switcher.reconcile()
    await call(scene.app, scene.connection)
    assert scene.connection.status == 201


async def test_a_model_that_a_header_names_is_waited_for_in_the_same_way() -> None:
    for body, noticed in ((b'{"stream": true}', True), (b'{"stream": 1}', False), (b"nonsense", False)):
        scene = Scene(Inner(203), body)
        scene.connection.scope["headers"] = [(b"x-llmux-model", b"b")]

        async def act(scene: Scene = scene, noticed: bool = noticed) -> None:
            await (scene.noticed() if noticed else anyio.sleep(2 * HEARTBEAT))
            scene.gate.open.set()

        await scene.run(act)
        assert scene.connection.status == (200 if noticed else 203)


async def test_a_wait_that_takes_too_long_ends_with_an_error_event(tmp_path: Path) -> None:
    log = tmp_path / "log"
    scene = Scene(pool={"request_timeouts": {"b": 20 * HEARTBEAT}}, request_log=log)
    await scene.run(scene.noticed)
    scene.assert_one_answer()
    assert error_of(scene.rest)["code"] == "model_queue_timeout"
    assert scene.inner.calls == 0
    entry = json.loads(log.read_text())
    assert (entry["status"], entry["served"], entry["stream"]) == (504, None, True)


async def test_a_switch_that_fails_and_a_gateway_that_ends_are_told_in_the_stream() -> None:
    scene = Scene()
    scene.pool.backends["b"].fail("wake", BackendError("out of memory"), times=2)
    await scene.run(scene.noticed_and_woken)
    scene.assert_one_answer()
    assert error_of(scene.rest)["code"] == "model_switch_failed"
    scene = Scene()

    async def close() -> None:
        await scene.noticed()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scene.pool.switcher.aclose)
            while scene.connection.sent[-1].get("more_body", True):
                await anyio.lowlevel.checkpoint()
            scene.gate.open.set()

    await scene.run(close)
    scene.assert_one_answer()
    assert error_of(scene.rest)["code"] == "model_switch_failed"


JSON = [(b"content-type", b"application/json")]


@pytest.mark.parametrize(
    ("inner", "told"),
    [
        (Inner(400, JSON, b'{"error": {"message": "no",', b'\n"code": 7}}'), {"message": "no", "code": 7}),
        (Inner(400, JSON, b'{"object": "error", "message": "old"}'), {"object": "error", "message": "old"}),
        (Inner(500, JSON, b"oops"), "answered 500"),
        (Inner(422, JSON, b'["list"]'), "answered 422"),
        (Inner(502, JSON, b"x" * 100_000), "answered 502"),
        (Inner(200, JSON, b'{"error": {"message": "not this"}}'), "answered 200"),
        (Inner(200, [*SSE, (b"content-encoding", b"gzip")], b"\x1f\x8b"), "answered 200"),
    ],
)
async def test_what_is_no_stream_becomes_an_error_event(inner: Inner, told: Any, caplog: pytest.LogCaptureFixture) -> None:
    inner.entered, inner.go_on = anyio.Event(), anyio.Event()  # of this event loop
    inner.go_on.set()
    scene = Scene(inner)
    await scene.run(scene.noticed_and_woken)
    scene.assert_one_answer()
    error = error_of(scene.rest)
    assert error == told if isinstance(told, dict) else told in error["message"]
    assert any("without one" in record.message for record in caplog.records) == (inner.status < 400)


async def test_on_anthropics_route_errors_have_its_shape_and_events_are_pings() -> None:
    for inner, kind in (
        (Inner(400, JSON, b'{"error": {"type": "x", "message": "no"}}'), "x"),
        (Inner(503, JSON, b""), "api_error"),
    ):
        scene = Scene(inner, path="/v1/messages", loading_notice="events")
        await scene.run(scene.noticed_and_woken)
        scene.assert_one_answer()
        *pings, error = [part for part in scene.parts if part]
        assert error.startswith(b"event: error\ndata: ")
        content = json.loads(error.partition(b"data: ")[2])
        assert (content["type"], content["error"]["type"]) == ("error", kind)
        for ping in pings[scene.early :]:
            name, data, *blank = ping.split(b"\n")
            assert (name, blank) == (b"event: ping", [b"", b""])
            assert json.loads(data[6:])["llmux"]["state"] == "wake"


async def test_on_chat_events_show_how_far_things_are() -> None:
    scene = Scene(loading_notice="events")
    await scene.run(scene.noticed_and_woken)
    chunk = json.loads(scene.parts[scene.early][6:])
    assert (chunk["object"], chunk["model"], chunk["llmux"]["state"]) == ("chat.completion.chunk", "b", "wake")
    text = chunk["choices"][0]["delta"]["reasoning_content"]
    assert text == "Waiting for b (0 s so far): it is being loaded. About 5 s to go.\n"  # and nothing of other models
    scene = Scene(loading_notice="events", path="/v1/responses")  # its events have an order that nothing else fits into
    await scene.run(scene.noticed_and_woken)
    assert scene.parts[0].startswith(b": ")


async def test_a_client_that_leaves_gets_nothing_more() -> None:
    scene = Scene()

    async def leave() -> None:
        await scene.noticed()
        scene.connection.gone.set()

    await scene.run(leave)
    sent = len(scene.connection.sent)
    await anyio.sleep(3 * HEARTBEAT)
    assert len(scene.connection.sent) == sent
    assert scene.inner.calls == 0


async def test_a_host_that_cancels_leaves_nothing_behind() -> None:
    scene = Scene()
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(scene.app, scene.connection.scope, scene.connection.receive, scene.connection.send)
            await scene.noticed()
            tasks.cancel_scope.cancel()
        sent = len(scene.connection.sent)
        scene.gate.open.set()
        await scene.pool.switcher.aclose()
        await anyio.sleep(3 * HEARTBEAT)
    assert len(scene.connection.sent) == sent
    scene.pool.check()


async def test_they_go_on_until_the_answer_begins() -> None:
    scene = Scene()
    scene.inner.go_on = anyio.Event()

    async def act() -> None:
        await scene.noticed_and_woken()
        await scene.inner.entered.wait()
        await scene.noticed(len(scene.connection.sent) + 2)
        scene.inner.go_on.set()

    await scene.run(act)
    scene.assert_one_answer()
    assert scene.rest == EVENTS
    assert scene.connection.body.endswith(EVENTS)  # and not from then on


async def test_the_answer_waits_for_a_notice_that_is_on_its_way() -> None:
    scene = Scene()
    sending, sent = anyio.Event(), anyio.Event()
    plain, busy = scene.connection.send, 0

    async def send(message: Message) -> None:
        nonlocal busy
        assert not busy, "two messages at a time"
        busy += 1
        if message.get("body", b"").startswith(b": ") and not sending.is_set():
            sending.set()
            await sent.wait()
        await plain(message)
        busy -= 1

    scene.connection.send = send  # type: ignore[method-assign]

    async def act() -> None:
        await sending.wait()
        scene.gate.open.set()
        await scene.inner.entered.wait()
        await anyio.sleep(HEARTBEAT)
        assert len(scene.connection.sent) == 1
        sent.set()

    await scene.run(act)
    scene.assert_one_answer()
    assert scene.connection.body.endswith(EVENTS)


async def test_a_request_that_is_sent_once_more_goes_on_with_the_same_stream() -> None:
    scene = Scene(Inner(faults=(UpstreamError("b", "broke off.", may_retry=True),)))
    await scene.run(scene.noticed_and_woken)
    scene.assert_one_answer()
    assert (scene.inner.calls, scene.rest) == (2, EVENTS)


async def test_a_server_that_cannot_send_any_more_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "llmux_asgi._notice")
    scene = Scene()
    tried = anyio.Event()

    async def send(message: Message) -> None:
        tried.set()
        raise OSError("the client is gone")

    scene.connection.send = send  # type: ignore[method-assign]

    async def act() -> None:
        await tried.wait()
        scene.connection.gone.set()

    await scene.run(act)
    assert "a notice could not be sent: OSError('the client is gone')" in caplog.messages


async def test_spans_and_metrics_have_the_answers_first_byte_and_the_status_that_it_would_have_had() -> None:
    for inner, status in ((Inner(), 200), (Inner(429, JSON, b'{"error": {"message": "no"}}'), 429)):
        recorded = Recorded()
        scene = Scene(inner, pool={"telemetry": recorded.telemetry})
        await scene.run(scene.noticed_and_woken)
        scene.assert_one_answer()
        (span,) = [span for span in recorded.spans if span.kind is SpanKind.SERVER]
        assert span.attributes is not None
        assert span.attributes["http.response.status_code"] == status
        (first,) = recorded.metric("llmux.request.time_to_first_byte")
        assert (first.count, first.attributes["llmux.streamed"]) == (1, status == 200)
