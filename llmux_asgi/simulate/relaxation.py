"""A bound on the sum of all waits for any number of models: a Lagrangian relaxation with a price for each time slot.

A turn of model m occupies the server from when its wake begins until its sleep is over, and the turns of all models must not
overlap. Let that be dropped, and let each slot t that a turn occupies cost a price λ_t ≥ 0 instead. Then each model has a
problem of its own, and the sum of their least costs, less the sum of all prices, is no more than the cost of any schedule that
keeps the rule (weak duality): it pays each slot once at most. So any prices give a true bound. Good ones are sought by
subgradient steps: dearer where several models want to be, cheaper where none does.

One model alone, with B(u) the least cost of all that comes after it was left in slot u, is the minimum of lines as in
`bound.py`:

    B(u) = min over e ≥ u + sleep + wake of  away(u, e) + min over v ≥ l(e) of  λ(e - wake … v + sleep) + B(v)

Source: Geoffrion, *Lagrangean relaxation for integer programming*, 1974; steps after Polyak, 1969.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from .._estimates import ModelCosts
from ._grid import Grid, LowerHull, Queue, slot_width

__all__ = ["relaxed_cost"]

_ROUNDS = 60
_STEPS = 600_000
"""Slots times models times rounds: the search for prices takes no more than these, which is a few seconds."""
_PATIENCE = 5
"""Rounds without a better bound after which the steps are halved."""


def relaxed_cost(
    arrivals: Mapping[str, list[float]],
    costs: Mapping[str, ModelCosts],
    active: str | None = None,
    *,
    holds: Mapping[str, list[float]] | None = None,
    anticipating: bool = True,
    slots: int = 3_000,
) -> float:
    """Return a bound on the sum of the waits in seconds. `arrivals` are times by model.

    `holds`: for how many seconds each request holds its model awake, in the same order; `None`: drains are ignored. Prices are
    sought on about `slots` slots, more if those would be long against a switch; the result is on finer ones.
    """
    width = slot_width(arrivals, costs, slots)
    coarse = _Relaxation(Grid.of(arrivals, costs, width, holds), active, anticipating)
    prices = coarse.search()
    factor = max(1, round(width / slot_width(arrivals, costs, 10 * slots)))
    fine = _Relaxation(Grid.of(arrivals, costs, width / factor, holds), active, anticipating)
    refined = [prices[min(slot // factor, len(prices) - 1)] for slot in range(fine.end)]
    return max(coarse.value(prices)[0] * width, fine.value(refined)[0] * width / factor, 0.0)


class _Relaxation:
    """The load on a grid. Costs are in slots."""

    def __init__(self, grid: Grid, active: str | None, anticipating: bool) -> None:
        sleeps = {model: grid.slots(queue.sleep) for model, queue in grid.queues.items()}
        self.end = grid.horizon + 1 + max(sleeps.values(), default=0)
        """The number of slots that have a price."""
        self._models = []
        for model, queue in grid.queues.items():
            before = 0 if active is None or active == model else sleeps[active]
            least = min((sleep for other, sleep in sleeps.items() if other != model), default=0)
            wake = grid.slots(queue.wake)
            # It is left for another one, and that one for it.
            others = [other.sleep + other.wake for name, other in grid.queues.items() if name != model]
            leaves = queue.leaves(grid.slots(queue.sleep + queue.wake + min(others, default=0.0)))
            self._models.append(
                _Alone(queue, leaves, grid.horizon, sleeps[model], wake, before, least, active == model, anticipating)
            )

    def value(self, prices: Sequence[float]) -> tuple[float, list[int]]:
        """The bound that `prices` give, and how many models occupy each slot."""
        totals = [0.0, *accumulate(prices)]
        value = -totals[-1]
        changes = [0] * (self.end + 1)
        for model in self._models:
            cost, turns = model.solve(totals)
            value += cost
            for begin, end in turns:
                changes[begin] += 1
                changes[end] -= 1
        return value, list(accumulate(changes))[:-1]

    def search(self) -> list[float]:
        """Look for good prices."""
        best, found = 0.0, [0.0] * self.end
        # One price for all slots first: where it is right by and large the steps have little left to do.
        constant = 0.25
        for _ in range(12):
            prices = [constant] * self.end
            value, _ = self.value(prices)
            if value < best:
                break
            best, found = value, prices
            constant *= 4
        prices, pace, failures = found, 1.0, 0
        rounds = min(_ROUNDS, _STEPS // (self.end * len(self._models)))
        for _ in range(rounds):
            value, occupied = self.value(prices)
            if value > best:
                best, found, failures = value, prices, 0
            else:
                failures += 1
                if failures == _PATIENCE:
                    prices, pace, failures = found, pace / 2, 0
                    value, occupied = self.value(prices)
            excess = [count - 1 for count in occupied]
            # A slot that nobody wants and that costs nothing cannot become cheaper.
            excess = [0 if each < 0 and price == 0.0 else each for each, price in zip(excess, prices, strict=True)]
            norm = sum(each * each for each in excess)
            if not norm:
                break
            step = pace * (1.2 * best + 1.0 - value) / norm
            prices = [max(0.0, price + step * each) for price, each in zip(prices, excess, strict=True)]
        return found


class _Alone:
    """One model that pays for the slots that it occupies."""

    def __init__(
        self,
        queue: Queue,
        leaves: Sequence[int],
        horizon: int,
        sleep: int,
        wake: int,
        first_sleep: int,
        other_sleep: int,
        active: bool,
        anticipating: bool,
    ) -> None:
        self._queue = queue
        self._leaves = [min(leave, horizon) for leave in leaves]
        self._horizon = horizon
        self._sleep, self._wake = sleep, wake
        self._active = active
        # The earliest return, by the slot in which it was left.
        self._earliest = [max(left + sleep + wake, left + 1) for left in range(horizon + 1)]
        self._first = first_sleep + wake  # there is nobody to put to sleep if none was active
        if not anticipating:
            self._earliest = [
                max(early, queue.following[left] + other_sleep + wake) for left, early in enumerate(self._earliest)
            ]
            self._first = max(self._first, queue.following[0] + wake + min(first_sleep, other_sleep))

    def solve(self, totals: Sequence[float]) -> tuple[float, list[tuple[int, int]]]:
        """The least cost at prices whose sums up to each slot are `totals`, and the slots that its turns occupy."""
        queue, horizon, sleep, wake = self._queue, self._horizon, self._sleep, self._wake
        before, weighted, earliest, leaves = queue.before, queue.weighted, self._earliest, self._leaves
        everybody = before[-1]
        hull = LowerHull()
        added = horizon + 1
        stay = [math.inf] * (horizon + 2)
        leave = [horizon] * (horizon + 2)
        back = [-1] * (horizon + 1)
        for left in range(horizon, -1, -1):
            gone, rest = before[left + 1], 0.0
            if gone < everybody:
                for slot in range(added - 1, earliest[left] - 1, -1):
                    paid = totals[slot - wake if slot > wake else 0]
                    hull.add(slot - 1, (slot - 1) * before[slot] - weighted[slot] - paid + stay[leaves[slot]])
                added = min(added, earliest[left])
                rest, slope = hull.lowest(gone)
                rest += weighted[left + 1]
                back[left] = slope + 1
            total = totals[left + sleep] + rest
            if total < stay[left + 1]:
                stay[left], leave[left] = total, left
            else:
                stay[left], leave[left] = stay[left + 1], leave[left + 1]
        begin, turns = 0, []
        if self._active:
            slot, cost = 0, stay[leaves[0]]
        elif everybody:
            cost, slot = min(
                (queue.away(-1, slot) - totals[max(slot - wake, 0)] + stay[leaves[slot]], slot)
                for slot in range(self._first, horizon + 1)
            )
            begin = max(slot - wake, 0)
        else:
            return 0.0, []
        while True:
            left = leave[leaves[slot]]
            turns.append((begin, left + sleep))
            slot = back[left]
            if slot < 0:
                return cost, turns
            begin = max(slot - wake, 0)
