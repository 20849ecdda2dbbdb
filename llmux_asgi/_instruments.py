"""The metrics: what there is, and the OpenTelemetry instruments that record it. Names and attributes are those of `telemetry`.

Most are read when somebody collects them, from counts that the gateway keeps anyway. Only what has a distribution is recorded
as it happens: with the SDK that costs some microseconds, so it is done once a request, and once more if the request waited.
What each request has and `/metrics` shows is added up here.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from opentelemetry.metrics import CallbackOptions, Observation

from . import _names as names

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter
    from opentelemetry.util.types import AttributeValue

    from ._state import SwitcherStatistics

__all__ = ["METRICS", "SECONDS", "Books", "FirstByteTimes", "Instruments", "Metric"]

Kind: TypeAlias = Literal["histogram", "counter", "up-down counter", "gauge"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bounds of the buckets: those of the HTTP conventions, and on to minutes, which a cold start takes."""
_SERVER_STATES = ("awake", "asleep", "stopped", "unreachable", "unknown")


@dataclass(frozen=True, slots=True)
class Metric:
    """What one instrument is."""

    name: str
    kind: Kind
    unit: str
    attributes: tuple[str, ...]
    description: str


METRICS = (
    Metric(
        names.METRIC_SWITCH_DURATION,
        "histogram",
        "s",
        (names.SWITCH_FROM, names.SWITCH_TO, names.SWITCH_OUTCOME),
        "Duration of a switch.",
    ),
    Metric(
        names.METRIC_PHASE_DURATION,
        "histogram",
        "s",
        (names.SWITCH_PHASE, names.MODEL),
        "Duration of one phase of a switch.",
    ),
    Metric(names.METRIC_QUEUE_TIME, "histogram", "s", (names.MODEL,), "Time that a request which had to wait waited."),
    Metric(
        names.METRIC_FIRST_BYTE,
        "histogram",
        "s",
        (names.MODEL, names.STREAMED),
        "Time from a request's arrival to the first byte of its answer's body, its wait included.",
    ),
    Metric(names.METRIC_REQUESTS, "counter", "{request}", (names.MODEL, names.HTTP_RESPONSE_STATUS_CODE), "Requests answered."),
    Metric(
        names.METRIC_REQUEST_FAILURES,
        "counter",
        "{request}",
        (names.MODEL, names.ERROR_TYPE),
        "Requests that the gateway answered, or ended, with an error of its own.",
    ),
    Metric(
        names.METRIC_SWITCH_FAILURES,
        "counter",
        "{switch}",
        (names.SWITCH_TO, names.ERROR_TYPE),
        "Switches that failed.",
    ),
    Metric(names.METRIC_IN_FLIGHT, "up-down counter", "{request}", (names.MODEL,), "Requests that are being served."),
    Metric(names.METRIC_WAITING, "up-down counter", "{request}", (names.MODEL,), "Requests that wait for their model."),
    Metric(
        names.METRIC_FROZEN,
        "up-down counter",
        "{request}",
        (names.MODEL,),
        "Requests that a switch has stopped in the middle and that go on at their model's next turn.",
    ),
    Metric(
        names.METRIC_QUEUE_OLDEST,
        "gauge",
        "s",
        (names.MODEL,),
        "Time that the first of those who wait for a model has waited; 0 if nobody waits.",
    ),
    Metric(
        names.METRIC_SERVER_STATE,
        "up-down counter",
        "1",
        (names.MODEL, names.SERVER_STATE),
        "1 for the state that a model's server was last known to be in, 0 for the others.",
    ),
    Metric(
        names.METRIC_ESTIMATE,
        "gauge",
        "s",
        (names.MODEL, names.SWITCH_PHASE),
        "What putting a model to sleep and waking it is estimated to take.",
    ),
    Metric(
        names.METRIC_POOL_TIME,
        "counter",
        "s",
        (names.SHARE,),
        "Time since the gateway's start, by how it was spent.",
    ),
)


class FirstByteTimes:
    """What the instrument of the times to first byte is for OpenTelemetry's SDK, at a tenth of its cost: for `/metrics`."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, bool], list[int]] = {}
        """How many times fell into each bucket, by model and whether the answer is a stream."""
        self.sums: dict[tuple[str, bool], float] = {}

    def record(self, amount: float, attributes: Mapping[str, AttributeValue]) -> None:
        """Take in one time, in seconds."""
        key = str(attributes[names.MODEL]), bool(attributes[names.STREAMED])
        if (counts := self.counts.get(key)) is None:
            counts = self.counts[key] = [0] * (len(SECONDS) + 1)
            self.sums[key] = 0.0
        counts[bisect_left(SECONDS, amount)] += 1
        self.sums[key] += amount


@dataclass
class Books:
    """What is counted as it happens, and whom to ask for the rest. Belongs to one gateway, whoever collects."""

    requests: dict[tuple[str, int], int] = field(default_factory=dict)
    """Requests by model and status."""
    request_failures: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests that failed, by model and kind of error."""
    switch_failures: dict[tuple[str, str], int] = field(default_factory=dict)
    """Switches that failed, by target and kind of error."""
    statistics: Callable[[], SwitcherStatistics | None] = lambda: None
    """Gives a snapshot of the switcher; `None`: there is none any more."""


class Instruments:
    """The instruments of one meter, over the books of one gateway.

    Those that are observed keep nothing of it alive: a provider never lets go of its callbacks.
    """

    def __init__(self, meter: Meter, books: Books) -> None:
        self._books = weakref.ref(books)
        readers: dict[str, Callable[[Books], Iterator[Observation]]] = {
            names.METRIC_REQUESTS: _requests,
            names.METRIC_REQUEST_FAILURES: _request_failures,
            names.METRIC_SWITCH_FAILURES: _switch_failures,
            names.METRIC_IN_FLIGHT: _in_flight,
            names.METRIC_WAITING: _waiting,
            names.METRIC_FROZEN: _frozen,
            names.METRIC_QUEUE_OLDEST: _oldest_waits,
            names.METRIC_SERVER_STATE: _server_states,
            names.METRIC_POOL_TIME: _shares,
            names.METRIC_ESTIMATE: _estimates,
        }
        create = {
            "counter": meter.create_observable_counter,
            "up-down counter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        histograms: dict[str, Histogram] = {}
        for metric in METRICS:
            if metric.kind == "histogram":
                histograms[metric.name] = meter.create_histogram(
                    metric.name, metric.unit, metric.description, explicit_bucket_boundaries_advisory=SECONDS
                )
            else:
                callbacks = [self._callback(readers[metric.name])]
                create[metric.kind](metric.name, callbacks, metric.unit, metric.description)
        self.switch_duration = histograms[names.METRIC_SWITCH_DURATION]
        self.phase_duration = histograms[names.METRIC_PHASE_DURATION]
        self.queue_time = histograms[names.METRIC_QUEUE_TIME]
        self.first_byte = histograms[names.METRIC_FIRST_BYTE]

    def _callback(self, read: Callable[[Books], Iterator[Observation]]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        reference = self._books

        def observe(options: CallbackOptions) -> Sequence[Observation]:
            books = reference()
            return list(read(books)) if books is not None else []

        return observe


def _requests(books: Books) -> Iterator[Observation]:
    for (model, status), count in list(books.requests.items()):
        yield Observation(count, {names.MODEL: model, names.HTTP_RESPONSE_STATUS_CODE: status})


def _request_failures(books: Books) -> Iterator[Observation]:
    for (model, kind), count in list(books.request_failures.items()):
        yield Observation(count, {names.MODEL: model, names.ERROR_TYPE: kind})


def _switch_failures(books: Books) -> Iterator[Observation]:
    for (model, kind), count in list(books.switch_failures.items()):
        yield Observation(count, {names.SWITCH_TO: model, names.ERROR_TYPE: kind})


def _in_flight(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for model, count in statistics.in_flight.items():
            yield Observation(count, {names.MODEL: model})


def _waiting(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for model, count in statistics.waiting.items():
            yield Observation(count, {names.MODEL: model})


def _frozen(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for model, count in statistics.frozen.items():
            yield Observation(count, {names.MODEL: model})


def _oldest_waits(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for model in statistics.waiting:
            yield Observation(statistics.oldest_waits.get(model, 0.0), {names.MODEL: model})


def _shares(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for share, seconds in statistics.shares.items():
            yield Observation(seconds, {names.SHARE: share})


def _server_states(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for model, state in statistics.servers.items():
            for each in _SERVER_STATES:
                attributes: dict[str, AttributeValue] = {names.MODEL: model, names.SERVER_STATE: each}
                yield Observation(int(each == state), attributes)


def _estimates(books: Books) -> Iterator[Observation]:
    if statistics := books.statistics():
        for model, costs in statistics.costs.items():
            for phase, seconds in (("sleep", costs.sleep), ("wake", costs.wake)):
                if seconds is not None:
                    yield Observation(seconds, {names.MODEL: model, names.SWITCH_PHASE: phase})
