"""Whatever the load and the policy: everybody is accounted for, one model is awake, and nobody waits beyond the bound."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, ModelCosts, PressurePolicy, SwitchPolicy, ThroughputPolicy
from llmux_asgi.simulate import Arrival, Outcome, Result, Script, Workload, simulate

COSTS = {"a": ModelCosts(1.0, 2.0), "b": ModelCosts(0.5, 3.0), "c": ModelCosts(1.5, 0.5)}
C = 1.5 + 3.0
QUANTUM, MAX_WAIT, LONGEST = 4.0, 12.0, 6.0

# Each with the formula of its docstring, of N models, the longest drain D and min_active_duration m.
POLICIES: dict[str, tuple[Callable[..., SwitchPolicy], Callable[[int, float, float], float]]] = {
    "fifo": (FifoPolicy, lambda n, d, m: n * (m + d + C)),
    "gated_quantum": (
        lambda **own: GatedQuantumPolicy(quantum=QUANTUM, **own),
        lambda n, d, m: d + (n - 1) * (C + max(QUANTUM * C, m) + d) + C,
    ),
    "pressure": (
        lambda **own: PressurePolicy(quantum=QUANTUM, max_wait=MAX_WAIT, **own),
        lambda n, d, m: MAX_WAIT + n * (max(QUANTUM * C, m) + d + C),
    ),
    "throughput": (
        lambda **own: ThroughputPolicy(max_wait=MAX_WAIT, **own),
        lambda n, d, m: MAX_WAIT + n * (m + d + C),
    ),
}

names = st.sampled_from(sorted(POLICIES))
times = st.floats(0, 60).map(lambda value: round(value, 2))
requests = st.builds(Arrival, times, st.sampled_from("abc"), st.floats(0, LONGEST).map(lambda value: round(value, 2)))
loops = st.builds(
    Script,
    st.lists(st.lists(requests, max_size=2), max_size=8),
    start=times,
    pause=st.floats(0, 5).map(lambda value: round(value, 2)),
)
loads = st.builds(
    lambda arrivals, scripts: Workload("load", [Script([arrivals]), *scripts]),
    st.lists(requests, max_size=40),
    st.lists(loops, max_size=3),
)


def check(result: Result, load: Workload, active: str | None) -> None:
    """What holds for every result."""
    assert len(result.requests) == load.size
    turns: dict[str, list[tuple[float, float]]] = {model: [] for model in "abc"}
    serving, since, before = active, 0.0, 0.0
    for switch in result.switches:
        assert switch.origin == serving
        assert before <= switch.begun <= (switch.ended if switch.committed is None else switch.committed) <= switch.ended
        before = switch.ended
        if switch.committed is not None:
            if serving is not None:
                turns[serving].append((since, switch.committed))
            serving, since = (switch.target, switch.ended) if switch.completed else (None, switch.ended)
    if serving is not None:
        turns[serving].append((since, result.end))
    every = sorted(turn for each in turns.values() for turn in each)
    assert all(first[1] <= second[0] for first, second in pairwise(every))
    for request in result.requests:
        assert 0 <= request.wait <= request.finish - request.arrival + 1e-9
        if request.outcome not in (Outcome.LOST, Outcome.REFUSED):
            begun = request.arrival + request.wait
            within = [a - 1e-9 <= begun <= b + 1e-9 for a, b in turns[request.model]]
            assert any(within), request
            if not request.freezes:  # it is served within one turn of its model, from its admission to its end
                assert any(request.finish <= b + 1e-9 for (_, b), its in zip(turns[request.model], within, strict=True) if its)
            elif request.outcome is Outcome.ANSWERED:
                assert any(a - 1e-9 <= request.finish <= b + 1e-9 for a, b in turns[request.model]), request
    assert 0 <= result.figures().serving_share <= 1 + 1e-9


@given(load=loads, name=names, active=st.sampled_from([None, "a"]), stay=st.sampled_from([0.0, 3.0]))
@example(load=Workload("load", []), name="fifo", active=None, stay=0.0)
@settings(max_examples=150)
def test_nobody_waits_for_longer_than_the_policys_docstring_says(
    load: Workload, name: str, active: str | None, stay: float
) -> None:
    make, bound = POLICIES[name]
    result = simulate(load, make(request_timeout=None, min_active_duration=stay), COSTS, active=active, seeds=COSTS)
    check(result, load, active)
    assert all(request.outcome is Outcome.ANSWERED for request in result.requests)
    drain = max((request.finish - request.arrival - request.wait for request in result.requests), default=0.0)
    assert result.figures().longest_wait <= bound(3, drain, stay) + 1e-6


@given(
    load=loads,
    name=names,
    stay=st.sampled_from([0.0, 3.0]),
    drain_timeout=st.sampled_from([None, 1.0]),
    max_freezes=st.sampled_from([1, 16]),
    recompute=st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=150)
def test_with_preemption_each_gets_its_service_whole_and_no_drain_is_waited_for(
    load: Workload, name: str, stay: float, drain_timeout: float | None, max_freezes: int, recompute: float
) -> None:
    make, bound = POLICIES[name]
    policy = make(
        request_timeout=None, min_active_duration=stay, drain="preempt", drain_timeout=drain_timeout, max_freezes=max_freezes
    )
    result = simulate(load, policy, COSTS, seeds=COSTS, recompute=recompute)
    check(result, load, None)
    assert all(request.outcome is Outcome.ANSWERED for request in result.requests)
    for model, each in COSTS.items():
        ours = [request for request in result.requests if request.model == model]
        stood = [request.frozen + request.freezes * (each.sleep or 0.0) for request in ours]
        served = [r.finish - r.arrival - r.wait - time for r, time in zip(ours, stood, strict=True)]
        wanted = [
            arrival.service for script in load.scripts for part in script.rounds for arrival in part if arrival.model == model
        ]
        if not recompute:
            assert all(abs(a - b) < 1e-6 for a, b in zip(sorted(served), sorted(wanted), strict=True))
        repeated = sum(served) - sum(wanted)
        assert sum(recompute for r in ours if r.freezes) - 1e-6 <= repeated <= sum(recompute * r.freezes for r in ours) + 1e-6
    often = any(request.freezes == max_freezes for request in result.requests)
    drain = LONGEST + recompute if often else drain_timeout or 0.0
    assert result.figures().longest_wait <= bound(3, drain, stay) + 1e-6


@given(
    load=loads,
    name=names,
    drain=st.sampled_from(["wait", "preempt", "abort"]),
    deadline=st.sampled_from([None, 0.0, 1.0]),
    limit=st.sampled_from([2.0, 9.0]),
    room=st.sampled_from([None, 3]),
)
@settings(max_examples=150)
def test_with_limits_each_is_answered_lost_cut_or_refused(
    load: Workload, name: str, drain: str, deadline: float | None, limit: float, room: int | None
) -> None:
    make = POLICIES[name][0]
    policy = make(request_timeout=limit, drain=drain, drain_timeout=deadline, max_frozen=limit)
    result = simulate(load, policy, COSTS, seeds=COSTS, max_waiting=room)
    check(result, load, None)
    outcomes = {request.outcome for request in result.requests}
    assert result.figures().longest_wait <= limit + 1e-9
    for request in result.requests:
        assert request.outcome is not Outcome.LOST or request.wait >= limit - 1e-9
        assert request.outcome is not Outcome.REFUSED or request.finish == request.arrival
        assert request.outcome is not Outcome.EXPIRED or request.frozen >= limit - 1e-9
    assert drain == "abort" or (drain == "wait" and deadline is not None) or Outcome.CUT not in outcomes
    assert drain == "preempt" or not any(request.freezes for request in result.requests)
    assert room is not None or Outcome.REFUSED not in outcomes
