"""What head starts do to the decisions, by contexts made by hand; and the queue that they order. No event loop, no clock."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from llmux_asgi import (
    FifoPolicy,
    GatedQuantumPolicy,
    InvalidRequestError,
    PolicyContext,
    PolicyDecision,
    PressurePolicy,
    Stay,
    SwitchNow,
    SwitchPolicy,
    ThroughputPolicy,
)
from llmux_asgi._admission import Priorities
from llmux_asgi._queue import Ticket, TicketQueue
from llmux_asgi._state import SwitcherState

HIGH, LOW = 15.0, 0.0
TURNS = [GatedQuantumPolicy, PressurePolicy]
BUSY = math.inf


def context(head_start: float, served: dict[float, float], *, wait: float = 1.0, **more: Any) -> PolicyContext:
    """The model a is active and busy since 100, and it is 104; a switch costs 5 s, so its turn ends at 120.

    One request waits for b: it has waited for `wait` seconds, and for its `head_start`.
    """
    values: dict[str, Any] = {
        "now": 104.0,
        "active_since": 100.0,
        "oldest_waits": {"b": wait + head_start},
        "total_waits": {"b": wait + head_start},
        "head_starts": {"b": head_start},
        "served_until": served,
        "sleep_costs": {"a": 1.0},
        "wake_costs": {"b": 4.0},
        **more,
    }
    return PolicyContext("b", "a", 1, wait + head_start, 1, **values)


@pytest.mark.parametrize("policy", TURNS)
@pytest.mark.parametrize(
    ("head_start", "served", "answer"),
    [
        (LOW, {LOW: BUSY}, Stay(until=120.0)),
        (HIGH, {LOW: BUSY}, Stay(until=105.0)),
        (HIGH, {5.0: BUSY, LOW: BUSY}, Stay(until=110.0)),
        (HIGH, {HIGH: BUSY, LOW: BUSY}, Stay(until=120.0)),  # within one class no turn is shorter
        (LOW, {HIGH: BUSY}, Stay(until=120.0)),  # and none is longer
        (100.0, {LOW: BUSY}, SwitchNow()),
        (HIGH, {}, Stay(until=105.0)),
    ],
)
def test_a_turn_is_shorter_by_the_difference_between_the_classes(
    policy: type[SwitchPolicy], head_start: float, served: dict[float, float], answer: PolicyDecision
) -> None:
    assert policy().on_pending_request(context(head_start, served)) == answer


@pytest.mark.parametrize("policy", TURNS)
@pytest.mark.parametrize(
    ("until", "now", "answer"),
    [
        (104.0, 104.0, Stay(until=105.0)),  # by then its last request was over for longer than it lingers
        (105.25, 105.25, Stay(until=105.75)),
        (105.25, 105.5, Stay(until=105.75)),
        (105.25, 105.75, SwitchNow()),
        (119.75, 119.75, Stay(until=120.0)),
        (BUSY, 119.75, Stay(until=120.0)),
    ],
)
def test_a_class_is_there_until_nothing_of_it_was_served_for_a_short_while(
    policy: type[SwitchPolicy], until: float, now: float, answer: PolicyDecision
) -> None:
    assert policy().on_pending_request(context(HIGH, {HIGH: until, LOW: BUSY}, now=now)) == answer


def test_the_classes_go_one_after_the_other() -> None:
    """The answer is the first moment of a fine grid at which the rule holds."""
    times = (103.0, 104.0, 107.0, 109.5, BUSY)
    for untils in itertools.product(times, times, times):
        served = dict(zip((HIGH, 6.0, LOW), untils, strict=True))

        def holds(now: float, served: dict[float, float] = served) -> bool:
            there = max((h for h, until in served.items() if now < until + 0.5), default=0.0)
            return now >= 100.0 + max(0.0, 20.0 - max(0.0, HIGH - there))

        first = next(now for now in (104.0 + step / 4 for step in range(100)) if holds(now))
        answer = GatedQuantumPolicy().on_pending_request(context(HIGH, served))
        assert answer == (SwitchNow() if first == 104.0 else Stay(until=first)), served


def test_a_linger_of_zero_forgets_a_class_at_once() -> None:
    assert GatedQuantumPolicy(linger=0).on_pending_request(context(HIGH, {HIGH: 106.0}, now=106.0)) == SwitchNow()


@pytest.mark.parametrize(
    ("head_start", "served", "wait", "answer"),
    [
        (LOW, {LOW: BUSY}, 5.0, Stay(until=119.0)),
        (HIGH, {LOW: BUSY}, 5.0, SwitchNow()),
        (HIGH, {LOW: BUSY}, 3.0, Stay(until=106.0)),
        (HIGH, {HIGH: BUSY}, 5.0, Stay(until=119.0)),  # as if nobody had a head start
        (LOW, {HIGH: BUSY}, 5.0, Stay(until=134.0)),
        (LOW, {HIGH: 104.0}, 5.0, Stay(until=119.0)),  # its class is gone by then
        (HIGH, {HIGH: 104.0}, 5.0, Stay(until=104.5)),
    ],
)
def test_throughput_counts_head_starts_against_what_the_active_model_serves(
    head_start: float, served: dict[float, float], wait: float, answer: PolicyDecision
) -> None:
    assert ThroughputPolicy(max_wait=20).on_pending_request(context(head_start, served, wait=wait)) == answer


def test_pressure_counts_head_starts_for_its_cap() -> None:
    waits = {"b": 16.0, "c": 12.0}
    for max_wait, chosen in ((16.0, SwitchNow()), (17.0, Stay())):
        asked = context(HIGH, {}, oldest_waits=waits, total_waits={"b": 16.0, "c": 90.0}, now=130.0)
        assert PressurePolicy(max_wait=max_wait).on_pending_request(asked) == chosen


# What a refused client is told


@pytest.mark.parametrize(
    ("policy", "turn"),
    [
        (FifoPolicy(min_active_duration=3), 3.0),
        (GatedQuantumPolicy(), 20.0),
        (PressurePolicy(quantum=2, min_active_duration=7), 10.0),
        (GatedQuantumPolicy(min_active_duration=30), 30.0),
        (ThroughputPolicy(max_wait=12), 12.0),
    ],
)
def test_each_policy_says_how_long_its_turns_are(policy: SwitchPolicy, turn: float) -> None:
    assert policy.expected_turn(5.0) == turn


# The order


def test_a_head_start_counts_as_having_waited_and_ages_like_any_wait() -> None:
    state = SwitcherState("abc")
    state.enqueue(Ticket("a", 10.0, LOW))
    state.enqueue(Ticket("b", 24.9, HIGH))
    state.enqueue(Ticket("c", 25.1, HIGH))
    assert state.waiting_models() == ["b", "a", "c"]
    assert [state.head_start(model) for model in "abc"] == [LOW, HIGH, HIGH]


def test_a_queue_is_in_the_order_of_its_waits() -> None:
    queue = TicketQueue()
    tickets = [Ticket("a", since, head_start) for since, head_start in ((0.0, 0.0), (1.0, 9.0), (2.0, 0.0), (9.5, 9.0))]
    for ticket in tickets:
        queue.add(ticket)
    assert list(queue) == [tickets[1], tickets[0], tickets[3], tickets[2]]
    assert (queue.counts_since, queue.head_start, len(queue), queue.total_wait(10.0)) == (-8.0, 9.0, 4, 27.5 + 18.0)
    queue.remove(tickets[1])
    assert (queue.counts_since, queue.head_start) == (0.0, 9.0)
    queue.remove(tickets[3])
    assert (queue.head_start, queue.total_wait(10.0)) == (0.0, 18.0)
    assert queue.clear() == [tickets[0], tickets[2]]
    assert (len(queue), queue.head_start, queue.total_wait(10.0)) == (0, 0.0, 0.0)


# Which class a request has


def test_a_request_has_the_class_that_it_asks_for_else_its_models_else_none() -> None:
    priorities = Priorities({"interactive": 30.0, "batch": 5.0}, {"a": "batch"})
    assert priorities.choose("a", None) == "batch"
    assert priorities.choose("a", "interactive") == "interactive"
    assert priorities.choose("b", None) is None
    assert [priorities.head_start(name) for name in ("interactive", "batch", None)] == [30.0, 5.0, 0.0]


@pytest.mark.parametrize("asked", ["urgent", "", "Interactive"])
def test_a_class_that_does_not_exist_is_an_error_that_lists_those_that_do(asked: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"does not exist\. It must be one of interactive, batch\.$"):
        Priorities({"interactive": 30.0, "batch": 0.0}, {}).choose("a", asked)
    with pytest.raises(InvalidRequestError, match="no priorities are configured"):
        Priorities({}, {}).choose("a", asked)


def test_a_models_class_has_to_exist() -> None:
    with pytest.raises(ValueError, match="the model 'a' has the priority 'urgent', which is none of"):
        Priorities({"batch": 0.0}, {"a": "urgent"})


def test_what_a_model_has_served_is_forgotten_with_its_turn() -> None:
    state = SwitcherState("ab")
    state.inquire()
    state.adopt("a")
    state.try_admit("a", HIGH)
    state.try_admit("a", LOW)
    state.release("a", 7.0, HIGH)
    assert state.served_until() == {HIGH: 7.0, LOW: BUSY}
    state.release("a", 8.0, LOW)
    state.enqueue(Ticket("b", 9.0, HIGH))
    state.begin("b")
    state.drain()
    state.commit()
    state.wake()
    assert state.served_until() == {}
    state.ready()
    state.complete(10.0)
    assert state.served_until() == {HIGH: BUSY}
