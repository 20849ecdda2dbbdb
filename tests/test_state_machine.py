"""Random walks through the state machine: the invariants hold after every step, whatever the order."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmux_asgi._state import Mode, Phase, SwitcherState, Ticket, TicketStatus

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
        self.served_until: dict[float, float] = {}
        """When the last request of each head start was over, in the active model's turn."""
        self.queue: list[Ticket] = []
        self.doubted = False
        """Whether something is doubted that has not been verified since."""

    def settle(self, granted: list[Ticket]) -> None:
        """Take the granted tickets over into the books."""
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

    @rule()
    def distrust(self) -> None:
        self.state.distrust()
        self.doubted = True

    @precondition(lambda self: self.state.mode in (Mode.IDLE, Mode.ACTIVE) and self.state.waiting_models())
    @rule()
    def begin(self) -> None:
        self.state.begin(self.state.waiting_models()[0])

    @precondition(lambda self: self.state.phase is Phase.COOLDOWN)
    @rule()
    def drain(self) -> None:
        self.state.drain()

    @precondition(lambda self: self.state.phase is Phase.DRAIN and not self.state.in_flight(self.state.active))
    @rule()
    def commit(self) -> None:
        target = self.state.target
        assert target is not None
        wanted = any(ticket.model == target for ticket in self.queue)
        assert self.state.commit() is wanted
        if not wanted:
            self.settle(self.state.abandon())

    @precondition(lambda self: self.state.phase is Phase.SLEEP)
    @rule()
    def sleep(self) -> None:
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

    @invariant()
    def the_sum_of_the_waits_agrees_with_the_books(self) -> None:
        for model in MODELS:
            waits = [self.now - ticket.since + ticket.head_start for ticket in self.queue if ticket.model == model]
            assert abs(self.state.total_wait(model, self.now) - sum(waits)) < 1e-6

    def in_order(self, model: str) -> list[Ticket]:
        """The queue of a model, the longest wait first."""
        return sorted((t for t in self.queue if t.model == model), key=lambda t: t.since - t.head_start)

    @invariant()
    def the_order_goes_by_the_waits_with_their_head_starts(self) -> None:
        queues = {model: queue for model in MODELS if (queue := self.in_order(model))}
        first = {model: queue[0].since - queue[0].head_start for model, queue in queues.items()}
        assert self.state.waiting_models() == sorted(first, key=first.__getitem__)
        for model, queue in queues.items():
            assert self.state.waiting_since(model) == first[model]
            assert [t.counts_since for t in self.state.waiters(model)] == [t.counts_since for t in queue]
            assert self.state.head_start(model) == max(ticket.head_start for ticket in queue)
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
        assert (self.state.target is not None) is switching


SwitcherStateMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSwitcherState = SwitcherStateMachine.TestCase
