"""Those who send requests: scripts that are being played."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from .._admission import Priorities
from .._state import Ticket
from ._agenda import ARRIVAL, Agenda
from .result import Outcome
from .workload import Arrival, Script

__all__ = ["Clients", "Request"]


class _Client:
    """A script that is being played."""

    __slots__ = ("begun", "coming", "next", "open", "pause", "rounds")

    def __init__(self, script: Script) -> None:
        self.rounds = iter(script.rounds)
        self.pause = script.pause
        self.begun = 0.0
        self.coming: Iterator[Arrival] = iter(())
        self.next: Arrival | None = None
        self.open = 0
        """How many requests of the round are not over yet, those that have not arrived included."""


class Request(Ticket):
    """One request, and its place in the queue. Durations are in seconds."""

    __slots__ = (
        "client",
        "due",
        "finish",
        "freezes",
        "frozen",
        "frozen_since",
        "outcome",
        "priority",
        "remaining",
        "wait",
    )

    def __init__(self, arrival: Arrival, now: float, priority: str | None, head_start: float, client: _Client) -> None:
        super().__init__(arrival.model, now, head_start)
        self.priority = priority
        self.client = client
        self.remaining = arrival.service
        """What is left of its service, as of when it was last begun or stopped."""
        self.due = math.inf
        """When it will be answered, if its model is not put to sleep before; infinity while it does not run."""
        self.freezes = 0
        self.frozen_since = math.nan
        """When its present freeze began; NaN: it is not frozen."""
        self.frozen = 0.0
        """For how long it has been frozen, in all the freezes that are over."""
        self.wait = self.finish = math.nan
        self.outcome: Outcome | None = None


class Clients:
    """Plays scripts: calls `arrive` with each request when it comes, and has to be told when one is over."""

    def __init__(self, agenda: Agenda, priorities: Priorities, arrive: Callable[[Request], None]) -> None:
        self._agenda = agenda
        self._priorities = priorities
        self._arrive = arrive
        self.requests: list[Request] = []
        """All that have come, in order."""

    def play(self, script: Script) -> None:
        """Begin it when its time has come."""
        self._agenda.at(script.start, ARRIVAL, self._begin_round, _Client(script))

    def over(self, request: Request) -> None:
        """It was answered, or is lost in some way: the last one of a round lets the next round begin."""
        client = request.client
        client.open -= 1
        if not client.open:
            self._agenda.at(self._agenda.now + client.pause, ARRIVAL, self._begin_round, client)

    def _begin_round(self, client: _Client) -> None:
        arrivals = next(client.rounds, None)
        if arrivals is None:
            return
        client.begun, client.open = self._agenda.now, len(arrivals)
        client.coming = iter(sorted(arrivals, key=lambda arrival: arrival.offset))
        if arrivals:
            self._await_next(client)
        else:
            self._agenda.at(self._agenda.now + client.pause, ARRIVAL, self._begin_round, client)

    def _await_next(self, client: _Client) -> None:
        client.next = next(client.coming, None)
        if client.next is not None:
            self._agenda.at(client.begun + client.next.offset, ARRIVAL, self._come, client)

    def _come(self, client: _Client) -> None:
        assert client.next is not None  # noqa: S101 - for the type checker
        priority = self._priorities.choose(client.next.model, client.next.priority)
        request = Request(client.next, self._agenda.now, priority, self._priorities.head_start(priority), client)
        self.requests.append(request)
        self._await_next(client)
        self._arrive(request)
