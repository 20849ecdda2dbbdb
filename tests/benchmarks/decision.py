"""What one decision costs, with 10, 1,000 and 10,000 waiting requests: `make bench-decision`.

A decision is one `Decider.choose`: the policy is asked for each model that has waiting requests, here two of three, and
answers `Stay`, so that it is asked for all of them. The queues are measured side by side, in turn, so that a slow moment of
the machine meets all of them alike. A second row has a queue from which the older half has given up, as clients of an
overloaded gateway do. Fails if a decision takes a millisecond, or twice as long for the long queue as for the short one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, PressurePolicy, SwitchPolicy, ThroughputPolicy
from llmux_asgi._decision import Decider
from llmux_asgi._estimates import Estimates, ModelCosts
from llmux_asgi._state import SwitcherState, Ticket

DEPTHS = (10, 1_000, 10_000)
ROUNDS = 300
DECISIONS = 20
"""Decisions that are timed as one."""
LIMIT = 1e-3
"""Seconds that a decision may take."""

POLICIES: dict[str, Callable[[], SwitchPolicy]] = {
    "fifo": FifoPolicy,
    "gated_quantum": lambda: GatedQuantumPolicy(quantum=1000),
    "pressure": lambda: PressurePolicy(quantum=1000, max_wait=1e9),
    "throughput": lambda: ThroughputPolicy(max_wait=1e9),
}


def blame(model: str, what: str, exc: Exception | None = None) -> None:
    """Nobody is to blame here."""
    raise AssertionError(f"{model}: {what}") from exc


def queue_up(state: SwitcherState, depth: int, *, gone: bool = False) -> None:
    """Have `a` serve one request and `depth` requests wait, for `b` and `c` in turn; with `gone` as many gave up before."""
    state.inquire()
    state.adopt("a")
    assert state.try_admit("a")
    leaving = [Ticket("bc"[index % 2], float(index)) for index in range(depth if gone else 0)]
    for ticket in leaving:
        state.enqueue(ticket)
    for index in range(depth):
        state.enqueue(Ticket("bc"[index % 2], float(depth + index)))
    for ticket in leaving:
        state.leave(ticket)


def decider_of(policy: SwitchPolicy, state: SwitcherState) -> Decider:
    """A decider whose clock stands still."""
    estimates = Estimates("abc")
    levels = dict.fromkeys("abc", 1)
    for model in "abc":
        estimates.seed(model, 1, ModelCosts(2.0, 4.0))

    def costs() -> tuple[Mapping[str, float], Mapping[str, float]]:
        return estimates.sleep_costs(levels), estimates.wake_costs(levels)

    return Decider(policy, state, lambda: 20_000.0, blame, lambda: None, costs)


def measure(make: Callable[[], SwitchPolicy], *, gone: bool = False) -> list[float]:
    """Return the median seconds of a decision, for each of `DEPTHS`."""
    deciders = []
    for depth in DEPTHS:
        state = SwitcherState("abc")
        queue_up(state, depth, gone=gone)
        deciders.append(decider_of(make(), state))
    taken: list[list[float]] = [[] for _ in DEPTHS]
    for _ in range(ROUNDS):
        for decider, times in zip(deciders, taken, strict=True):
            begun = time.perf_counter()
            for _ in range(DECISIONS):
                decider.choose()
            times.append((time.perf_counter() - begun) / DECISIONS)
    return [statistics.median(times) for times in taken]


def main() -> None:
    """Print the table. Exit status 1 if a decision is too dear, or dearer for a longer queue."""
    print(f"{'waiting':24}" + "".join(f"{depth:>12,}" for depth in DEPTHS))
    sound = True
    for name, make in POLICIES.items():
        for gone in (False, True):
            medians = measure(make, gone=gone)
            print(f"{name + (', half gave up' if gone else ''):28}" + "".join(f"{1e6 * each:9.1f} µs" for each in medians))
            sound = sound and max(medians) < LIMIT and medians[-1] < 2 * medians[0]
    if not sound:
        sys.exit(f"a decision took {LIMIT * 1000:g} ms or more, or grows with the queue")


if __name__ == "__main__":
    main()
