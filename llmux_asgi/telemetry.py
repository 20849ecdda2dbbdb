"""Names of spans, metrics and attributes, and thin wrappers on the OpenTelemetry API. The SDK is the user's.

    llmux.request                 one relayed request, from its arrival to the last byte of its answer
    llmux.switch                  one switch, a child of the request that it was begun for, linked to all that waited for it
    ├── cooldown                  the outgoing model has not been active for `min_active_duration` yet
    ├── drain                     its running requests finish
    ├── sleep                     it is put to sleep, confirmation included
    ├── wake                      the target is woken
    └── ready                     until the target takes requests

Attributes follow the GenAI semantic conventions where those have a name; the rest starts with `llmux.`.
Durations are in seconds. Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING

from opentelemetry import baggage, metrics, trace
from opentelemetry import context as otel_context
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagate import extract, get_global_textmap, inject
from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
from opentelemetry.trace import Link, ProxyTracerProvider, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider
    from opentelemetry.util.types import Attributes

__all__ = ["Headers", "RequestSpan", "Telemetry", "failed", "inject_headers"]

SCOPE = "llmux_asgi"

SPAN_REQUEST = "llmux.request"
SPAN_SWITCH = "llmux.switch"

GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM = "gen_ai.request.stream"
HTTP_REQUEST_METHOD = "http.request.method"
HTTP_RESPONSE_STATUS_CODE = "http.response.status_code"
HTTP_ROUTE = "http.route"
ERROR_TYPE = "error.type"
ENDUSER_ID = "enduser.id"
MODEL = "llmux.model"
PRIORITY = "llmux.priority"
QUEUE_TIME = "llmux.queue_time"
FREEZES = "llmux.freezes"
FROZEN_TIME = "llmux.frozen_time"
CLIENT_DISCONNECTED = "llmux.client_disconnected"
SWITCH_FROM = "llmux.switch.from"
SWITCH_TO = "llmux.switch.to"
SWITCH_SLEEP_LEVEL = "llmux.switch.sleep_level"
SWITCH_POLICY = "llmux.switch.policy"
SWITCH_WAITING = "llmux.switch.waiting"
SWITCH_IN_FLIGHT = "llmux.switch.in_flight"
SWITCH_FROZEN = "llmux.switch.frozen"
SWITCH_OUTCOME = "llmux.switch.outcome"

METRIC_SWITCH_DURATION = "llmux.switch.duration"
METRIC_QUEUE_TIME = "llmux.queue.time"
METRIC_REQUESTS = "llmux.requests"

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""`gen_ai.operation.name` by route, for the routes that the conventions have a name for."""

Headers = list[tuple[bytes, bytes]]


class _HeaderGetter(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        wanted = key.lower().encode("latin-1")
        for name, _ in carrier:  # most often it is not there
            if name == wanted:
                return [value.decode("latin-1") for name, value in carrier if name == wanted]
        return None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


class _HeaderSetter(Setter[Headers]):
    def set(self, carrier: Headers, key: str, value: str) -> None:
        pair = (key.lower().encode("latin-1"), value.encode("latin-1"))
        for at, (name, _) in enumerate(carrier):
            if name == pair[0]:
                carrier[at:] = [each for each in carrier[at:] if each[0] != name]
                break
        carrier.append(pair)


_GETTER, _SETTER = _HeaderGetter(), _HeaderSetter()

_SERVING_KEY = otel_context.create_key("llmux_asgi.serving")
"""In OpenTelemetry's context: the headers of the request that is being served."""
_NOTHING = Context()


class RequestSpan:
    """A span that is current while in the block, and ends with it.

    What `Tracer.start_as_current_span` does, without its nested generators: this is done for every request.
    """

    __slots__ = ("_attributes", "_headers", "_span", "_token", "_tracer")

    def __init__(self, tracer: Tracer, headers: Headers, attributes: Attributes) -> None:
        self._tracer = tracer
        self._headers = headers
        self._attributes = attributes

    def __enter__(self) -> Span:
        current = otel_context.get_current()
        if current.get(_SERVING_KEY, self._headers) is not self._headers:
            # uvicorn starts a request that came while the one before it was ending in the context of that one: nothing
            # in there is this request's. What stays the same while a host hands a request on is its list of headers.
            current = Context()
        hosted = bool(current) and trace.get_current_span(current).get_span_context().is_valid
        parent = current if hosted else _extract(self._headers)
        kind = SpanKind.INTERNAL if hosted else SpanKind.SERVER
        self._span = self._tracer.start_span(SPAN_REQUEST, context=parent, kind=kind, attributes=self._attributes)
        serving = Context({**current, _SERVING_KEY: self._headers})
        self._token = otel_context.attach(trace.set_span_in_context(self._span, serving))
        return self._span

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None) -> None:
        otel_context.detach(self._token)
        if isinstance(exc, Exception):
            failed(self._span, exc)
        self._span.end()


class Telemetry:
    """The spans and metrics of one gateway. Without providers it uses the global ones, as every instrumentation does."""

    def __init__(self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._is_traced = tracer_provider is not None
        self._look_again = 0.0
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self.switch_duration = meter.create_histogram(METRIC_SWITCH_DURATION, "s", "Duration of a switch")
        self.queue_time = meter.create_histogram(METRIC_QUEUE_TIME, "s", "Time a request waited for its model")
        self.requests = meter.create_counter(METRIC_REQUESTS, "{request}", "Requests answered")

    @property
    def is_traced(self) -> bool:
        """Whether there is a tracer provider. Looked for once a second: without one nothing of a span is worth its cost."""
        if not self._is_traced and (now := time.monotonic()) >= self._look_again:
            self._is_traced, self._look_again = _is_traced(), now + 1.0
        return self._is_traced

    def request(self, headers: Headers, attributes: Attributes) -> AbstractContextManager[Span]:
        """Open the span of a request: a child of the host's span if it has one, else of the caller's `traceparent`."""
        return RequestSpan(self._tracer, headers, attributes)

    @contextmanager
    def switch(self, parent: Context, waiters: Sequence[SpanContext], attributes: Attributes) -> Iterator[Span]:
        """Open the span of a switch, under the span of the request that began it."""
        links = [Link(context) for context in waiters if context.is_valid]
        with self._tracer.start_as_current_span(SPAN_SWITCH, context=parent, links=links, attributes=attributes) as span:
            yield span

    @contextmanager
    def phase(self, name: str, attributes: Attributes = None) -> Iterator[Span]:
        """Open the span of one phase of the current switch."""
        with self._tracer.start_as_current_span(name, attributes=attributes) as span:
            yield span


def failed(span: Span, exc: BaseException, kind: str | None = None) -> None:
    """Mark `span` as failed by `exc`, exception event and `error.type` included."""
    span.record_exception(exc)
    span.set_status(Status(StatusCode.ERROR, str(exc)))
    span.set_attribute(ERROR_TYPE, kind or type(exc).__qualname__)


def inject_headers(headers: Headers, context: Context) -> None:
    """Write a trace context into the headers of a request to a backend, in place of any that it carries."""
    span = trace.get_current_span(context).get_span_context()
    is_valid = span.is_valid
    if is_valid and not span.trace_state and _is_w3c() and not _carries(headers) and not baggage.get_all(context):
        # What the propagator would write, for a tenth of the price.
        headers.append((b"traceparent", b"00-%032x-%016x-%02x" % (span.trace_id, span.span_id, span.trace_flags)))
        return
    if is_valid and any(name == b"tracestate" for name, _ in headers):
        # A trace that begins here has no state: the client's must not stay beside it.
        headers[:] = [pair for pair in headers if pair[0] != b"tracestate"]
    inject(headers, context, setter=_SETTER)


def _extract(headers: Headers) -> Context:
    if _is_w3c() and not _carries(headers):
        return _NOTHING
    return extract(headers, context=_NOTHING, getter=_GETTER)


_W3C = frozenset({b"traceparent", b"tracestate", b"baggage"})


def _carries(headers: Headers) -> bool:
    """Whether there is anything of a W3C trace context."""
    return not _W3C.isdisjoint(dict(headers))


@lru_cache(maxsize=4)
def _only_w3c(propagator: TextMapPropagator) -> bool:
    parts = getattr(propagator, "_propagators", (propagator,))  # of a composite; without them, no short cut
    return all(type(part) in (TraceContextTextMapPropagator, W3CBaggagePropagator) for part in parts)


def _is_w3c() -> bool:
    """Whether contexts are carried in W3C's headers only, as they are by default."""
    return _only_w3c(get_global_textmap())


def _is_traced() -> bool:
    """Whether the application has set a tracer provider."""
    return not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)
