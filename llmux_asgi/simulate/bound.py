"""How short the mean wait of a load can be at best, for one who knows the future.

The bound is on every schedule of an open load in which, at any time, one model is awake at most; a model j serves no sooner
than sleep_i + wake_j seconds after i was left for it; and a model is not left before those are answered who were admitted when
it was woken. Only that part of the drain is counted, and of those requests only the ones that came within the shortest absence
possible before the return. The gate and the cooldown are ignored. All that makes schedules only longer: it is a true bound.

Two kinds:

    clairvoyant       a switch may begin before anybody waits for its target
    non-anticipating  a switch to a model is not begun before somebody waits for it, as in the gateway

Two models: by dynamic programming over (time, model), exactly but for the grid. With V_i(s) the least cost of all that comes
after i was woken in slot s, j having been left C_ji before, and e the slot in which j is back:

    V_i(s) = min over e ≥ l_i(s) + C_ij of  away_j(s - C_ji, e) + V_j(e)

l_i(s) is when i may be left at the earliest. away_j is linear in the number of requests before it was left, for each e. So the
minimum is that of lines at a point, and all of it takes O(T) steps and not O(T²).

More models: see `relaxation.py`. Where traffic is sparse another bound is better: what each pair of models alone would cost,
summed up and divided by N - 1, because each model is in N - 1 pairs. The better one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from .._estimates import ModelCosts
from ._grid import Grid, LowerHull, Queue, slot_width
from .relaxation import relaxed_cost
from .workload import Workload

__all__ = ["Bound", "lower_bound", "two_model_cost"]


@dataclass(frozen=True, slots=True)
class Bound:
    """Lower bounds on the mean wait in seconds."""

    clairvoyant: float
    non_anticipating: float


def lower_bound(
    workload: Workload, costs: Mapping[str, ModelCosts], *, active: str | None = None, drain: float | None = None
) -> Bound | None:
    """Return bounds on the mean wait of an open load; `None` if it is a closed one: its arrivals depend on the schedule.

    `costs` is what a sleep and a wake of each model take in seconds, `active` the model that is awake at the start.
    `drain` is the drain's deadline in seconds: `None`, there is none; 0.0, running requests are cut.
    """
    if any(len(script.rounds) > 1 for script in workload.scripts):
        return None
    arrivals: dict[str, list[float]] = {} if active is None else {active: []}
    holds: dict[str, list[float]] = {} if active is None else {active: []}
    for script in workload.scripts:
        for arrival in (arrival for part in script.rounds for arrival in part):
            arrivals.setdefault(arrival.model, []).append(script.start + arrival.offset)
            holds.setdefault(arrival.model, []).append(arrival.service if drain is None else min(arrival.service, drain))
    count = sum(len(times) for times in arrivals.values())
    if not count:
        return Bound(0.0, 0.0)
    clairvoyant, other = (_cost(arrivals, holds, costs, active, anticipating=kind) / count for kind in (True, False))
    return Bound(clairvoyant, max(other, clairvoyant))  # what bounds those who may anticipate bounds the others too


def _cost(
    arrivals: Mapping[str, list[float]],
    holds: Mapping[str, list[float]],
    costs: Mapping[str, ModelCosts],
    active: str | None,
    *,
    anticipating: bool,
) -> float:
    if len(arrivals) <= 2:
        return two_model_cost(arrivals, costs, active, holds=holds, anticipating=anticipating)
    relaxed = relaxed_cost(arrivals, costs, active, holds=holds, anticipating=anticipating)
    if not anticipating:
        return relaxed  # of two models a third one may begin to leave the first before anybody waits for the second
    pairs = [{one: arrivals[one], two: arrivals[two]} for one, two in combinations(arrivals, 2)]
    alone = sum(two_model_cost(pair, costs, active if active in pair else None, holds=holds, slots=5_000) for pair in pairs)
    return max(relaxed, alone / (len(arrivals) - 1))


def two_model_cost(
    arrivals: Mapping[str, list[float]],
    costs: Mapping[str, ModelCosts],
    active: str | None = None,
    *,
    holds: Mapping[str, list[float]] | None = None,
    anticipating: bool = True,
    slots: int = 40_000,
) -> float:
    """Return a bound on the sum of the waits in seconds, for one model or two. `arrivals` are times by model.

    `holds`: for how many seconds each request holds its model awake, in the same order; `None`: drains are ignored. The time is
    divided into about `slots` slots, more if they would be long against a switch.
    """
    grid = Grid.of(arrivals, costs, slot_width(arrivals, costs, slots), holds)
    names, queues = list(grid.queues), list(grid.queues.values())
    if len(queues) == 1:  # the other one is never wanted
        names.append("")
        queues.append(Queue((), grid.horizon, 0.0, grid.width))
    # What it takes to come to a model from the other one.
    switch = [grid.slots(queues[1 - i].sleep + queues[i].wake) for i in (0, 1)]
    if not all(switch):
        return 0.0  # a switch is shorter than a slot
    absence = grid.slots(sum(queue.sleep + queue.wake for queue in queues))
    leaves = [queue.leaves(absence) for queue in queues]
    least = _turns(grid.horizon, queues, switch, leaves, anticipating)

    def first_turn(i: int) -> list[float]:
        """For each slot in which i is woken, j never having been: the least cost of all that comes after."""
        other, values = queues[1 - i], least[1 - i]
        if not other.before[-1]:
            return [0.0] * (grid.horizon + 1)
        lowest = [math.inf] * (grid.horizon + 2)
        for back in range(grid.horizon, -1, -1):
            lowest[back] = min(lowest[back + 1], other.away(-1, back) + values[back])
        wanted = 0 if anticipating else other.following[0]
        return [lowest[min(max(leave, wanted) + switch[1 - i], grid.horizon + 1)] for leave in leaves[i]]

    if active is not None:
        return first_turn(names.index(active))[0] * grid.width
    best = math.inf
    for i in (0, 1):
        after = first_turn(i)
        earliest = grid.slots(queues[i].wake) + (0 if anticipating else queues[i].following[0])
        best = min([best, *(queues[i].away(-1, back) + after[back] for back in range(earliest, grid.horizon + 1))])
    return best * grid.width


def _turns(
    horizon: int, queues: list[Queue], switch: list[int], leaves: list[list[int]], anticipating: bool
) -> list[list[float]]:
    """V of the module's docstring, for both models, in slots."""
    least = [[0.0] * (horizon + 1) for _ in queues]
    hulls = [LowerHull(), LowerHull()]
    added = [horizon + 1, horizon + 1]
    for slot in range(horizon, -1, -1):
        for i in (0, 1):
            other, values, hull, there = queues[1 - i], least[1 - i], hulls[i], switch[1 - i]
            left = max(slot - switch[i], -1)
            gone = other.before[left + 1]
            if gone == other.before[-1]:
                continue  # nobody comes for it any more
            earliest = leaves[i][slot] + there
            if not anticipating:
                # One slot sooner than it was left, for that may be rounded down by one more.
                earliest = max(earliest, other.following[max(left - 1, 0)] + there)
            for back in range(added[i] - 1, earliest - 1, -1):
                hull.add(back - 1, (back - 1) * other.before[back] - other.weighted[back] + values[back])
            added[i] = min(added[i], earliest)
            least[i][slot] = hull.lowest(gone)[0] + other.weighted[left + 1]
    return least
