"""The state machine, transition by transition. No event loop; time is passed in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llmux_asgi._state import Mode, Phase, SwitcherState, Ticket, TicketStatus


def active(model: str = "a") -> SwitcherState:
    state = SwitcherState(("a", "b", "c"))
    state.adopt(model)
    return state


def queued(state: SwitcherState, model: str, since: float = 0.0) -> Ticket:
    ticket = Ticket(model, since)
    state.enqueue(ticket)
    return ticket


def switching(phase: Phase) -> SwitcherState:
    """Return a state on its way from a to b, in `phase`, with one request waiting for b."""
    state = active()
    queued(state, "b")
    state.begin("b")
    steps: list[Callable[[], object]] = [state.drain, state.commit, state.wake, state.ready]
    for step in steps[: list(Phase).index(phase)]:
        step()
    assert state.phase is phase
    return state


def test_nothing_is_admitted_before_the_servers_were_asked() -> None:
    state = SwitcherState(("a",))
    assert state.mode is Mode.UNKNOWN
    assert not state.try_admit("a")


def test_adopting_a_model_grants_those_who_wait_for_it_in_the_same_step() -> None:
    state = SwitcherState(("a", "b"))
    mine, other = queued(state, "a"), queued(state, "b")
    assert state.adopt("a") == [mine]
    assert (mine.status, other.status) == (TicketStatus.GRANTED, TicketStatus.WAITING)
    assert (state.in_flight("a"), state.depth("a"), state.depth("b")) == (1, 0, 1)


def test_a_model_found_awake_owes_no_cooldown_and_one_confirmed_awake_keeps_its_own() -> None:
    state = active()
    assert state.active_since == float("-inf")
    queued(state, "b")
    state.begin("b")
    state.drain()
    state.commit()
    state.wake()
    state.ready()
    state.complete(7.0)
    assert state.active_since == 7.0
    state.distrust()
    assert state.mode is Mode.UNKNOWN
    state.adopt("b")
    assert state.active_since == 7.0


@pytest.mark.parametrize(
    ("phase", "admits_outgoing"),
    [(Phase.COOLDOWN, True), (Phase.DRAIN, False), (Phase.SLEEP, False), (Phase.WAKE, False), (Phase.READY, False)],
)
def test_who_is_admitted_during_a_switch(phase: Phase, admits_outgoing: bool) -> None:
    state = switching(phase)
    assert state.try_admit("a") is admits_outgoing
    assert not state.try_admit("b")
    assert not state.try_admit("c")


def test_completion_activates_the_target_and_grants_its_whole_queue() -> None:
    state = switching(Phase.READY)
    late, other = queued(state, "b"), queued(state, "a")
    granted = state.complete(3.0)
    assert late in granted
    assert len(granted) == 2
    assert (state.mode, state.active, state.target, state.phase) == (Mode.ACTIVE, "b", None, None)
    assert state.in_flight("b") == 2
    assert other.status is TicketStatus.WAITING


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN])
def test_abandoning_before_the_point_of_no_return_lets_the_outgoing_model_go_on(phase: Phase) -> None:
    state = switching(phase)
    waiting = queued(state, "a") if phase is Phase.DRAIN else None
    assert state.abandon() == ([waiting] if waiting else [])
    assert (state.mode, state.active) == (Mode.ACTIVE, "a")
    assert state.snapshot().abandoned == 1


def test_abandoning_before_the_wake_leaves_nobody_awake() -> None:
    state = switching(Phase.WAKE)
    assert state.abandon() == []
    assert (state.mode, state.active) == (Mode.IDLE, None)


@pytest.mark.parametrize("phase", [Phase.SLEEP, Phase.READY])
def test_a_step_on_the_wire_cannot_be_abandoned(phase: Phase) -> None:
    with pytest.raises(RuntimeError, match="illegal transition"):
        switching(phase).abandon()


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN])
def test_failing_before_the_point_of_no_return_changes_nothing(phase: Phase) -> None:
    state = switching(phase)
    state.fail()
    assert (state.mode, state.active) == (Mode.ACTIVE, "a")


@pytest.mark.parametrize("phase", [Phase.SLEEP, Phase.WAKE, Phase.READY])
def test_failing_later_leaves_nothing_known(phase: Phase) -> None:
    state = switching(phase)
    assert state.fail() == []
    assert (state.mode, state.target, state.phase) == (Mode.UNKNOWN, None, None)
    assert not state.try_admit("a")
    assert state.snapshot().failures == 1


@pytest.mark.parametrize("phase", [Phase.WAKE, Phase.READY])
def test_a_wake_may_be_sent_again_however_far_the_one_before_has_come(phase: Phase) -> None:
    state = switching(phase)
    late = queued(state, "b")
    state.wake_up()
    assert (state.mode, state.phase, state.active, state.target) == (Mode.SWITCHING, Phase.WAKE, None, "b")
    state.ready()
    assert late in state.complete(1.0)


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN, Phase.SLEEP])
def test_no_wake_is_sent_before_everything_else_is_confirmed_out_of_memory(phase: Phase) -> None:
    with pytest.raises(RuntimeError, match="illegal transition"):
        switching(phase).wake_up()


def test_the_point_of_no_return_is_refused_when_nobody_waits_any_more() -> None:
    state = active()
    ticket = queued(state, "b")
    state.begin("b")
    state.drain()
    state.leave(ticket)
    assert not state.commit()
    assert state.phase is Phase.DRAIN


def test_the_model_that_has_waited_longest_comes_first() -> None:
    state = SwitcherState(("a", "b", "c"))
    queued(state, "c", 2.0)
    first = queued(state, "b", 1.0)
    queued(state, "b", 3.0)
    assert state.waiting_models() == ["b", "c"]
    state.leave(first)
    assert state.waiting_models() == ["c", "b"]


def test_release_tells_the_last_one() -> None:
    state = active()
    assert state.try_admit("a")
    assert state.try_admit("a")
    assert not state.release("a", 1.0)
    assert state.release("a", 1.0)
    with pytest.raises(RuntimeError):
        state.release("a", 1.0)


def test_it_is_known_for_how_long_the_active_model_has_served_nobody() -> None:
    state = active()
    assert state.idle_for(5.0) == float("inf")  # found awake
    state.try_admit("a")
    state.try_admit("a")
    state.release("a", 1.0)
    assert state.idle_for(5.0) == 0.0
    state.release("a", 2.0)
    assert state.idle_for(5.0) == 3.0
    state.try_admit("a")
    assert state.idle_for(5.0) == 0.0


def test_an_activation_begins_with_those_who_waited_and_is_idle_from_then_on_if_they_are_gone() -> None:
    state = switching(Phase.WAKE)
    assert (state.idle_for(7.0), state.queued_at_activation) == (0.0, 0)
    ticket = queued(state, "b")
    state.ready()
    assert len(state.complete(7.0)) == state.queued_at_activation == 2
    assert ticket.status is TicketStatus.GRANTED
    state.release("b", 8.0)
    state.release("b", 9.0)
    assert (state.idle_for(9.5), state.queued_at_activation) == (0.5, 2)
    state = switching(Phase.READY)
    state.refuse("b")
    state.complete(7.0)
    assert (state.idle_for(9.0), state.queued_at_activation) == (2.0, 0)


def test_the_sum_of_the_waits_follows_each_arrival_and_each_departure() -> None:
    state = active()
    assert state.total_wait("b", 9.0) == 0.0
    first = queued(state, "b", 1.0)
    queued(state, "b", 4.0)
    queued(state, "c", 0.0)
    assert state.total_wait("b", 9.0) == 8.0 + 5.0
    state.leave(first)
    assert state.total_wait("b", 9.0) == 5.0
    state.refuse("b")
    assert state.total_wait("b", 9.0) == 0.0
    assert state.total_wait("c", 9.0) == 9.0


def test_refused_and_left_requests_count_nowhere() -> None:
    state = active()
    gone, refused = queued(state, "b"), queued(state, "b")
    state.leave(gone)
    assert state.refuse("b") == [refused]
    assert (gone.status, refused.status, state.depth("b")) == (TicketStatus.LEFT, TicketStatus.REFUSED, 0)
    with pytest.raises(RuntimeError):
        state.leave(gone)


@pytest.mark.parametrize(
    "step",
    [
        lambda s: s.begin("a"),
        lambda s: s.begin("b"),
        lambda s: s.drain(),
        lambda s: s.commit(),
        lambda s: s.wake(),
        lambda s: s.wake_up(),
        lambda s: s.ready(),
        lambda s: s.complete(0.0),
        lambda s: s.abandon(),
        lambda s: s.fail(),
        lambda s: s.adopt("a"),
        lambda s: s.enqueue(Ticket("a", 0.0)),
    ],
)
def test_transitions_out_of_turn_are_refused(step: Callable[[SwitcherState], object]) -> None:
    with pytest.raises(RuntimeError, match="illegal transition"):
        step(active())


def test_a_snapshot_does_not_change_any_more() -> None:
    state = active()
    before = state.snapshot()
    state.try_admit("a")
    queued(state, "b")
    assert before.in_flight["a"] == 0
    assert before.waiting["b"] == 0
    with pytest.raises(TypeError):
        before.in_flight["a"] = 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (SwitcherState(("a",)), "the servers' states are not known yet"),
        (active(), "the model 'a' is active with 0 requests in flight"),
        (switching(Phase.DRAIN), "switching to 'b' from 'a' (0 in flight), in the phase 'drain'"),
        (switching(Phase.WAKE), "switching to 'b', in the phase 'wake'"),
    ],
)
def test_the_state_can_be_put_into_words(state: SwitcherState, words: str) -> None:
    assert words in state.describe()


# Doubts


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN])
def test_a_doubt_before_the_point_of_no_return_closes_the_gate_and_leads_back_to_asking(phase: Phase) -> None:
    for end in (SwitcherState.abandon, SwitcherState.fail):
        state = switching(phase)
        state.distrust()
        assert not state.try_admit("a")
        waiting = queued(state, "a")
        assert end(state) == []
        assert (state.mode, waiting.status) == (Mode.UNKNOWN, TicketStatus.WAITING)
        state.inquire()
        assert state.adopt("a") == [waiting]


def test_a_doubt_does_not_stop_a_switch_and_is_settled_by_what_the_switch_verifies() -> None:
    state = switching(Phase.DRAIN)
    state.distrust()
    assert state.commit()
    state.wake()
    state.ready()
    assert len(state.complete(1.0)) == 1
    assert state.mode is Mode.ACTIVE
    state = switching(Phase.SLEEP)
    state.distrust()
    state.wake()
    state.abandon()
    assert state.mode is Mode.IDLE


def test_a_doubt_that_comes_up_while_the_servers_are_asked_has_them_asked_again() -> None:
    state = SwitcherState(("a",))
    waiting = queued(state, "a")
    state.distrust()  # before the question: it will be answered by it
    state.inquire()
    state.distrust()
    assert state.adopt("a") == []
    assert state.mode is Mode.UNKNOWN
    state.inquire()
    assert state.adopt("a") == [waiting]


def test_a_model_that_is_still_awake_after_a_failed_switch_keeps_its_time() -> None:
    state = switching(Phase.READY)
    state.complete(7.0)
    queued(state, "a")
    state.begin("a")
    state.drain()
    state.commit()
    state.fail()
    state.inquire()
    state.adopt("b")
    assert state.active_since == 7.0


# Frozen requests


def frozen(*head_starts: float, queue: tuple[float, ...] = ()) -> SwitcherState:
    """The model a was active and its requests, of these head starts, were frozen at 10.0; then others queued for it at 20.0."""
    state = active("a")
    for head_start in head_starts:
        assert state.try_admit("a", head_start)
    queued(state, "b")
    state.begin("b")
    state.drain()
    assert state.commit()
    state.freeze(10.0)
    state.wake()
    state.ready()
    state.complete(11.0)
    for head_start in queue:
        state.enqueue(Ticket("a", 20.0, head_start))
    return state


def test_frozen_requests_wait_since_the_freeze_and_are_no_part_of_the_queue() -> None:
    state = frozen(0.0, 0.0, queue=(0.0,))
    assert (state.in_flight("a"), state.frozen("a"), state.queued("a"), state.depth("a")) == (0, 2, 1, 3)
    assert state.waiting_models() == ["a"]
    assert (state.waiting_since("a"), state.queued_since("a"), state.queued_since("b")) == (10.0, 20.0, math.inf)
    assert state.total_wait("a", 30.0) == 20.0 + 20.0 + 10.0
    assert (state.snapshot().frozen["a"], state.snapshot().waiting["a"]) == (2, 1)


def test_frozen_requests_keep_their_head_start() -> None:
    state = frozen(0.0, 5.0, queue=(3.0,))
    assert (state.waiting_since("a"), state.head_start("a")) == (5.0, 5.0)
    assert state.total_wait("a", 30.0) == 20.0 + (20.0 + 5.0) + (10.0 + 3.0)
    state.release_frozen("a", 30.0, 5.0)
    assert (state.waiting_since("a"), state.head_start("a")) == (10.0, 3.0)
    assert state.total_wait("a", 30.0) == 20.0 + (10.0 + 3.0)
    state.release_frozen("a", 30.0)
    assert (state.waiting_since("a"), state.frozen("a"), state.depth("a")) == (17.0, 0, 1)
    with pytest.raises(RuntimeError, match="illegal transition"):
        state.release_frozen("a", 30.0)


def test_frozen_requests_are_served_again_when_their_model_is_active() -> None:
    state = frozen(0.0, 5.0, queue=(3.0,))
    state.begin("a")
    state.drain()
    assert state.commit()
    state.freeze(40.0)
    state.wake()
    state.ready()
    assert len(state.complete(41.0)) == 1
    assert (state.in_flight("a"), state.frozen("a"), state.queued_at_activation) == (3, 0, 3)
    assert (state.frozen("b"), state.waiting_since("b")) == (1, 40.0)
    assert state.served_until() == dict.fromkeys((0.0, 5.0, 3.0), math.inf)
    for head_start in (0.0, 5.0, 3.0):
        state.release("a", 50.0, head_start)
    assert state.idle_for(51.0) == 1.0


def test_a_switch_for_frozen_requests_alone_is_begun_and_given_up_as_any() -> None:
    state = frozen(0.0)
    state.begin("a")
    state.drain()
    state.release_frozen("a", 12.0)
    assert not state.commit()


def test_only_requests_of_a_model_that_was_put_to_sleep_are_frozen() -> None:
    state = active("a")
    state.try_admit("a")
    with pytest.raises(RuntimeError, match="illegal transition"):
        state.freeze(1.0)
