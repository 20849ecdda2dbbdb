"""Thin wrappers on the OpenTelemetry API: spans, metrics, trace context in headers. The SDK is the user's.

The names are in `_names.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from operator import itemgetter
from types import TracebackType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from opentelemetry import baggage, metrics, trace
from opentelemetry import context as otel_context
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagate import extract, get_global_textmap, inject
from opentelemetry.propagators.textmap import Getter, Setter, TextMapPropagator
from opentelemetry.trace import INVALID_SPAN, Link, ProxyTracerProvider, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from . import _names as names
from ._instruments import Books, FirstByteTimes, Instruments
from ._names import ERROR_TYPE, SCOPE, SPAN_REQUEST, SPAN_SWITCH

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider
    from opentelemetry.util.types import Attributes

    from ._state import SwitcherStatistics

__all__ = ["Headers", "RequestSpan", "Telemetry", "failed", "inject_headers"]

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
_BARE_KEY = otel_context.create_key("llmux_asgi.bare")
"""Likewise: whether there is nothing but its span to be carried on, and that in W3C's headers."""
_NOTHING = Context()
(_SPAN_KEY,) = trace.set_span_in_context(INVALID_SPAN, _NOTHING)
"""Under which OpenTelemetry has the current span in there."""


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
        headers, current = self._headers, otel_context.get_current()
        if current and current.get(_SERVING_KEY, headers) is not headers:
            # uvicorn starts a request that came while the one before it was ending in the context of that one: nothing
            # in there is this request's. What stays the same while a host hands a request on is its list of headers.
            current = _NOTHING
        hosted = bool(current) and trace.get_current_span(current).get_span_context().is_valid
        bare = _is_w3c() and _W3C.isdisjoint(map(_NAME, headers))
        parent = current
        if not hosted:
            parent = _NOTHING if bare else extract(headers, context=_NOTHING, getter=_GETTER)
        kind = SpanKind.INTERNAL if hosted else SpanKind.SERVER
        self._span = span = self._tracer.start_span(SPAN_REQUEST, context=parent, kind=kind, attributes=self._attributes)
        bare = bare and not (current and baggage.get_all(current))
        self._token = otel_context.attach(Context({**current, _SERVING_KEY: headers, _BARE_KEY: bare, _SPAN_KEY: span}))
        return span

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None) -> None:
        otel_context.detach(self._token)
        if isinstance(exc, Exception):
            failed(self._span, exc)
        self._span.end()


class Telemetry:
    """The spans and metrics of one gateway. Without providers it uses the global ones, as every instrumentation does.

    `exposition` is a meter provider of the gateway's own, which gets the metrics too.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        exposition: MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._is_traced = tracer_provider is not None
        self._instruments: list[Instruments] = []
        self._has_meter = meter_provider is not None
        self.is_measured = False
        """Whether anybody may collect metrics, as of the last look at `is_traced`. If not, nothing has to be measured."""
        self._books = Books()
        self.first_bytes = FirstByteTimes()
        """The times to first byte, for who shows what `exposition` has got: it does not get them."""
        self._first_bytes: list[FirstByteTimes | Histogram] = []
        """Where each of them goes."""
        if exposition is not None:
            self._measure(exposition, self.first_bytes)
        if meter_provider is not None:
            self._measure(meter_provider)
        self._look_again = 0.0
        self._look()

    @property
    def is_traced(self) -> bool:
        """Whether there is a tracer provider. Looked for once a second: without one nothing of a span is worth its cost."""
        if time.monotonic() >= self._look_again:
            self._look()
        return self._is_traced

    def observe(self, statistics: Callable[[], SwitcherStatistics | None]) -> None:
        """Have the gauges read what this function returns, whenever somebody collects, in whatever thread."""
        self._books.statistics = statistics

    def request(self, headers: Headers, attributes: Attributes) -> AbstractContextManager[Span]:
        """Open the span of a request: a child of the host's span if it has one, else of the caller's `traceparent`."""
        return RequestSpan(self._tracer, headers, attributes)

    def answered(self, model: str, status: int) -> None:
        """Count a request that is over. The status is 0 if its client left before the answer began."""
        counts, key = self._books.requests, (model, status)
        counts[key] = counts.get(key, 0) + 1

    def request_failed(self, model: str, exc: BaseException) -> None:
        """Count a request that the gateway has answered, or ended, with an error of its own."""
        _count(self._books.request_failures, model, exc)

    def queued(self, model: str, seconds: float) -> None:
        """Note how long a request had to wait for its model."""
        for each in self._instruments:
            each.queue_time.record(seconds, {names.MODEL: model})

    def first_byte(self, model: str, seconds: float, *, streamed: bool) -> None:
        """Note how long after its request the first byte of an answer's body came."""
        for each in self._first_bytes:
            each.record(seconds, {names.MODEL: model, names.STREAMED: streamed})

    def phase_took(self, name: str, model: str, seconds: float) -> None:
        """Note a phase of a switch that is over, and the model that it was about."""
        for each in self._instruments:
            each.phase_duration.record(seconds, {names.SWITCH_PHASE: name, names.MODEL: model})

    def switched(
        self, origin: str | None, to: str | None, outcome: str, seconds: float, exc: BaseException | None = None
    ) -> None:
        """Note a switch that is over, and what made it fail if it has."""
        if exc is not None:
            _count(self._books.switch_failures, to or "", exc)
        attributes = {names.SWITCH_FROM: origin or "", names.SWITCH_TO: to or "", names.SWITCH_OUTCOME: outcome}
        for each in self._instruments:
            each.switch_duration.record(seconds, attributes)

    @contextmanager
    def switch(self, parent: Context, waiters: Sequence[SpanContext], attributes: Attributes) -> Iterator[Span]:
        """Open the span of a switch, under the span of the request that began it."""
        self._look()
        links = [Link(context) for context in waiters if context.is_valid]
        with self._tracer.start_as_current_span(SPAN_SWITCH, context=parent, links=links, attributes=attributes) as span:
            yield span

    @contextmanager
    def phase(self, name: str, attributes: Attributes = None) -> Iterator[Span]:
        """Open the span of one phase of the current switch."""
        with self._tracer.start_as_current_span(name, attributes=attributes) as span:
            yield span

    def _look(self) -> None:
        """See whether the application has set global providers meanwhile."""
        self._look_again = time.monotonic() + 1.0
        self._is_traced = self._is_traced or not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)
        if not self._has_meter:
            provider = metrics.get_meter_provider()
            # The API's own stand for none: there is no public name for that of them which waits for another one.
            if not type(provider).__module__.startswith("opentelemetry.metrics"):
                self._has_meter = True
                self._measure(provider)

    def _measure(self, provider: MeterProvider, first_bytes: FirstByteTimes | None = None) -> None:
        number = _GATEWAYS[provider] = _GATEWAYS.get(provider, 0) + 1
        meter = provider.get_meter(SCOPE if number == 1 else f"{SCOPE}.{number}")
        instruments = Instruments(meter, self._books)
        self._instruments.append(instruments)
        self._first_bytes.append(first_bytes or instruments.first_byte)
        self.is_measured = True


_GATEWAYS: WeakKeyDictionary[MeterProvider, int] = WeakKeyDictionary()
"""How many gateways record into a provider. Each has a meter of its own: of two gauges by one name the SDK reads the first."""


def _count(counts: dict[tuple[str, str], int], model: str, exc: BaseException) -> None:
    key = model, type(exc).__qualname__
    counts[key] = counts.get(key, 0) + 1


def failed(span: Span, exc: BaseException, kind: str | None = None) -> None:
    """Mark `span` as failed by `exc`, exception event and `error.type` included."""
    span.record_exception(exc)
    span.set_status(Status(StatusCode.ERROR, str(exc)))
    span.set_attribute(ERROR_TYPE, kind or type(exc).__qualname__)


def inject_headers(headers: Headers, context: Context) -> None:
    """Write a trace context into the headers of a request to a backend, in place of any that it carries."""
    span = trace.get_current_span(context).get_span_context()
    is_valid = span.is_valid
    if is_valid and context.get(_BARE_KEY) and not span.trace_state:
        # What the propagator would write, for a tenth of the price.
        headers.append((b"traceparent", b"00-%032x-%016x-%02x" % (span.trace_id, span.span_id, span.trace_flags)))
        return
    if is_valid and any(name == b"tracestate" for name, _ in headers):
        # A trace that begins here has no state: the client's must not stay beside it.
        headers[:] = [pair for pair in headers if pair[0] != b"tracestate"]
    inject(headers, context, setter=_SETTER)


_W3C = frozenset({b"traceparent", b"tracestate", b"baggage"})
_NAME: Callable[[tuple[bytes, bytes]], bytes] = itemgetter(0)


@lru_cache(maxsize=4)
def _only_w3c(propagator: TextMapPropagator) -> bool:
    parts = getattr(propagator, "_propagators", (propagator,))  # of a composite; without them, no short cut
    return all(type(part) in (TraceContextTextMapPropagator, W3CBaggagePropagator) for part in parts)


def _is_w3c() -> bool:
    """Whether contexts are carried in W3C's headers only, as they are by default."""
    return _only_w3c(get_global_textmap())
