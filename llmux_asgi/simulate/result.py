"""What came out of a simulation: every request, every switch, and the figures made of them."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["ClassFigures", "Figures", "Outcome", "RequestRecord", "Result", "SwitchRecord", "percentile"]


class Outcome(enum.Enum):
    """What became of a request."""

    ANSWERED = "answered"
    LOST = "lost"
    """It has waited for `request_timeout` and left: a 504 at the gateway."""
    CUT = "cut"
    """Its model was put to sleep while it ran: drain off, or the drain's deadline passed."""
    EXPIRED = "expired"
    """It was frozen for longer than `max_frozen`: an error at the gateway."""
    REFUSED = "refused"
    """Too many were waiting already: a 429 at the gateway."""


class RequestRecord(NamedTuple):
    """One request. Times are in seconds since the beginning of the load."""

    model: str
    arrival: float
    wait: float
    """From its arrival until it was first admitted, in seconds; if it was lost, until it left; if it was refused, 0.0."""
    finish: float
    """When it was over, in whichever way."""
    outcome: Outcome
    priority: str | None = None
    """Its priority class."""
    freezes: int = 0
    """How often a switch has frozen it."""
    frozen: float = 0.0
    """For how many seconds in all: each time from when its model was asleep until it was active again."""


class SwitchRecord(NamedTuple):
    """One switch, completed or abandoned. Times are in seconds since the beginning of the load."""

    origin: str | None
    target: str
    begun: float
    """When the policy decided."""
    committed: float | None
    """When the drain was over and the sleep began; `None` if it was abandoned before that."""
    ended: float
    """When the target served, or the switch was abandoned."""
    completed: bool


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """The waits of one priority class, in seconds, of those requests that were not refused."""

    priority: str | None
    """`None`: requests without a class."""
    requests: int
    """Those that were refused included."""
    mean_wait: float
    p50_wait: float
    p99_wait: float
    longest_wait: float


@dataclass(frozen=True, slots=True)
class Figures:
    """A result in numbers. Times are in seconds. Waits and freezes are those of the requests that were not refused."""

    requests: int
    """Those that were refused included."""
    mean_wait: float
    p50_wait: float
    p99_wait: float
    longest_wait: float
    switches: int
    """Completed ones."""
    serving_share: float
    """The time in which a model was active with at least one request in flight, drains included, as a share of the makespan."""
    makespan: float
    """From the first arrival until the last request was over."""
    lost: int
    cut: int
    """Those that were frozen for too long included."""
    refused: int
    freezes: int
    """How many times a request was frozen, in all."""
    mean_frozen: float
    """Over all requests, also those that were never frozen, as the mean wait is."""
    longest_frozen: float
    """Of one request, in all its freezes."""
    classes: Sequence[ClassFigures]
    """By priority class, in order of first arrival; empty if no request has one."""


@dataclass(frozen=True, slots=True)
class Result:
    """One policy's run over one load."""

    policy: str
    requests: Sequence[RequestRecord]
    """In order of arrival."""
    switches: Sequence[SwitchRecord]
    """In order of time."""
    active_at_start: str | None
    serving: float
    """Seconds in which a model was active and had at least one request in flight."""

    @property
    def begin(self) -> float:
        """The first arrival; 0.0 if there are no requests."""
        return min((request.arrival for request in self.requests), default=0.0)

    @property
    def end(self) -> float:
        """When the last request was over; 0.0 if there are none."""
        return max((request.finish for request in self.requests), default=0.0)

    def waits(self) -> list[float]:
        """Every wait but those of refused requests, the shortest first.

        Those of lost requests count as far as they went, so that losing them is no gain.
        """
        return _waits(self.requests)

    def figures(self) -> Figures:
        """Sum it up."""
        waits = self.waits()
        makespan = self.end - self.begin
        outcomes = [request.outcome for request in self.requests]
        frozen = [request.frozen for request in self.requests if request.freezes]
        by_class: dict[str | None, list[RequestRecord]] = {}
        for request in self.requests:
            by_class.setdefault(request.priority, []).append(request)
        return Figures(
            requests=len(self.requests),
            mean_wait=_mean(waits),
            p50_wait=percentile(waits, 0.5),
            p99_wait=percentile(waits, 0.99),
            longest_wait=waits[-1] if waits else 0.0,
            switches=sum(switch.completed for switch in self.switches),
            serving_share=self.serving / makespan if makespan > 0 else 0.0,
            makespan=makespan,
            lost=outcomes.count(Outcome.LOST),
            cut=outcomes.count(Outcome.CUT) + outcomes.count(Outcome.EXPIRED),
            refused=outcomes.count(Outcome.REFUSED),
            freezes=sum(request.freezes for request in self.requests),
            mean_frozen=math.fsum(frozen) / len(waits) if waits else 0.0,
            longest_frozen=max(frozen, default=0.0),
            classes=[_class_figures(*each) for each in by_class.items()] if by_class.keys() - {None} else [],
        )


def _class_figures(priority: str | None, requests: Sequence[RequestRecord]) -> ClassFigures:
    waits = _waits(requests)
    longest = waits[-1] if waits else 0.0
    return ClassFigures(priority, len(requests), _mean(waits), percentile(waits, 0.5), percentile(waits, 0.99), longest)


def _waits(requests: Sequence[RequestRecord]) -> list[float]:
    return sorted(request.wait for request in requests if request.outcome is not Outcome.REFUSED)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the sorted values lie, interpolated; 0.0 if there are none."""
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
