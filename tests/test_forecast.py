"""When a model is expected to be active next. Pure: states made by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmux_asgi._forecast import next_turn_in
from llmux_asgi._state import Phase, SwitcherState, Ticket

SLEEP = {"a": 1.0, "b": 2.0, "c": 3.0}
WAKE = {"a": 10.0, "b": 20.0, "c": 30.0}


def four_times(cost: float) -> float:
    return 4 * cost


def expect(
    state: SwitcherState,
    model: str,
    *,
    now: float = 100.0,
    min_active: float = 0.0,
    known: bool = True,
    turn: Callable[[float], float] = four_times,
) -> float:
    return next_turn_in(state, model, now, (SLEEP, WAKE) if known else ({}, {}), min_active, turn)


def serving(model: str | None = "a", *, since: float = 100.0, waiting: str = "") -> SwitcherState:
    """Return a state with `model` active since `since`, and requests that came for the others, one after the other."""
    state = SwitcherState("abc")
    state.inquire()
    state.adopt(None)
    if model is not None:
        state.enqueue(Ticket(model, 0.0))
        state.begin(model)
        for step in (state.drain, state.commit, state.wake, state.ready):
            step()
        state.complete(since)
    for position, other in enumerate(waiting):
        state.enqueue(Ticket(other, 90.0 + position))
    return state


@pytest.mark.parametrize(
    ("state", "model", "seconds"),
    [
        (serving("a"), "b", 4 * 21 + 21),
        (serving("a", since=60.0), "b", 4 * 21 - 40 + 21),
        (serving("a", since=0.0), "b", 21),  # its turn is over
        (serving("a", waiting="b"), "b", 4 * 21 + 21),
        (serving("a", waiting="b"), "c", 4 * 21 + 21 + 4 * 32 + 32),
        (serving("a", waiting="cb"), "c", 4 * 31 + 31),
        (serving("a", waiting="cb"), "b", 4 * 31 + 31 + 4 * 23 + 23),
        (serving(None), "b", 20),
        (serving(None, waiting="cb"), "b", 30 + 4 * 23 + 23),
        (serving("a"), "a", 0),
    ],
)
def test_it_is_the_rest_of_the_turn_then_a_switch_and_a_turn_for_each_that_comes_before(
    state: SwitcherState, model: str, seconds: float
) -> None:
    assert expect(state, model) == seconds


@pytest.mark.parametrize(
    ("phase", "model", "seconds"),
    [
        (Phase.COOLDOWN, "b", 5 + 21),
        (Phase.DRAIN, "b", 21),
        (Phase.SLEEP, "b", 21),
        (Phase.WAKE, "b", 20),
        (Phase.READY, "b", 20),
        (Phase.DRAIN, "a", 21 + 4 * 12 + 12),  # its gate is closed
        (Phase.DRAIN, "c", 21 + 4 * 32 + 32),
    ],
)
def test_a_switch_that_is_under_way_comes_first(phase: Phase, model: str, seconds: float) -> None:
    state = serving("a", waiting="b")
    state.begin("b")
    steps: list[Callable[[], object]] = [state.drain, state.commit, state.wake, state.ready]
    for step in steps[: list(Phase).index(phase)]:
        step()
    assert expect(state, model, min_active=5.0) == seconds


def test_a_head_start_comes_before() -> None:
    state = serving("a", waiting="b")
    state.enqueue(Ticket("c", 92.0, head_start=30.0))
    assert expect(state, "b") == 4 * 31 + 31 + 4 * 23 + 23


def test_the_least_time_of_a_turn_counts() -> None:
    state = serving("a", waiting="b")
    assert expect(state, "c", min_active=500.0) == 500 + 21 + 500 + 32
    assert expect(state, "c", min_active=5.0, turn=lambda cost: 0.0) == 5 + 21 + 5 + 32


def test_while_nothing_was_measured_a_switch_is_taken_to_last_some_seconds() -> None:
    assert expect(serving(None), "b", known=False) == 5.0
    assert expect(serving("a"), "b", known=False) == 4 * 6 + 6


def test_who_waits_until_its_awake_model_was_asked_is_expected_to_be_served_at_once() -> None:
    state = serving("a")
    state.distrust()
    state.enqueue(Ticket("a", 95.0))
    assert expect(state, "a") == 0.0
    assert expect(state, "b") == 4 * 21 + 21
