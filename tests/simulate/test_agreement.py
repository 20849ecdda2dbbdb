"""The simulator and the real switcher, given the same load, do the same at the same times."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, ModelCosts, PressurePolicy, SwitchPolicy, ThroughputPolicy
from llmux_asgi.simulate import Arrival, Outcome, Script, Workload, simulate
from tests.simulate.replay import Replay

COSTS = {"a": ModelCosts(0.7, 2.3), "b": ModelCosts(1.1, 3.7), "c": ModelCosts(0.4, 1.9)}

POLICIES: dict[str, Callable[[], SwitchPolicy]] = {
    "fifo": FifoPolicy,
    "fifo with a deadline": lambda: FifoPolicy(min_active_duration=1.3, drain_timeout=2.1),
    "fifo without drain": lambda: FifoPolicy(min_active_duration=0, drain=False),
    "gated_quantum": GatedQuantumPolicy,
    "pressure": lambda: PressurePolicy(max_wait=17),
    "throughput": lambda: ThroughputPolicy(max_wait=17),
    "impatient": lambda: GatedQuantumPolicy(request_timeout=6.3),
}


def mixture(seed: int) -> Workload:
    """An open load and, beside it, closed loops and rounds of several."""
    rng = random.Random(seed)

    def one(latest: float) -> Arrival:
        return Arrival(rng.uniform(0, latest), rng.choices("abc", [6, 3, 2])[0], rng.expovariate(1 / 2.5))

    loops = [Script([[one(0.5)] for _ in range(10)], start=rng.uniform(0, 9), pause=rng.uniform(0.1, 3)) for _ in range(3)]
    rounds = Script([[one(2), one(2)] for _ in range(5)], pause=1.37)
    return Workload("mixture", [Script([[one(120) for _ in range(60)]]), *loops, rounds])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POLICIES)
def test_the_simulator_does_what_the_switcher_does(name: str, seed: int) -> None:
    policy = POLICIES[name]()
    load = mixture(seed)
    active, seeds = (None, COSTS) if seed % 2 else ("b", None)
    real = Replay(load, policy, COSTS, active=active, seeds=seeds)
    simulated = simulate(load, policy, COSTS, active=active, seeds=seeds)
    assert len(real.requests) == load.size
    for theirs, ours in zip(real.requests, sorted(simulated.requests, key=lambda r: r.arrival), strict=True):
        assert (ours.model, ours.outcome) == (theirs.model, theirs.outcome)
        assert ours.arrival == pytest.approx(theirs.arrival)
        assert ours.wait == pytest.approx(theirs.wait, abs=1e-6)
        assert ours.finish == pytest.approx(theirs.finish)
    outcomes = {request.outcome for request in simulated.requests}
    assert (Outcome.CUT in outcomes) == (name in ("fifo with a deadline", "fifo without drain"))
    assert (Outcome.LOST in outcomes) == (name == "impatient")
    wakes = [event.removeprefix("awake ") for event in real.gpu.events if event.startswith("awake ")]
    assert [switch.target for switch in simulated.switches if switch.completed] == wakes
    assert len(wakes) > 5
