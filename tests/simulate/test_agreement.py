"""The simulator and the real switcher, given the same load, do the same at the same times."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, ModelCosts, PressurePolicy, SwitchPolicy, ThroughputPolicy
from llmux_asgi.simulate import Arrival, Outcome, Result, Script, Workload, simulate
from tests.simulate.replay import Replay

COSTS = {"a": ModelCosts(0.7, 2.3), "b": ModelCosts(1.1, 3.7), "c": ModelCosts(0.4, 1.9)}

POLICIES: dict[str, Callable[[], SwitchPolicy]] = {
    "fifo": FifoPolicy,
    "fifo with a deadline": lambda: FifoPolicy(min_active_duration=1.3, drain_timeout=2.1),
    "fifo without drain": lambda: FifoPolicy(min_active_duration=0, drain=False),
    "gated_quantum": GatedQuantumPolicy,
    "pressure": lambda: PressurePolicy(max_wait=17),
    "throughput": lambda: ThroughputPolicy(max_wait=17),
    "preempting": lambda: GatedQuantumPolicy(quantum=1, drain="preempt"),
    "preempting fifo": lambda: FifoPolicy(min_active_duration=1.3, drain="preempt", drain_timeout=0.4, max_freezes=2),
    "preempting pressure": lambda: PressurePolicy(quantum=0.5, max_wait=17, drain="preempt", max_frozen=5.3),
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


CLASSES = {"high": 9.0, "low": 0.0, "middle": 4.0}


def classified(load: Workload, seed: int) -> Workload:
    """Give the requests of a load classes, or none."""
    rng = random.Random(seed)

    def one(arrival: Arrival) -> Arrival:
        return replace(arrival, priority=rng.choice(["high", "low", None]))

    return Workload(load.name, [replace(s, rounds=[[one(a) for a in part] for part in s.rounds]) for s in load.scripts])


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POLICIES)
def test_the_simulator_does_what_the_switcher_does(name: str, seed: int) -> None:
    active, seeds = (None, COSTS) if seed % 2 else ("b", None)
    simulated = agree(mixture(seed), POLICIES[name](), active=active, seeds=seeds, recompute=0.25)
    outcomes = {request.outcome for request in simulated.requests}
    assert (Outcome.CUT in outcomes) == (name in ("fifo with a deadline", "fifo without drain"))
    assert (Outcome.EXPIRED in outcomes) == (name == "preempting pressure")
    assert (Outcome.LOST in outcomes) == (name == "impatient")
    most = max(request.freezes for request in simulated.requests)
    assert most == 2 if name == "preempting fifo" else (most > 0) == name.startswith("preempting")


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["fifo", "gated_quantum", "pressure", "throughput", "preempting", "preempting pressure"])
def test_with_priorities_and_queue_limits_too(name: str, seed: int) -> None:
    load = classified(mixture(seed), seed)
    simulated = agree(
        load,
        POLICIES[name](),
        active="b",
        seeds=COSTS,
        priorities=CLASSES,
        default_priorities={"c": "middle"},
        max_waiting=9,
        queue_limits={"b": 4},
    )
    assert any(request.outcome is Outcome.REFUSED for request in simulated.requests)
    assert {request.priority for request in simulated.requests} == {"high", "low", "middle", None}
    plain = simulate(load, POLICIES[name](), COSTS, active="b", seeds=COSTS, priorities=dict.fromkeys(CLASSES, 0.0))
    assert [request.wait for request in plain.requests] != [request.wait for request in simulated.requests]


def agree(load: Workload, policy: SwitchPolicy, **settings: Any) -> Result:
    """Compare what both make of it, and return what the simulator does."""
    real = Replay(load, policy, COSTS, **settings)
    simulated = simulate(load, policy, COSTS, **settings)
    assert len(real.requests) == load.size
    for theirs, ours in zip(real.requests, sorted(simulated.requests, key=lambda r: r.arrival), strict=True):
        assert (ours.model, ours.outcome, ours.priority) == (theirs.model, theirs.outcome, theirs.priority)
        assert ours.arrival == pytest.approx(theirs.arrival)
        assert ours.wait == pytest.approx(theirs.wait, abs=1e-6)
        assert ours.finish == pytest.approx(theirs.finish)
        assert ours.freezes == theirs.freezes
        assert ours.frozen == pytest.approx(theirs.frozen, abs=1e-6)
    wakes = [event.removeprefix("awake ") for event in real.gpu.events if event.startswith("awake ")]
    assert [switch.target for switch in simulated.switches if switch.completed] == wakes
    assert len(wakes) > 5
    return simulated
