"""Spans and metrics: in memory, and over real OTLP/HTTP to a receiver that decodes the official protobufs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import httpx
import pytest
from opentelemetry import baggage
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import get_global_textmap, inject, set_global_textmap
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import TextMapPropagator, default_getter, default_setter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from llmux_asgi import BackendError, FifoPolicy, LLMuxApp, LLMuxMiddleware, Phase
from llmux_asgi.telemetry import Telemetry, inject_headers
from tests.gateway.conftest import gateway
from tests.gateway.scripts import echo
from tests.support.otlp import receive_spans
from tests.support.pool import LIMIT, Pool, running, until_phase, until_waiting
from tests.support.serve import EventLoop, serve
from tests.support.upstream import Exchange, Script, ScriptedServer
from tests.test_middleware import Connection, Inner, call

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Recorded:
    """Spans and metrics of one pool, kept in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.telemetry = Telemetry(self.provider, MeterProvider([self.reader]))

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def metric(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        assert data is not None
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == name]
        return [point for metric in metrics for point in metric.data.data_points]


def ids(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


@pytest.mark.anyio
async def test_a_switch_is_a_tree_under_the_request_that_began_it_and_linked_both_ways() -> None:
    recorded = Recorded()
    pool = Pool(FifoPolicy(min_active_duration=0), awake="a", telemetry=recorded.telemetry)
    app = LLMuxMiddleware(Inner(pool), pool.switcher)
    await call(app, Connection(b'{"model": "a"}'))
    connection = Connection(b'{"model": "b", "stream": true}', headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x": "y"})
    await call(app, connection)
    await pool.switcher.aclose()

    first, second = recorded.named("llmux.request")
    [switch] = recorded.named("llmux.switch")
    phases = [span for span in recorded.spans if span.parent and span.parent.span_id == ids(switch)[1]]
    assert [span.name for span in phases] == ["cooldown", "drain", "sleep", "wake", "ready"]
    assert second.parent is not None
    assert f"{second.parent.trace_id:032x}" == TRACE
    assert f"{second.parent.span_id:016x}" == PARENT
    assert switch.parent is not None
    assert (switch.parent.trace_id, switch.parent.span_id) == ids(second)
    assert [(link.context.trace_id, link.context.span_id) for link in switch.links] == [ids(second)]
    assert [(link.context.trace_id, link.context.span_id) for link in second.links] == [ids(switch)]
    assert first.links == ()
    assert second.kind is SpanKind.SERVER

    assert second.attributes is not None
    assert dict(second.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "b",
        "gen_ai.request.stream": True,
        "llmux.model": "b",
        "llmux.queue_time": second.attributes["llmux.queue_time"],
        "http.response.status_code": 201,
    }
    assert switch.attributes == {
        "llmux.switch.from": "a",
        "llmux.switch.to": "b",
        "llmux.switch.sleep_level": 1,
        "llmux.switch.policy": "FifoPolicy",
        "llmux.switch.waiting": 1,
        "llmux.switch.in_flight": 0,
        "llmux.switch.outcome": "completed",
    }
    [duration] = recorded.metric("llmux.switch.duration")
    assert duration.attributes == {"llmux.switch.from": "a", "llmux.switch.to": "b", "llmux.switch.outcome": "completed"}
    assert {(p.attributes["llmux.model"], p.value) for p in recorded.metric("llmux.requests")} == {("a", 1), ("b", 1)}
    assert {p.attributes["llmux.model"] for p in recorded.metric("llmux.queue.time")} == {"a", "b"}


@pytest.mark.anyio
async def test_a_failed_switch_and_its_requests_are_errors_with_the_exception() -> None:
    recorded = Recorded()
    pool = Pool(telemetry=recorded.telemetry)
    pool.backends["a"].fail("wake", BackendError("out of memory"), times=2)
    await call(LLMuxMiddleware(Inner(pool), pool.switcher), Connection(b'{"model": "a"}'))
    await pool.switcher.aclose()
    [request], [switch], [first, second] = (recorded.named(name) for name in ("llmux.request", "llmux.switch", "wake"))
    for span, kind in ((request, "SwitchError"), (switch, "BackendError"), (first, None), (second, None)):
        assert span.status.status_code is StatusCode.ERROR
        assert "out of memory" in (span.status.description or "")
        assert [event.name for event in span.events] == ["exception"]
        assert span.attributes is not None
        assert span.attributes.get("error.type") == kind
    assert switch.attributes is not None
    assert switch.attributes["llmux.switch.outcome"] == "failed"


@pytest.mark.anyio
async def test_all_that_waited_for_a_switch_are_linked_with_it_both_ways_whenever_they_came() -> None:
    recorded = Recorded()
    pool = Pool(telemetry=recorded.telemetry)
    app = LLMuxMiddleware(Inner(pool), pool.switcher)
    for fails in (False, True):
        recorded.exporter.clear()
        gate = pool.backends["a" if not fails else "b"].gate("wake")
        if fails:
            pool.backends["b"].fail("wake", BackendError("out of memory"), times=2)
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call, app, Connection(b'{"model": "%s"}' % (b"b" if fails else b"a")))
                await gate.entered.wait()
                late = Connection(b'{"model": "%s"}' % (b"b" if fails else b"a"))
                tasks.start_soon(call, app, late)
                while sum(pool.switcher.statistics().waiting.values()) < 2:
                    await anyio.lowlevel.checkpoint()
                gate.open.set()
        [switch] = recorded.named("llmux.switch")
        requests = recorded.named("llmux.request")
        linked = {(link.context.trace_id, link.context.span_id) for link in switch.links}
        assert linked == {ids(request) for request in requests}
        assert [[(link.context.trace_id, link.context.span_id) for link in request.links] for request in requests] == [
            [ids(switch)],
            [ids(switch)],
        ]
    await pool.switcher.aclose()


@pytest.mark.anyio
async def test_a_switch_that_nobody_waits_for_any_more_says_that_it_was_abandoned() -> None:
    recorded = Recorded()
    pool = Pool(FifoPolicy(min_active_duration=0), awake="a", telemetry=recorded.telemetry)
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        second.scope.cancel()
        await second.done.wait()
        first.finish.set()
    [switch] = recorded.named("llmux.switch")
    assert switch.attributes is not None
    assert switch.attributes["llmux.switch.outcome"] == "abandoned"
    assert switch.status.status_code is StatusCode.UNSET
    assert switch.links == ()  # who waited had no span to link to


@pytest.mark.anyio
async def test_the_configured_name_is_told_beside_the_alias_that_was_used() -> None:
    recorded = Recorded()
    pool = Pool(awake="a", aliases={"gpt": "a"}, telemetry=recorded.telemetry)
    await call(LLMuxMiddleware(Inner(pool), pool.switcher), Connection(b'{"model": "gpt"}'))
    [request] = recorded.named("llmux.request")
    assert request.attributes is not None
    assert (request.attributes["gen_ai.request.model"], request.attributes["llmux.model"]) == ("gpt", "a")


@pytest.mark.anyio
@pytest.mark.parametrize(("asked", "told"), [({"x-llmux-priority": "high"}, "high"), ({}, "low")])
async def test_a_request_has_its_priority_class(asked: dict[str, str], told: str) -> None:
    recorded = Recorded()
    priorities = {"priorities": {"high": 9.0, "low": 0.0}, "default_priorities": {"a": "low"}}
    pool = Pool(awake="a", telemetry=recorded.telemetry, **priorities)  # type: ignore[arg-type]
    for model in "ab":
        connection = Connection(b'{"model": "%s"}' % model.encode(), headers=asked)
        await call(LLMuxMiddleware(Inner(pool), pool.switcher), connection)
    seen = [(each.attributes or {}).get("llmux.priority") for each in recorded.named("llmux.request")]
    assert seen == [told, asked.get("x-llmux-priority")]


@pytest.mark.anyio
async def test_a_refused_request_is_counted_with_its_status_and_is_an_error_of_its_span() -> None:
    recorded = Recorded()
    pool = Pool(awake="a", telemetry=recorded.telemetry, queue_limits={"b": 1})
    gate = pool.backends["b"].gate("wake")
    first, second = Connection(b'{"model": "b"}'), Connection(b'{"model": "b"}')
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            middleware = LLMuxMiddleware(Inner(pool), pool.switcher)
            tasks.start_soon(middleware, first.scope, first.receive, first.send)
            await until_waiting(pool, "b", 1)
            await middleware(second.scope, second.receive, second.send)
            gate.open.set()
        await pool.switcher.aclose()
    assert (first.status, second.status) == (201, 429)
    refused = recorded.named("llmux.request")[0]
    assert (refused.attributes or {})["error.type"] == "QueueFullError"
    assert (refused.attributes or {})["http.response.status_code"] == 429
    counted = {point.attributes["http.response.status_code"]: point.value for point in recorded.metric("llmux.requests")}
    assert counted == {201: 1, 429: 1}


@pytest.mark.anyio
async def test_a_request_that_nothing_waits_for_has_no_switch_and_errors_of_clients_are_told() -> None:
    recorded = Recorded()
    pool = Pool(awake="a", telemetry=recorded.telemetry)
    await call(LLMuxMiddleware(Inner(pool), pool.switcher), Connection(b'{"model": "nobody"}'))
    [request] = recorded.named("llmux.request")
    assert request.attributes is not None
    assert (request.attributes["error.type"], request.attributes["http.response.status_code"]) == ("UnknownModelError", 404)
    assert recorded.named("llmux.switch") == []


@pytest.mark.anyio
async def test_inside_an_instrumented_host_the_request_is_a_part_of_the_hosts_span() -> None:
    recorded = Recorded()
    pool = Pool(awake="a", telemetry=recorded.telemetry)
    with recorded.provider.get_tracer("host").start_as_current_span("host") as host:
        await call(LLMuxMiddleware(Inner(pool), pool.switcher), Connection(b'{"model": "a"}'))
    [request] = recorded.named("llmux.request")
    assert request.parent is not None
    assert request.parent.span_id == host.get_span_context().span_id
    assert request.kind is SpanKind.INTERNAL


@contextmanager
def traced(loop: EventLoop, script: Script) -> Iterator[tuple[str, Recorded]]:
    """A traced gateway over one server."""
    recorded = Recorded()
    server = ScriptedServer(script)
    with (
        serve(server) as url,
        serve(LLMuxApp({"models": {"a": {"url": url}}}, tracer_provider=recorded.provider), loop) as base,
    ):
        yield base, recorded


def test_a_request_sent_before_the_one_ahead_of_it_has_ended_has_a_trace_of_its_own() -> None:
    """uvicorn starts it in the context of the one ahead."""
    with traced("asyncio", echo) as (url, recorded):
        parts = urlsplit(url)
        body = b'{"model": "a"}'
        requests = b"".join(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nconnection: %s\r\n%s\r\n%s"
            % (len(body), connection, b"traceparent: 00-%032x-%016x-01\r\n" % (number, number) if number else b"", body)
            for number, connection in ((1, b"keep-alive"), (2, b"keep-alive"), (0, b"close"))
        )
        with socket.create_connection((parts.hostname or "", parts.port or 0)) as client:
            client.sendall(requests)
            received = b"".join(iter(lambda: client.recv(65536), b""))
        assert received.count(b"200 OK") == 3
    first, second, third = recorded.named("llmux.request")
    assert [(span.parent.trace_id, span.parent.span_id) for span in (first, second) if span.parent] == [(1, 1), (2, 2)]
    assert third.parent is None
    assert {span.kind for span in (first, second, third)} == {SpanKind.SERVER}
    assert len({ids(span)[0] for span in (first, second, third)}) == 3


def test_a_stream_that_breaks_is_an_error_of_its_span_though_its_status_is_200() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.chunk(b"data: 1\n\n")
        raise RuntimeError("the engine died")

    with traced("asyncio", script) as (url, recorded):
        assert b"upstream_error" in httpx.post(url + "/v1/completions", json={"model": "a", "stream": True}).content
    [request] = recorded.named("llmux.request")
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes is not None
    assert request.attributes["error.type"] == "UpstreamError"
    assert [event.name for event in request.events] == ["exception"]


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_only_a_client_that_leaves_before_its_answer_is_complete_is_said_to_have_left(loop: EventLoop) -> None:
    left = threading.Event()

    async def script(exchange: Exchange) -> None:
        kind = json.loads(exchange.body)["kind"]
        if kind == "plain":
            await exchange.start("application/json", 200, (b"content-length", b"2"))
            await exchange.chunk(b"{}", last=True)
            return
        await exchange.start()
        await exchange.chunk(b"data: 1\n\n")
        if kind == "done":
            await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.client_left()
        left.set()

    with traced(loop, script) as (url, recorded), httpx.Client(base_url=url) as client:
        client.post("/v1/completions", json={"model": "a", "kind": "plain"})
        for kind, end in (("done", b"[DONE]\n\n"), ("cut", b"1\n\n")):
            left.clear()
            with client.stream("POST", "/v1/completions", json={"model": "a", "kind": kind}) as response:
                chunks = response.iter_raw()
                received = b""
                while not received.endswith(end):
                    received += next(chunks)
            assert left.wait(5)  # either way the server is told at once
    said = [(span.attributes or {}).get("llmux.client_disconnected") for span in recorded.named("llmux.request")]
    assert said == [None, None, True]


@pytest.mark.parametrize("sent", [[], [(b"traceparent", b"old")], [(b"baggage", b"a=b")]])
@pytest.mark.parametrize("state", [TraceState(), TraceState([("a", "b")])])
@pytest.mark.parametrize("bags", [{}, {"k": "v"}])
def test_what_is_injected_is_what_the_propagator_writes(
    sent: list[tuple[bytes, bytes]], state: TraceState, bags: dict[str, str]
) -> None:
    span = NonRecordingSpan(SpanContext(int(TRACE, 16), int(PARENT, 16), False, TraceFlags(1), state))
    context = set_span_in_context(span, Context())
    for key, value in bags.items():
        context = baggage.set_baggage(key, value, context)
    written: dict[str, str] = {}
    inject(written, context)
    expected = {name.decode(): value.decode() for name, value in sent} | written
    headers = [(b"x", b"y"), *sent]
    inject_headers(headers, context)
    assert {name.decode(): value.decode() for name, value in headers} == {"x": "y", **expected}


@pytest.mark.parametrize("bags", [{}, {"k": "v"}])
def test_a_request_that_carries_nothing_goes_on_with_its_span_and_what_its_host_carries(bags: dict[str, str]) -> None:
    recorded, headers, written = Recorded(), [(b"x", b"y")], dict[str, str]()
    context = Context()
    for key, value in bags.items():
        context = baggage.set_baggage(key, value, context)
    token = otel_context.attach(context)
    try:
        with recorded.telemetry.request(headers, {}):
            relayed = [(b"x", b"y")]
            inject_headers(relayed, otel_context.get_current())
            inject(written)
    finally:
        otel_context.detach(token)
    assert {name.decode(): value.decode() for name, value in relayed} == {"x": "y", **written}
    assert written.keys() == {"traceparent", *(["baggage"] if bags else [])}


def test_another_propagator_is_asked_for_its_own_headers() -> None:
    class Own(TextMapPropagator):
        def extract(self, carrier: Any, context: Context | None = None, getter: Any = default_getter) -> Context:
            assert getter.get(carrier, "own") == ["x"]
            span = NonRecordingSpan(SpanContext(int(TRACE, 16), int(PARENT, 16), True, TraceFlags(1)))
            return set_span_in_context(span, context)

        def inject(self, carrier: Any, context: Context | None = None, setter: Any = default_setter) -> None:
            setter.set(carrier, "own", "z")

        @property
        def fields(self) -> set[str]:
            return {"own"}

    recorded, before = Recorded(), get_global_textmap()
    set_global_textmap(CompositePropagator([TraceContextTextMapPropagator(), Own()]))
    try:
        headers = [(b"own", b"x")]
        with recorded.telemetry.request(headers, {}):
            inject_headers(headers, otel_context.get_current())
    finally:
        set_global_textmap(before)
    (span,) = recorded.spans
    assert span.parent is not None
    assert span.parent.trace_id == int(TRACE, 16)
    assert (b"own", b"z") in headers


def test_traceparent_reaches_the_backend_as_a_child_of_the_request() -> None:
    recorded = Recorded()
    with gateway("asyncio") as plain:
        plain.a.script = echo
        url = plain.app.config.models["a"].url
        llm = LLMuxApp({"models": {"a": {"url": url}}}, tracer_provider=recorded.provider)
        with serve(llm) as served:
            sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
            assert httpx.post(served + "/v1/completions", json={"model": "a"}, headers=sent).status_code == 200
            with recorded.provider.get_tracer("host").start_as_current_span("host"):
                headers_of_a_host: list[tuple[bytes, bytes]] = [(b"traceparent", b"old"), (b"tracestate", b"a=b"), (b"x", b"y")]
                inject_headers(headers_of_a_host, otel_context.get_current())
        assert [name for name, _ in headers_of_a_host] == [b"x", b"traceparent"]
        headers = dict(plain.a.requests[0].headers)
        assert [name for name, _ in plain.a.requests[0].headers].count(b"traceparent") == 1
        assert plain.chat().status_code == 200  # without an SDK: passed on as it came
        plain.client.post("/v1/completions", json={"model": "a"}, headers=sent)
        untouched = dict(plain.a.requests[-1].headers)
    [request] = recorded.named("llmux.request")
    assert headers[b"traceparent"].decode() == f"00-{TRACE}-{ids(request)[1]:016x}-01"
    assert headers[b"tracestate"] == b"a=b"
    assert untouched[b"traceparent"].decode() == sent["traceparent"]


@pytest.mark.anyio
async def test_the_tree_arrives_over_otlp() -> None:
    with receive_spans() as (endpoint, spans):
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        pool = Pool(awake="a", telemetry=Telemetry(provider))
        app = LLMuxMiddleware(Inner(pool), pool.switcher)
        for model in ("a", "b", "a"):
            await call(app, Connection(b'{"model": "%s"}' % model.encode()))
        await pool.switcher.aclose()
        provider.shutdown()
    by_id = {span.span_id: span for span in spans}
    switches = [span for span in spans if span.name == "llmux.switch"]
    assert len(switches) == 2
    for switch in switches:
        assert by_id[switch.parent_span_id].name == "llmux.request"
        children = sorted((s.start_time_unix_nano, s.name) for s in spans if s.parent_span_id == switch.span_id)
        assert [name for _, name in children] == ["cooldown", "drain", "sleep", "wake", "ready"]
        assert [link.span_id for link in switch.links] == [switch.parent_span_id]
