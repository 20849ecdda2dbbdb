"""Virtual time: a queue of what is going to happen, sorted by when."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

__all__ = ["ARRIVAL", "FINISH", "GIVE_UP", "STEP", "Agenda"]

# What happens at one and the same time happens in this order.
FINISH, STEP, ARRIVAL, GIVE_UP = range(4)


class Agenda:
    """The clock, and what it will strike for. Times are in seconds since the beginning of the load."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._pushed = 0

    @property
    def next_time(self) -> float:
        """When something happens next; infinity: nothing will."""
        return self._events[0][0] if self._events else math.inf

    def at(self, time: float, rank: int, what: Callable[[Any], None], whom: object) -> None:
        """Have `what(whom)` called at `time`, after those of a lower rank and those that came before it."""
        self._pushed += 1
        heapq.heappush(self._events, (time, rank, self._pushed, what, whom))

    def advance(self) -> None:
        """Go to the next time that something happens at, and let all of that happen. There must be something."""
        events, pop = self._events, heapq.heappop
        now = self.now = events[0][0]
        while events and events[0][0] == now:
            event = pop(events)
            event[3](event[4])
