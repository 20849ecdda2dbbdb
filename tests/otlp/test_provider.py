"""Spans of both providers, the SDK's and the quicker one: what is recorded must be the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import context as otel_context
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from opentelemetry.sdk.util import BoundedList
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    NoOpTracer,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)

from llmux_asgi.otlp import TracerProvider, _provider
from llmux_asgi.otlp._replace import with_names
from tests.otlp.strategies import ATTRIBUTES, CONTEXTS, SIMPLE_ATTRIBUTES, Ids

KEYS = st.sampled_from(["", "a", "b", "long"])
SOME = st.sampled_from(["", "text", 1, True, 0.5, None, [1], b"b"])
FEW: st.SearchStrategy[dict[Any, Any]] = st.dictionaries(KEYS | st.just(7), SOME, max_size=4)  # the same keys again and again
STATUSES = [Status(StatusCode.OK), Status(StatusCode.ERROR, "why")]
STEPS = st.one_of(
    st.builds(lambda a: lambda span: span.set_attributes(a), FEW | SIMPLE_ATTRIBUTES | ATTRIBUTES),
    st.builds(lambda key, value: lambda span: span.set_attribute(key, value), KEYS, st.sampled_from(["v", 2, [2], object])),
    st.builds(lambda a: lambda span: span.add_event("event", a, timestamp=1), FEW),
    st.builds(lambda c, a: lambda span: span.add_link(c, a), CONTEXTS, FEW),
    st.builds(lambda text: lambda span: span.record_exception(ValueError(text), timestamp=2), st.text(max_size=5)),
    st.builds(
        lambda s: lambda span: span.set_status(s), st.sampled_from([Status(StatusCode.OK), Status(StatusCode.ERROR, "why")])
    ),
    st.builds(lambda name: lambda span: span.update_name(name), st.text(max_size=5)),
    st.just(lambda span: span.end(7)),
)
CONTEXT = SpanContext(1, 1, is_remote=False)
LIMIT = st.sampled_from([None, 0, 1, 2, 5])
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_span_attributes": LIMIT,
        "max_events": LIMIT,
        "max_links": LIMIT,
        "max_event_attributes": LIMIT,
        "max_span_attribute_length": st.sampled_from([None, 1, 3]),
    },
)


class Ended(SpanProcessor):
    """Spans as they are when they begin, are about to end, and have ended."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.spans: list[ReadableSpan] = []

    def on_start(self, span: trace.Span, parent_context: otel_context.Context | None = None) -> None:
        self.seen.append(said(span))
        span.set_attribute("processor", "p")

    def on_end(self, span: ReadableSpan) -> None:
        self.seen.append(said(span))
        self.spans.append(span)


def said(span: ReadableSpan) -> str:
    """All that can be read of a span."""
    return repr(
        (
            *(span.name, span.get_span_context(), span.parent, span.kind, span.end_time),
            *(span.status.status_code, span.status.description),
            list((span.attributes or {}).items()),
            [(event.name, event.timestamp, list((event.attributes or {}).items())) for event in span.events],
            [(link.context, list((link.attributes or {}).items())) for link in span.links],
            *(span.dropped_attributes, span.dropped_events, span.dropped_links),
            *(span.resource.to_json(), span.instrumentation_scope),
        )
    )


def played(
    provider_class: type[trace.TracerProvider], play: Callable[[trace.TracerProvider], None], **limits: Any
) -> tuple[list[str], list[ReadableSpan]]:
    ended = Ended()
    provider = provider_class(
        span_limits=SpanLimits(**limits), id_generator=Ids(), sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False
    )
    provider.add_span_processor(ended)
    play(provider)
    return ended.seen, ended.spans


@given(
    LIMITS,
    st.none() | FEW | SIMPLE_ATTRIBUTES,
    st.lists(st.builds(Link, CONTEXTS, FEW), max_size=2),
    st.none() | CONTEXTS,
    st.lists(STEPS, max_size=6),
)
@example({}, {"a": 1}, [], None, [lambda span: span.set_attributes({"a": 2})])
@example({}, {"": 1}, [], None, [lambda span: span.set_attributes({7: 1})])
@example({}, {"a": [1]}, [], None, [])
@example({"max_span_attributes": 1}, {"a": 1, "b": 2}, [], None, [])
@example({"max_span_attribute_length": 1}, {"a": "long"}, [], None, [])
@example({"max_events": 0, "max_links": 0}, None, [], None, 2 * [lambda span: (span.add_event("e"), span.add_link(CONTEXT))])
def test_the_same_is_recorded(
    limits: dict[str, Any],
    attributes: dict[str, Any] | None,
    links: list[Link],
    parent: SpanContext | None,
    steps: Sequence[Callable[[Any], object]],
) -> None:
    def play(provider: trace.TracerProvider) -> None:
        span = provider.get_tracer("s", "1", "https://s").start_span(
            "name",
            context=None if parent is None else set_span_in_context(NonRecordingSpan(parent)),
            kind=SpanKind.SERVER,
            attributes=attributes,
            links=[Link(link.context, link.attributes) for link in links],
            start_time=5,
        )
        for step in steps:
            step(span)
        span.end(8)
        span.set_attributes({"late": 1})

    seen, spans = played(TracerProvider, play, **limits)
    assert type(spans[0]) is _provider._Span
    expected, copies = played(trace.TracerProvider, play, **limits)
    assert seen == expected
    assert [said(span) for span in spans] == [said(copy) for copy in copies]


def test_it_can_be_current_and_ends_with_its_block() -> None:
    def play(provider: trace.TracerProvider) -> None:
        tracer = provider.get_tracer("s")
        with tracer.start_as_current_span("outer") as outer, tracer.start_as_current_span("inner"):
            assert get_current_span() is not outer
            get_current_span().add_event("e", timestamp=3)
        with pytest.raises(ValueError, match="broken"), tracer.start_as_current_span("failed", record_exception=False):
            raise ValueError("broken")

    _, spans = played(TracerProvider, play)
    assert [span.name for span in spans] == ["inner", "outer", "failed"]
    assert spans[0].parent == spans[1].get_span_context()
    assert [len(span.events) for span in spans] == [1, 0, 0]
    assert spans[2].status.description == "ValueError: broken"
    assert all(span.start_time and span.end_time and span.start_time <= span.end_time for span in spans)


def test_of_two_threads_that_add_the_first_event_or_link_each_has_its_own_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(BoundedList[Any]):
        def __init__(self, limit: int | None) -> None:
            locked.append(vars(span)["_lock"].locked())
            super().__init__(limit)

    locked: list[bool] = []
    monkeypatch.setattr(_provider, "BoundedList", Watched)
    span = TracerProvider(shutdown_on_exit=False).get_tracer("s").start_span("name")
    assert isinstance(span, trace.Span)
    for _ in range(2):
        span.add_event("event")
        span.add_link(CONTEXT)
    assert locked == [True, True]
    assert (len(span.events), len(span.links)) == (2, 2)


def test_what_the_sampler_drops_is_not_recorded() -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    assert not provider.get_tracer("s").start_span("name").is_recording()


def test_to_look_at_the_sdk_takes_no_random_numbers() -> None:
    _provider._is_known.cache_clear()
    before = random.getstate()
    assert _provider._is_known()
    assert random.getstate() == before


def test_a_scope_has_one_tracer() -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    assert provider.get_tracer("s") is provider.get_tracer("s")
    assert isinstance(provider.get_tracer("s"), trace.Tracer)


def test_a_sdk_that_is_disabled_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert isinstance(TracerProvider(shutdown_on_exit=False).get_tracer("s"), NoOpTracer)


def test_of_a_version_that_is_not_known_the_spans_are_the_sdk_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def more(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.of_a_later_version = None

    def stricter(**kwargs: Any) -> trace.Span:
        kwargs["of_a_later_version"] = None
        return _provider._Span(**kwargs)

    def kind() -> type:
        _provider._is_known.cache_clear()
        provider = TracerProvider(resource=Resource.get_empty(), sampler=ALWAYS_ON, shutdown_on_exit=False)
        return type(provider.get_tracer("s").start_span("name"))

    begin = trace.Span.__init__
    try:
        assert kind() is _provider._Span
        with monkeypatch.context() as later:
            later.setattr(trace.Span, "__init__", more)
            assert kind() is trace._Span
        with monkeypatch.context() as later:
            later.setattr(_provider._Tracer, "start_span", trace.Tracer.start_span)  # looks for `_Span` elsewhere
            assert kind() is trace._Span
        with monkeypatch.context() as later:
            later.setattr(_provider._Tracer, "start_span", with_names(trace.Tracer.start_span, _Span=stricter))
            assert kind() is trace._Span
        with monkeypatch.context() as earlier:
            earlier.delattr(BoundedAttributes, "_set_items")
            assert kind() is trace._Span
    finally:
        _provider._is_known.cache_clear()
