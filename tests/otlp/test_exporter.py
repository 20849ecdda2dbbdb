"""Spans as bytes, beside OpenTelemetry's own encoder: what is sent must say the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from llmux_asgi import otlp
from llmux_asgi.otlp import OTLPSpanExporter, _exporter, encode
from tests.otlp.strategies import ATTRIBUTES, CONTEXTS, SIMPLE_ATTRIBUTES, Ids
from tests.support.otlp import receive_spans


class Kept:
    """Ended spans."""

    def __init__(
        self,
        resource: Resource | None = None,
        limits: SpanLimits | None = None,
        provider: type[TracerProvider] = TracerProvider,
    ) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = provider(resource=resource, span_limits=limits, id_generator=Ids())
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def span(self, attributes: Mapping[str, Any] | None = None, name: str = "llmux.request", scope: str = "s") -> ReadableSpan:
        self.provider.get_tracer(scope).start_span(name, kind=SpanKind.SERVER, attributes=attributes).end()
        return self.spans[-1]


@st.composite
def some_spans(draw: st.DrawFn) -> list[ReadableSpan]:
    """Ended spans of two resources and two scopes; what most spans have not, these mostly have."""
    limits = SpanLimits(max_attributes=3, max_events=1)
    kept = [
        Kept(provider=draw(st.sampled_from([TracerProvider, otlp.TracerProvider]))),
        Kept(Resource({"service.name": "x", "n": 1}, "https://schema"), limits),
    ]
    for _ in range(draw(st.integers(0, 4))):
        provider = draw(st.sampled_from(kept)).provider
        tracer = provider.get_tracer(draw(st.sampled_from(["one", "other"])), "1.0", draw(st.sampled_from([None, "https://s"])))
        parent = draw(st.none() | CONTEXTS)
        name = draw(st.text(max_size=200))
        span = tracer.start_span(
            name,
            context=None if parent is None else set_span_in_context(NonRecordingSpan(parent)),
            kind=draw(st.sampled_from(SpanKind)),
            attributes=draw(SIMPLE_ATTRIBUTES),
            links=draw(st.lists(st.builds(Link, CONTEXTS, ATTRIBUTES), max_size=1)),
            start_time=draw(st.integers(0, (1 << 64) - 1)),
        )
        for attributes in draw(st.lists(ATTRIBUTES, max_size=2)):
            span.add_event("event", attributes, timestamp=1)
        span.set_attributes(draw(ATTRIBUTES))
        status = draw(st.sampled_from([None, Status(StatusCode.OK), Status(StatusCode.ERROR, "why")]))
        if status is not None:
            span.set_status(status)
        span.end(draw(st.integers(0, (1 << 64) - 1)))
    return [span for each in kept for span in each.spans]


def said(request: ExportTraceServiceRequest) -> Counter[tuple[bytes, str, bytes, str, bytes]]:
    """What a request says, however it is grouped."""
    return Counter(
        (
            of_resource.resource.SerializeToString(deterministic=True),
            of_resource.schema_url,
            of_scope.scope.SerializeToString(deterministic=True),
            of_scope.schema_url,
            span.SerializeToString(deterministic=True),
        )
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    )


def encoded(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    request: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(encode(spans))
    return request


@given(some_spans())
def test_what_is_encoded_says_what_opentelemetry_s_own_encoder_says(spans: list[ReadableSpan]) -> None:
    assert said(encoded(spans)) == said(encode_spans(spans))
    assert said(encoded(spans)) == said(encode_spans(spans))  # from what was kept


@given(SIMPLE_ATTRIBUTES)
def test_a_plain_span_is_the_same_byte_by_byte(attributes: dict[str, Any]) -> None:
    span = Kept().span(attributes)
    assert encode([span]) == encode_spans([span]).SerializeToString()


PARENT = SpanContext(1 << 120, 1 << 60, is_remote=False, trace_flags=TraceFlags(1))
STATE = TraceState([("a", "b")])


@pytest.mark.parametrize(
    "parent",
    [
        None,
        PARENT,
        SpanContext(PARENT.trace_id, PARENT.span_id, is_remote=True, trace_flags=TraceFlags(1)),
        SpanContext(PARENT.trace_id, PARENT.span_id, is_remote=True, trace_flags=TraceFlags(1), trace_state=STATE),
    ],
)
def test_a_span_keeps_its_parent_and_the_state_of_its_trace(parent: SpanContext | None) -> None:
    kept = Kept()
    context = None if parent is None else set_span_in_context(NonRecordingSpan(parent))
    kept.provider.get_tracer("s").start_span("name", context=context).end()
    assert said(encoded(kept.spans)) == said(encode_spans(kept.spans))


@pytest.mark.parametrize("length", [0, 1, 100, 127, 128, 16_000, 16_383, 16_384, 40_000, 3_000_000])
def test_any_length_is_written_right(length: int) -> None:
    span = Kept().span({"long": "x" * length})
    assert encode([span]) == encode_spans([span]).SerializeToString()


def test_what_was_dropped_is_told() -> None:
    kept = Kept(limits=SpanLimits(max_attributes=1))
    kept.span({"a": 1, "b": 2})
    assert said(encoded(kept.spans)) == said(encode_spans(kept.spans))
    assert encoded(kept.spans).resource_spans[0].scope_spans[0].spans[0].dropped_attributes_count == 1


def test_values_that_are_equal_and_not_the_same_are_told_apart() -> None:
    values = [1, True, 1.0, 0, False, 0.0, -0.0, "1", ""]
    kept = Kept()
    spans = [kept.span({"a": value}) for value in values]
    encode(spans)
    for span, value in zip(spans, values, strict=True):
        [attribute] = encoded([span]).resource_spans[0].scope_spans[0].spans[0].attributes
        found = getattr(attribute.value, attribute.value.WhichOneof("value"))
        assert (type(found), found) == (type(value), value)
        if isinstance(value, float):
            assert math.copysign(1, found) == math.copysign(1, value)


def test_spans_of_one_resource_and_scope_stand_together() -> None:
    kept = Kept()
    request = encoded([kept.span(scope=scope) for scope in ("one", "other", "one")])
    assert [(scope.scope.name, len(scope.spans)) for resource in request.resource_spans for scope in resource.scope_spans] == [
        ("one", 2),
        ("other", 1),
    ]


def test_no_spans_are_no_bytes() -> None:
    assert encode([]) == b""


def test_neither_many_values_nor_long_ones_are_kept() -> None:
    kept = Kept()
    for number in range(3 * _exporter._MOST_KEPT):
        _exporter._plain_span(kept.span({"number": number}))
        assert len(_exporter._KEPT) <= _exporter._MOST_KEPT
    before = dict(_exporter._KEPT)
    _exporter._plain_span(kept.span({"long": "x" * 1000, "time": 0.5}))
    assert before == _exporter._KEPT


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_the_exporter_sends_them(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    quickly: list[int] = []

    def counted(spans: Sequence[ReadableSpan]) -> bytes:
        quickly.append(len(spans))
        return encode(spans)

    monkeypatch.setattr(_exporter, "encode", counted)
    with receive_spans() as (endpoint, spans):
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        tracer = provider.get_tracer("llmux_asgi")
        with tracer.start_as_current_span("outer"):
            tracer.start_span("inner").end()
        provider.shutdown()
    assert [span.name for span in spans] == ["inner", "outer"]
    assert spans[0].parent_span_id == spans[1].span_id
    # A version of OpenTelemetry's exporter that does not encode by `encode_spans` loses nothing, but it should be known.
    assert quickly == [2]
