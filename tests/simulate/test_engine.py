"""The engine against schedules that were worked out by hand."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import anyio
import pytest

from llmux_asgi import (
    Defer,
    FifoPolicy,
    GatedQuantumPolicy,
    ModelCosts,
    PolicyContext,
    PolicyDecision,
    PressurePolicy,
    Stay,
    SwitchContext,
    SwitchNow,
    SwitchPolicy,
    ThroughputPolicy,
)
from llmux_asgi.simulate import Arrival, Outcome, Result, Script, SimulationError, Workload, simulate

# A switch to a takes 1 + 4 s from b or c, one to b or c 1 + 2 s.
COSTS = {"a": ModelCosts(1.0, 4.0), "b": ModelCosts(1.0, 2.0), "c": ModelCosts(1.0, 2.0)}


def once(*arrivals: tuple[float, str, float]) -> Workload:
    """Requests that come by the clock: time, model, service."""
    return Workload("once", [Script([[Arrival(*each) for each in arrivals]])])


def about(value: float) -> Any:
    """Equal to `value`, but for rounding."""
    return pytest.approx(value)


def waits(result: Result) -> Any:
    return [about(request.wait) for request in result.requests]


def turns(result: Result) -> Any:
    """Who served from when on."""
    return [(switch.target, about(switch.ended)) for switch in result.switches if switch.completed]


def test_fifo_switches_at_once_and_drains() -> None:
    load = once((0.0, "a", 3.0), (1.0, "b", 1.0), (6.5, "a", 0.5))
    result = simulate(load, FifoPolicy(min_active_duration=0), COSTS)
    # a wakes until 4. At 4 b is wanted: a drains until 7, sleeps until 8, b wakes until 10. The gate is closed for the a of
    # 6.5: b drains until 11, sleeps until 12, a is awake at 16.
    assert turns(result) == [("a", 4.0), ("b", 10.0), ("a", 16.0)]
    assert waits(result) == [4.0, 9.0, 9.5]
    assert [request.finish for request in result.requests] == [about(t) for t in (7.0, 11.0, 16.5)]
    figures = result.figures()
    assert figures.mean_wait == about(22.5 / 3)
    assert figures.longest_wait == about(9.5)
    assert figures.p50_wait == about(9.0)
    assert figures.serving_share == about(4.5 / 16.5)
    assert (figures.switches, figures.lost, figures.cut) == (3, 0, 0)


def test_the_outgoing_model_goes_on_admitting_during_the_cooldown() -> None:
    load = once((0.0, "a", 0.5), (4.5, "b", 0.0), (6.0, "a", 1.0))
    result = simulate(load, FifoPolicy(min_active_duration=3.0), COSTS, active="b")
    # b was found awake: it owes no cooldown. a serves from 5 (1 + 4) on, until 8 at least; the a of 6 is admitted.
    assert turns(result) == [("a", 5.0), ("b", 11.0)]
    assert waits(result) == [5.0, 6.5, 0.0]


def test_a_request_for_the_active_model_does_not_wait() -> None:
    result = simulate(once((3.0, "a", 1.0)), FifoPolicy(), COSTS, active="a")
    assert waits(result) == [0.0]
    assert result.switches == ()
    assert result.figures().makespan == about(1.0)


def test_gated_quantum_stays_for_its_turn_and_admits_nobody_after_it() -> None:
    # a is in constant use; its turn for b's sake is 4 * (1 + 2) = 12 s.
    load = once(*[(float(t), "a", 1.5) for t in range(40)], (5.0, "b", 0.0))
    result = simulate(load, GatedQuantumPolicy(), COSTS, seeds=COSTS)
    # a from 4 to 16, then it drains: the request of 16 comes at that moment and is admitted, and runs until 17.5.
    assert turns(result)[:2] == [("a", 4.0), ("b", 20.5)]
    assert next(request.wait for request in result.requests if request.model == "b") == about(15.5)
    # b has served nobody for 0.5 s at 21, and a is awake again 1 + 4 s later.
    assert turns(result)[2] == ("a", 26.0)


def test_gated_quantum_leaves_an_idle_model_after_the_linger() -> None:
    result = simulate(once((0.0, "a", 1.0), (4.5, "b", 0.0)), GatedQuantumPolicy(linger=0.25), COSTS, seeds=COSTS)
    assert turns(result) == [("a", 4.0), ("b", 5.25 + 3.0)]


def test_without_seeds_the_first_switches_teach_the_costs() -> None:
    load = once(*[(float(t), "a", 1.5) for t in range(30)], (5.0, "b", 0.0))
    result = simulate(load, GatedQuantumPolicy(), COSTS)
    # Known by then: that waking a took 4 s, which is taken for b's too; nothing is known of sleeping. A turn of 4 * 4 s, the
    # request of 20 is admitted, and runs until 21.5.
    assert turns(result)[:2] == [("a", 4.0), ("b", 24.5)]


def test_pressure_prefers_the_longer_queue_to_the_older_request() -> None:
    load = once((0.0, "a", 6.0), (4.0, "b", 0.0), *[(5.0, "c", 0.0)] * 5)
    assert [model for model, _ in turns(simulate(load, PressurePolicy(), COSTS, seeds=COSTS))] == ["a", "c", "b"]
    assert [model for model, _ in turns(simulate(load, GatedQuantumPolicy(), COSTS, seeds=COSTS))] == ["a", "b", "c"]


def test_throughput_stays_until_its_cap() -> None:
    load = once(*[(float(t), "a", 1.5) for t in range(40)], (5.0, "b", 0.0))
    result = simulate(load, ThroughputPolicy(max_wait=20), COSTS, seeds=COSTS)
    # At 25 b has waited for 20 s; the a of 25 runs until 26.5.
    assert turns(result)[:2] == [("a", 4.0), ("b", 29.5)]


def test_what_runs_at_the_drains_deadline_is_cut() -> None:
    load = once((0.0, "a", 60.0), (0.0, "a", 1.0), (2.0, "b", 1.0))
    result = simulate(load, FifoPolicy(min_active_duration=0, drain_timeout=2.5), COSTS)
    assert [(r.outcome, about(r.finish)) for r in result.requests] == [
        (Outcome.CUT, 6.5),
        (Outcome.ANSWERED, 5.0),
        (Outcome.ANSWERED, 10.5),
    ]
    assert result.figures().cut == 1


def test_without_drain_what_runs_is_cut_at_once() -> None:
    load = once((0.0, "a", 60.0), (5.0, "b", 1.0))
    result = simulate(load, FifoPolicy(min_active_duration=0, drain=False), COSTS)
    assert [(r.outcome, about(r.finish)) for r in result.requests] == [(Outcome.CUT, 5.0), (Outcome.ANSWERED, 9.0)]


def test_a_request_gives_up_and_the_switch_that_nobody_waits_for_is_abandoned() -> None:
    load = once((0.0, "a", 30.0), (5.0, "b", 1.0), (6.0, "a", 1.0))
    result = simulate(load, FifoPolicy(min_active_duration=0, request_timeout=10), COSTS)
    lost, gated = result.requests[1:]
    assert (lost.outcome, lost.wait, lost.finish) == (Outcome.LOST, about(10.0), about(15.0))
    # The gate was closed from 5 on, and opens when the switch is given up.
    assert gated.wait == about(9.0)
    assert [(switch.completed, switch.ended) for switch in result.switches] == [(True, 4.0), (False, 15.0)]
    assert result.figures().lost == 1


def test_a_wake_that_nobody_waits_for_is_not_begun() -> None:
    load = once((5.0, "b", 1.0))
    costs = {**COSTS, "a": ModelCosts(30.0, 4.0)}
    result = simulate(load, FifoPolicy(request_timeout=10), costs, active="a")
    assert [(switch.completed, switch.ended) for switch in result.switches] == [(False, 35.0)]


def test_a_models_own_time_limit_replaces_the_policys() -> None:
    result = simulate(once((0.0, "a", 1.0), (0.0, "b", 1.0)), FifoPolicy(), COSTS, request_timeouts={"b": 3.0})
    assert [request.outcome for request in result.requests] == [Outcome.ANSWERED, Outcome.LOST]


def test_a_closed_loop_sends_its_next_request_after_the_pause() -> None:
    loop = Script([[Arrival(0.0, "a", 1.0)], [], [Arrival(0.5, "a", 2.0)]], start=1.0, pause=3.0)
    result = simulate(Workload("loop", [loop]), FifoPolicy(), COSTS)
    # Awake at 5, answered at 6; the empty round begins at 9 and the next one at 12.
    assert [(r.arrival, r.finish) for r in result.requests] == [(1.0, about(6.0)), (12.5, about(14.5))]


def test_a_round_waits_for_its_last_request() -> None:
    rounds: Sequence[Sequence[Arrival]] = [[Arrival(0.0, "a", 5.0), Arrival(1.0, "a", 1.0)], [Arrival(0.0, "a", 1.0)]]
    result = simulate(Workload("rounds", [Script(rounds)]), FifoPolicy(), COSTS, active="a")
    assert [request.arrival for request in result.requests] == [0.0, 1.0, 5.0]


class Custom(SwitchPolicy):
    """Answers what it is given."""

    request_timeout = None

    def __init__(self, answer: PolicyDecision) -> None:
        self.answer = answer

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        return self.answer


def test_a_policy_of_the_small_vocabulary_is_simulated() -> None:
    result = simulate(once((0.0, "a", 3.0), (4.5, "b", 1.0)), Custom(SwitchNow()), COSTS)
    assert turns(result) == [("a", 4.0), ("b", 4.0 + 5.0 + 3.0)]  # its min_active_duration is 5


@pytest.mark.parametrize("awaitable", [anyio.sleep(1), object()], ids=["coroutine", "anything"])
def test_a_policy_that_defers_is_refused(awaitable: object) -> None:
    with pytest.raises(SimulationError, match="Custom answers Defer, which cannot be simulated"):
        simulate(once((0.0, "a", 1.0)), Custom(Defer(awaitable)), COSTS)  # type: ignore[arg-type]


def test_a_policy_that_lets_somebody_wait_for_ever_is_refused() -> None:
    with pytest.raises(SimulationError, match="wait for ever"):
        simulate(once((0.0, "a", 1.0)), Custom(Stay()), COSTS)


def test_a_policy_that_breaks_its_contract_is_refused() -> None:
    with pytest.raises(SimulationError, match="on_pending_request returned NoneType"):
        simulate(once((0.0, "a", 1.0)), Custom(None), COSTS)  # type: ignore[arg-type]


class Sleepy(FifoPolicy):
    """Waits for time in `prepare_switch`."""

    async def prepare_switch(self, context: SwitchContext) -> None:
        await anyio.sleep(1)


class Yielding(FifoPolicy):
    """Waits for something that is nobody's."""

    async def prepare_switch(self, context: SwitchContext) -> None:
        await Never()


class Never:
    def __await__(self) -> Generator[None, None, None]:
        yield


@pytest.mark.parametrize(("policy", "match"), [(Sleepy(), "may wait for nothing but"), (Yielding(), "waits for something")])
def test_a_policy_that_waits_for_something_else_before_the_sleep_is_refused(policy: SwitchPolicy, match: str) -> None:
    with pytest.raises(SimulationError, match=match):
        simulate(once((0.0, "a", 1.0)), policy, COSTS)


def test_models_without_costs_are_refused() -> None:
    with pytest.raises(SimulationError, match="'d' take is not known"):
        simulate(once((0.0, "d", 1.0)), FifoPolicy(), COSTS)
    with pytest.raises(SimulationError, match="'d' take is not known"):
        simulate(once((0.0, "a", 1.0)), FifoPolicy(), COSTS, active="d")
    with pytest.raises(SimulationError, match="'a' take is not known"):
        simulate(once((0.0, "a", 1.0)), FifoPolicy(), {"a": ModelCosts(1.0, None)})


def test_an_empty_load_has_figures_too() -> None:
    figures = simulate(Workload("nothing", []), FifoPolicy(), COSTS).figures()
    assert (figures.requests, figures.mean_wait, figures.p99_wait, figures.serving_share) == (0, 0.0, 0.0, 0.0)
