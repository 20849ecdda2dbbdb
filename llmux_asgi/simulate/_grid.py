"""A load on a grid of time slots, and the cheapest line at a point: what both kinds of bound are made of.

Slots are counted from 0, and slot k is the time from k·δ to (k + 1)·δ. Every time is rounded down, and so is what a sleep and
a wake take, because the floor of a sum is never less than the sum of the floors: a schedule whose times are rounded down is
one that the shorter switches allow. A request of slot k that is admitted in a later slot E has waited for more than E - 1 - k
slots, and that is what is charged, so that rounding makes no schedule dearer than it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from .._estimates import ModelCosts

__all__ = ["Grid", "LowerHull", "Queue", "slot_width"]

_FINEST = 0.001
"""Seconds. Finer than this a slot never is."""
_MOST = 100_000
"""More slots there never are; the bound of a long and sparse load is looser for that."""


class Queue:
    """The requests for one model. Prefix sums over the slots tell what it costs that it was away."""

    def __init__(self, requests: Iterable[tuple[int, int]], horizon: int, sleep: float, wake: float) -> None:
        """Take each request's slot, and for how many slots it holds its model awake once it is admitted."""
        counts = [0] * (horizon + 1)
        self._holds = [0] * (horizon + 1)
        for slot, hold in requests:
            counts[slot] += 1
            self._holds[slot] = max(self._holds[slot], hold)
        self.before = [0, *accumulate(counts)]
        """`before[k]`: requests of the slots before k."""
        self.weighted = [0, *accumulate(slot * count for slot, count in enumerate(counts))]
        """The sum of their slots."""
        self.following = [horizon + 1] * (horizon + 2)
        """`following[k]`: the first slot from k on that has a request; past the horizon if none has."""
        for slot in range(horizon, -1, -1):
            self.following[slot] = slot if counts[slot] else self.following[slot + 1]
        self.sleep, self.wake = sleep, wake
        """Seconds."""

    def away(self, left: int, back: int) -> int:
        """What those pay who come while the model is away: from the slot in which it was left (-1: always) to its return."""
        count = self.before[back] - self.before[left + 1]
        return (back - 1) * count - (self.weighted[back] - self.weighted[left + 1])

    def leaves(self, absence: int) -> list[int]:
        """For each slot of a return: before which slot the model is not left again, as those who waited are served.

        `absence` is the shortest time that the model can have been away. Whoever came in its last `absence` slots has waited.
        Made so that it never falls from one slot to the next. It is lower for that, not higher, so a bound stays one; and good
        prices are found sooner.
        """
        end = len(self._holds)
        window: deque[int] = deque()  # slots whose holds fall from one to the next
        result = list(range(end))
        for back in range(end):
            while window and window[0] <= back - absence:
                window.popleft()
            if window:
                result[back] = back + self._holds[window[0]]
            while window and self._holds[window[-1]] <= self._holds[back]:
                window.pop()
            window.append(back)
        for back in range(end - 2, -1, -1):
            result[back] = min(result[back], result[back + 1])
        return result


@dataclass(frozen=True, slots=True)
class Grid:
    """A load with one queue for each model that is asked for."""

    width: float
    """Of a slot, in seconds."""
    horizon: int
    """The last slot in which any sensible schedule brings a model back."""
    queues: Mapping[str, Queue]

    @classmethod
    def of(
        cls,
        arrivals: Mapping[str, list[float]],
        costs: Mapping[str, ModelCosts],
        width: float,
        holds: Mapping[str, list[float]] | None = None,
    ) -> Grid:
        """Lay the times of arrival, by model, on slots of `width` seconds.

        `holds` tells in the same order for how many seconds each request holds its model awake; `None`: not at all.
        """
        slots = {
            model: [
                (math.floor(time / width), math.floor(hold / width))
                for time, hold in zip(times, holds[model] if holds else [0.0] * len(times), strict=True)
            ]
            for model, times in arrivals.items()
        }
        last = max((slot for each in slots.values() for slot, _ in each), default=0)
        hold = max((hold for each in slots.values() for _, hold in each), default=0)
        sleeps = {model: costs[model].sleep or 0.0 for model in slots}
        wakes = {model: costs[model].wake or 0.0 for model in slots}
        # After the last arrival each model is woken once more at most, after the switch that may be under way by then.
        longest = max(sleeps.values(), default=0.0) + max(wakes.values(), default=0.0)
        horizon = last + 2 + (len(slots) + 1) * (math.floor(longest / width) + hold + 1)
        return cls(width, horizon, {model: Queue(each, horizon, sleeps[model], wakes[model]) for model, each in slots.items()})

    def slots(self, seconds: float) -> int:
        """A duration in whole slots, rounded down."""
        return math.floor(seconds / self.width + 1e-9)  # so that 0.7 is seven times 0.1


class LowerHull:
    """The lowest of many lines y = height - slope·x: lines come with falling slopes, questions with falling x.

    Each line comes in and goes out once, so that a question costs a constant time on average.
    """

    def __init__(self) -> None:
        self._slopes: list[int] = []
        self._heights: list[float] = []
        self._first = 0

    def add(self, slope: int, height: float) -> None:
        """Add a line that is less steep than those before."""
        slopes, heights = self._slopes, self._heights
        while len(slopes) - self._first >= 2:
            # The last one is nowhere the lowest if the new one passes below where the last meets the one before it.
            if (height - heights[-1]) * (slopes[-2] - slopes[-1]) > (heights[-1] - heights[-2]) * (slopes[-1] - slope):
                break
            slopes.pop()
            heights.pop()
        slopes.append(slope)
        heights.append(height)

    def lowest(self, x: int) -> tuple[float, int]:
        """Return the lowest y at `x`, and the slope of its line; infinity if there is none."""
        slopes, heights, first = self._slopes, self._heights, self._first
        end = len(slopes) - 1
        if end < first:
            return math.inf, 0
        while first < end and heights[first + 1] - slopes[first + 1] * x <= heights[first] - slopes[first] * x:
            first += 1
        self._first = first
        return heights[first] - slopes[first] * x, slopes[first]


def slot_width(arrivals: Mapping[str, list[float]], costs: Mapping[str, ModelCosts], slots: int) -> float:
    """Return the width of a slot in seconds, so that there are about `slots` of them, and several in the shortest switch.

    It is a round number, so that what a sleep takes is likely to be a multiple of it.
    """
    span = max((max(times, default=0.0) for times in arrivals.values()), default=0.0)
    switch = sum(min((getattr(costs[model], step) or 0.0 for model in arrivals), default=0.0) for step in ("sleep", "wake"))
    wanted = max(span / _MOST, _FINEST, min(span / slots, switch / 8))
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
