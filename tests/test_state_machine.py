"""Random walks through the state machine: the invariants hold after every step, whatever the order."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmux_asgi._state import Mode, Phase, SwitcherState, Ticket, TicketStatus

pytestmark = pytest.mark.no_cover

MODELS = ("a", "b", "c")
models = st.sampled_from(MODELS)
head_starts = st.sampled_from([0.0, 0.5, 30.0])


class SwitcherStateMachine(RuleBasedStateMachine):
    """Keeps books of its own (who holds, who waits, who is awake on the servers) and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.state = SwitcherState(MODELS)
        self.now = 0.0
        self.awake: str | None = None
        self.holding: dict[str, list[float]] = {model: [] for model in MODELS}
        """The head start of each lease."""
        self.frozen: dict[str, list[float]] = {model: [] for model in MODELS}
        """The same of each lease whose request is frozen."""
        self.frozen_since: dict[str, float] = {}
        self.served_until: dict[float, float] = {}
        """When the last request of each head start was over, in the active model's turn."""
        self.queue: list[Ticket] = []
        self.doubted = False
        """Whether something is doubted that has not been verified since."""

    def settle(self, granted: list[Ticket]) -> None:
        """Take the granted tickets over into the books, and those that were frozen if their model is active."""
        if self.state.active is not None:
            self.holding[self.state.active] += self.frozen[self.state.active]
            self.frozen[self.state.active] = []
        for ticket in granted:
            assert ticket.status is TicketStatus.GRANTED
            assert ticket.model == self.awake, "granted although its model is not awake"
            self.holding[ticket.model].append(ticket.head_start)
        self.queue = [ticket for ticket in self.queue if ticket.status is TicketStatus.WAITING]

    @rule(model=models, seconds=st.floats(0, 2), head_start=head_starts)
    def arrive(self, model: str, seconds: float, head_start: float) -> None:
        self.now += seconds
        if self.state.try_admit(model, head_start):
            assert self.awake == model, "forwarded to a sleeping server"
            self.holding[model].append(head_start)
        else:
            ticket = Ticket(model, self.now, head_start)
            self.state.enqueue(ticket)
            self.queue.append(ticket)

    @precondition(lambda self: any(self.holding.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from([m for m in MODELS if self.holding[m]]))
        head_start = data.draw(st.sampled_from(self.holding[model]))
        self.holding[model].remove(head_start)
        if model == self.state.active and head_start not in self.holding[model]:
            self.served_until[head_start] = self.now
        assert self.state.release(model, self.now, head_start) is (not self.holding[model])

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.queue))
        self.state.leave(ticket)
        self.queue.remove(ticket)

    @rule(model=models)
    def refuse(self, model: str) -> None:
        refused = self.state.refuse(model)
        assert set(refused) == {ticket for ticket in self.queue if ticket.model == model}
        assert [t.counts_since for t in refused] == [t.counts_since for t in self.in_order(model)]
        self.settle([])

    @precondition(lambda self: self.state.mode is Mode.UNKNOWN)
    @rule(doubt=st.booleans())
    def reconcile(self, doubt: bool) -> None:
        self.state.inquire()
        self.doubted = False
        if doubt:
            self.distrust()
        if self.awake != self.state.active:
            self.served_until = {}
        self.settle(self.state.adopt(self.awake))

    @precondition(lambda self: self.state.mode is Mode.UNKNOWN and self.awake and self.awake == self.state.active)
    @rule()
    def reconcile_with_a_model_that_fell_asleep_over_a_freeze(self) -> None:
        self.freeze()
        self.awake = None
        self.reconcile(doubt=False)

    def freeze(self) -> None:
        assert self.state.active is not None
        self.state.freeze(self.now)
        if held := self.holding[self.state.active]:
            self.frozen[self.state.active], self.holding[self.state.active] = held, []
            self.frozen_since[self.state.active] = self.now

    @precondition(lambda self: any(self.frozen.values()))
    @rule(data=st.data())
    def release_frozen(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from([m for m in MODELS if self.frozen[m]]))
        head_start = data.draw(st.sampled_from(self.frozen[model]))
        self.frozen[model].remove(head_start)
        self.state.release_frozen(model, self.now, head_start)

    @rule()
    def distrust(self) -> None:
        self.state.distrust()
        self.doubted = True

    @precondition(lambda self: self.state.mode in (Mode.IDLE, Mode.ACTIVE) and self.state.waiting_models())
    @rule()
    def begin(self) -> None:
        self.state.begin(self.state.waiting_models()[0])

    @precondition(lambda self: self.state.mode is Mode.ACTIVE)
    @rule()
    def begin_to_put_it_to_sleep_for_no_other(self) -> None:
        self.state.begin(None)

    @precondition(lambda self: self.state.phase is Phase.COOLDOWN)
    @rule()
    def drain(self) -> None:
        self.state.drain()

    @precondition(lambda self: self.state.phase is Phase.DRAIN)
    @rule()
    def commit(self) -> None:
        target = self.state.target
        wanted = target is None or any(ticket.model == target for ticket in self.queue) or bool(self.frozen[target])
        assert self.state.commit() is wanted
        if not wanted:
            self.settle(self.state.abandon())

    @precondition(lambda self: self.state.phase is Phase.SLEEP and self.state.target is None)
    @rule()
    def slept(self) -> None:
        self.freeze()
        self.awake = None
        self.served_until = {}
        self.settle(self.state.slept())
        assert self.state.mode is (Mode.UNKNOWN if self.doubted else Mode.IDLE)

    @precondition(lambda self: self.state.phase is Phase.SLEEP and self.state.target is not None)
    @rule()
    def sleep(self) -> None:
        if self.state.active is not None:
            self.freeze()
        assert not any(self.holding.values()), "put to sleep while leases were held"
        self.awake = None
        self.state.wake()
        self.served_until = {}
        self.doubted = False

    @precondition(lambda self: self.state.phase in (Phase.WAKE, Phase.READY))
    @rule()
    def wake_up(self) -> None:
        assert self.awake in (None, self.state.target), "woken while another model was awake"
        self.awake = None
        self.state.wake_up()

    @precondition(lambda self: self.state.phase is Phase.WAKE)
    @rule()
    def wake(self) -> None:
        assert self.awake is None, "woken while another model was awake"
        self.awake = self.state.target
        self.state.ready()

    @precondition(lambda self: self.state.phase is Phase.READY)
    @rule()
    def complete(self) -> None:
        self.doubted = False
        self.settle(self.state.complete(self.now))

    @precondition(lambda self: self.state.phase in (Phase.COOLDOWN, Phase.DRAIN, Phase.WAKE))
    @rule()
    def abandon(self) -> None:
        self.settle(self.state.abandon())

    @precondition(lambda self: self.state.mode is Mode.SWITCHING)
    @rule()
    def fail(self) -> None:
        self.settle(self.state.fail())

    @invariant()
    def counts_agree_with_the_books(self) -> None:
        statistics = self.state.snapshot()
        assert dict(statistics.in_flight) == {model: len(held) for model, held in self.holding.items()}
        assert dict(statistics.waiting) == {m: sum(t.model == m for t in self.queue) for m in MODELS}
        assert dict(statistics.frozen) == {model: len(held) for model, held in self.frozen.items()}

    @invariant()
    def the_sum_of_the_waits_agrees_with_the_books(self) -> None:
        for model in MODELS:
            waits = [self.now - since + head_start for since, head_start in self.waits(model)]
            assert abs(self.state.total_wait(model, self.now) - sum(waits)) < 1e-6

    def waits(self, model: str) -> list[tuple[float, float]]:
        """Since when, and with which head start, those wait that wait for a model."""
        frozen = [(self.frozen_since[model], head_start) for head_start in self.frozen[model]]
        return [(ticket.since, ticket.head_start) for ticket in self.queue if ticket.model == model] + frozen

    def in_order(self, model: str) -> list[Ticket]:
        """The queue of a model, the longest wait first."""
        return sorted((t for t in self.queue if t.model == model), key=lambda t: t.since - t.head_start)

    @invariant()
    def the_order_goes_by_the_waits_with_their_head_starts(self) -> None:
        waits = {model: each for model in MODELS if (each := self.waits(model))}
        first = {model: min(since - head_start for since, head_start in each) for model, each in waits.items()}
        assert self.state.waiting_models() == sorted(first, key=first.__getitem__)
        for model in MODELS:
            queue = self.in_order(model)
            assert self.state.waiting_since(model) == first[model] if model in first else not self.state.depth(model)
            assert [t.counts_since for t in self.state.waiters(model)] == [t.counts_since for t in queue]
            assert self.state.head_start(model) == max((head_start for _, head_start in waits.get(model, [])), default=0.0)
            assert self.state.queued(model) == len(queue)
        assert self.state.all_queued == len(self.queue)

    @invariant()
    def what_is_served_and_was_agrees_with_the_books(self) -> None:
        held = self.holding[self.state.active] if self.state.active is not None else []
        assert self.state.served_until() == {**self.served_until, **dict.fromkeys(held, math.inf)}

    @invariant()
    def the_active_model_is_idle_if_nobody_is_served(self) -> None:
        idle = self.state.idle_for(self.now)
        assert idle >= 0
        assert idle == 0 or (self.state.active is not None and not self.holding[self.state.active])

    @invariant()
    def nobody_waits_for_a_model_that_admits(self) -> None:
        assert not any(self.state.admits(ticket.model) for ticket in self.queue)

    @invariant()
    def only_the_awake_model_admits(self) -> None:
        assert all(model == self.awake for model in MODELS if self.state.admits(model))

    @invariant()
    def nothing_doubted_admits(self) -> None:
        assert not (self.doubted and any(self.state.admits(model) for model in MODELS))

    @invariant()
    def a_phase_belongs_to_a_switch(self) -> None:
        switching = self.state.mode is Mode.SWITCHING
        assert (self.state.phase is not None) is switching
        assert self.state.target is None or switching


SwitcherStateMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50)
TestSwitcherState = SwitcherStateMachine.TestCase
