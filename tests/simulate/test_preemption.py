"""Preemption, priorities and queue limits in virtual time, against schedules that were worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, SwitchContext
from llmux_asgi.simulate import Arrival, Outcome, Script, SimulationError, Workload, simulate
from tests.simulate.test_engine import COSTS, about, once, turns, waits

# A switch to a takes 1 + 4 s from b or c, one to b or c 1 + 2 s.


def endless(start: float) -> Script:
    """A client of a that always has a request of 20 s running."""
    return Script([[Arrival(0.0, "a", 20.0)]] * 4, start=start)


@pytest.mark.parametrize("recompute", [0.0, 0.5])
def test_a_busy_model_is_left_without_its_drain_and_goes_on_where_it_was(recompute: float) -> None:
    load = Workload("overlapping", [endless(0.0), endless(10.0), Script([[Arrival(5.0, "b", 1.0)]])])
    result = simulate(load, GatedQuantumPolicy(drain="preempt"), COSTS, seeds=COSTS, recompute=recompute)
    # a is awake at 4; its turn for b's sake is 4 * (1 + 2) s. At 16 its requests have 8 s and 14 s left. It is asleep at 17,
    # b is awake at 19, answers at 20, is left at 20.5 and asleep at 21.5.
    assert turns(result) == [("a", 4.0), ("b", 19.0), ("a", 25.5)]
    first, b, second = result.requests[:3]
    assert b.wait == about(14.0)  # not more than 4 switches and one
    assert (first.wait, second.wait) == (about(4.0), 0.0)
    assert (first.finish, second.finish) == (about(33.5 + recompute), about(39.5 + recompute))
    assert [(each.freezes, each.frozen) for each in (first, b, second)] == [(1, about(8.5)), (0, 0.0), (1, about(8.5))]
    figures = result.figures()
    assert (figures.freezes, figures.cut) == (2, 0)
    assert (figures.mean_frozen, figures.longest_frozen) == (about(17.0 / 9), about(8.5))
    # From the moment of the sleep on nothing goes on: served were 12 s of a, 1 s of b, and then a to the end.
    assert result.serving == about(12.0 + 1.0 + result.end - 25.5)
    waiting = simulate(load, GatedQuantumPolicy(), COSTS, seeds=COSTS)
    assert next(each.wait for each in waiting.requests if each.model == "b") == about(28.0)  # it drains until 30


FROZEN_TWICE = once((0.0, "a", 10.0), (3.0, "b", 1.0), (13.0, "b", 1.0))


def test_what_was_recomputed_is_lost_with_the_next_freeze_and_service_is_not() -> None:
    # The limit of the first freeze passes at 14.5: then the request stands still, but is not frozen any more.
    policy = FifoPolicy(min_active_duration=1.5, drain="preempt", max_frozen=10.5)
    result = simulate(FROZEN_TWICE, policy, COSTS, active="a", recompute=2.0)
    # Stopped at 3 with 7 s left. b is awake at 6, left at 7.5 for those who are frozen. a is awake at 12.5 and recomputes until
    # 14.5, but is stopped at 14. b again at 17, a again at 23.5: 2 s and 7 s.
    assert turns(result) == [("b", 6.0), ("a", 12.5), ("b", 17.0), ("a", 23.5)]
    frozen = result.requests[0]
    assert (frozen.outcome, frozen.finish) == (Outcome.ANSWERED, about(32.5))
    assert (frozen.freezes, frozen.frozen) == (2, about(8.5 + 8.5))


def test_one_that_was_frozen_often_enough_finishes_first() -> None:
    policy = FifoPolicy(min_active_duration=1.5, drain="preempt", max_freezes=1)
    result = simulate(FROZEN_TWICE, policy, COSTS, active="a")
    assert turns(result) == [("b", 6.0), ("a", 12.5), ("b", 19.5 + 3.0)]
    assert (result.requests[0].freezes, result.requests[0].finish) == (1, about(19.5))


def test_the_switch_goes_on_when_the_last_one_that_must_finish_has_and_freezes_the_others() -> None:
    # The old one must finish, at 19.5. One that came in its second turn ends at the same time, the other is frozen then.
    load = once((0.0, "a", 10.0), (3.0, "b", 1.0), (12.5, "a", 30.0), (13.0, "b", 1.0), (13.5, "a", 6.0))
    policy = FifoPolicy(min_active_duration=1.5, drain="preempt", max_freezes=1)
    result = simulate(load, policy, COSTS, active="a")
    assert [request.freezes for request in result.requests] == [1, 0, 1, 0, 0]
    assert turns(result)[2] == ("b", 22.5)


def test_one_that_is_frozen_for_too_long_ends_and_the_switch_for_its_sake_is_given_up() -> None:
    policy = FifoPolicy(min_active_duration=5, drain="preempt", max_frozen=3)
    result = simulate(once((0.0, "a", 10.0), (3.0, "b", 10.0)), policy, COSTS, active="a")
    expired, other = result.requests
    assert (expired.outcome, expired.finish, expired.wait, expired.frozen) == (Outcome.EXPIRED, about(7.0), 0.0, about(3.0))
    assert other.finish == about(16.0)  # not frozen: nobody waits for a any more
    assert [(s.target, s.completed, s.ended) for s in result.switches] == [("b", True, about(6.0)), ("a", False, about(7.0))]
    assert result.figures().cut == 1


def test_a_drain_before_the_freeze_lets_the_short_ones_finish() -> None:
    load = once((0.0, "a", 4.5), (0.0, "a", 9.0), (3.0, "b", 1.0))
    policy = FifoPolicy(min_active_duration=2, drain="preempt", drain_timeout=2)
    result = simulate(load, policy, COSTS, active="a")
    assert [(request.freezes, request.finish) for request in result.requests] == [
        (0, about(4.5)),
        (1, about(8.0 + 2.0 + 5.0 + 4.0)),  # stopped at 5 with 4 s left; b is awake at 8 and left at 10
        (0, about(9.0)),
    ]


class FreezesOnly(FifoPolicy):
    """Asks for nothing but the freeze, with the method's own limits."""

    async def prepare_switch(self, context: SwitchContext) -> None:
        await context.preempt()


def test_a_policy_of_ones_own_may_freeze() -> None:
    result = simulate(FROZEN_TWICE, FreezesOnly(min_active_duration=1.5), COSTS, active="a")
    assert result.requests[0].freezes == 2


def test_a_head_start_comes_before_a_longer_wait() -> None:
    load = Workload("two", [Script([[Arrival(0, "a", 5), Arrival(1, "b", 0), Arrival(2, "c", 0, "high")]])])
    policy = FifoPolicy(min_active_duration=0)
    result = simulate(load, policy, COSTS, priorities={"high": 3.0})
    assert turns(result) == [("a", 4.0), ("c", 12.0), ("b", 15.0)]  # a drains until 9
    assert waits(result) == [4.0, 14.0, 10.0]
    assert [request.priority for request in result.requests] == [None, None, "high"]
    none, high = result.figures().classes
    assert (none.priority, none.requests, none.mean_wait, none.longest_wait) == (None, 2, about(9.0), about(14.0))
    assert (high.priority, high.requests, high.p50_wait, high.p99_wait) == ("high", 1, about(10.0), about(10.0))
    # And with no difference between them, nor where a model has its class by configuration:
    equal = simulate(load, policy, COSTS, priorities={"high": 3.0}, default_priorities={"b": "high"})
    assert turns(equal) == [("a", 4.0), ("b", 12.0), ("c", 15.0)]
    assert [request.priority for request in equal.requests] == [None, "high", "high"]


def test_without_classes_there_are_no_figures_of_them() -> None:
    assert simulate(once((0.0, "a", 1.0)), FifoPolicy(), COSTS, priorities={"high": 3.0}).figures().classes == []


def test_a_class_that_does_not_exist_is_refused() -> None:
    load = Workload("one", [Script([[Arrival(0, "a", 5, "urgent")]])])
    with pytest.raises(SimulationError, match="the priority 'urgent' is not configured"):
        simulate(load, FifoPolicy(), COSTS, priorities={"high": 3.0})


@pytest.mark.parametrize("limits", [{"max_waiting": 2}, {"queue_limits": {"b": 1}}])
def test_who_meets_a_full_queue_is_refused_at_once_and_comes_again(limits: dict[str, Any]) -> None:
    loop = Script([[Arrival(0.0, "b", 1.0)]] * 2, start=2.0, pause=10.0)
    load = Workload("full", [Script([[Arrival(0.0, "a", 1.0), Arrival(1.0, "b", 1.0)]]), loop])
    result = simulate(load, FifoPolicy(min_active_duration=0), COSTS, **limits)
    first, second, refused, again = result.requests
    assert (refused.outcome, refused.arrival, refused.wait, refused.finish) == (Outcome.REFUSED, 2.0, 0.0, 2.0)
    assert (again.arrival, again.outcome) == (12.0, Outcome.ANSWERED)
    figures = result.figures()
    assert (figures.requests, figures.refused) == (4, 1)
    assert figures.mean_wait == about((first.wait + second.wait + again.wait) / 3)  # to refuse somebody is no short wait
