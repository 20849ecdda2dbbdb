"""The requests that wait for a model or are served by it, and how they are told what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import anyio

from ._lease import Activation, Freeze, Waiter
from ._shares import TimeShares
from ._state import SwitcherState, Ticket, TicketStatus
from .exceptions import LLMuxError, SwitchError

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

__all__ = ["WaitingRoom"]


class WaitingRoom:
    """Admits, queues and releases, and keeps the events that these set."""

    def __init__(self, state: SwitcherState, clock: Callable[[], float]) -> None:
        self.state = state
        self._clock = clock
        self.shares = TimeShares(state, clock())
        """How the time was spent."""
        self.activation = Activation()
        """The stretch of time that leases are granted in."""
        self.frozen: dict[str, Activation] = {}
        """Those that were stopped in the middle and go on at their model's next turn, by model."""
        self.changed = anyio.Event()
        """Set when the policy may decide otherwise than before. Whoever waits for it puts a new one here first."""
        self.drained = anyio.Event()
        """Set when the active model's last running request is over. As above."""
        self._released: anyio.Event | None = None
        """Set when any request is over, if somebody waits for that: see `until_release`."""
        self.give_up: anyio.CancelScope | None = None
        """Cancelled when nobody waits for the target any more, as long as the switch can be given up."""
        self.drop_deferral: Callable[[str], None] = lambda model: None
        """Called when a deferral of the model has become pointless."""
        self.settled: Callable[[], None] = lambda: None
        """Called after every settled transition."""

    def release(self, model: str, head_start: float, *, frozen: bool = False) -> None:
        """Count a request out, which may have been frozen."""
        if frozen:
            self.state.release_frozen(model, self._clock(), head_start)
            if not self.state.frozen(model):
                self.frozen.pop(model, None)
            if not self.state.depth(model):
                self._nobody_waits(model)
        elif self.state.release(model, now := self._clock(), head_start) and model == self.state.active:
            self.drained.set()
            self.shares.served_the_last(now)
        if self._released is not None:
            self._released.set()
        self.changed.set()

    def look_again(self) -> None:
        """Have those who wait in `until_release` look at how things are now."""
        if self._released is not None:
            self._released.set()

    async def until_release(self) -> None:
        """Wait until any request is over, or something else has changed."""
        if self._released is None or self._released.is_set():  # another task may wait for the present one
            self._released = anyio.Event()
        await self._released.wait()

    def withdraw(self, waiter: Waiter) -> None:
        """Undo what a request that goes away has got: its place in the queue, or the lease granted a moment ago."""
        if waiter.status is TicketStatus.GRANTED:
            frozen = waiter.activation is not None and waiter.activation.freeze is not None
            self.release(waiter.model, waiter.head_start, frozen=frozen)
        elif waiter.status is TicketStatus.WAITING:
            self.state.leave(waiter)
            if not self.state.depth(waiter.model):
                self._nobody_waits(waiter.model)
            self.changed.set()

    def refuse(self, model: str, error: Callable[[], LLMuxError]) -> None:
        """Tell everybody who waits for a turn of `model` the error that the function makes."""
        if not self.state.is_shut(model):
            self.refuse_queue(model, error)
        if activation := self.frozen.pop(model, None):
            activation.end(error)
        self._nobody_waits(model)

    def refuse_queues(self, reason: str) -> None:
        """Tell everybody in a queue that the switch failed, and why. Frozen requests go on waiting."""
        for model in self.state.waiting_models():
            if not self.state.is_shut(model):
                self.refuse_queue(model, partial(SwitchError, model, reason))
            if not self.state.depth(model):
                self._nobody_waits(model)

    def refuse_all(self, reason: str) -> None:
        """Tell everybody who waits, in a queue or frozen, that the switch failed, and why."""
        for model in self.state.waiting_models():
            self.refuse(model, partial(SwitchError, model, reason))

    def close(self, reason: str) -> None:
        """As `refuse_all`; those who wait for a new server too."""
        self.refuse_all(reason)
        for model in self.state.models:
            self.refuse_queue(model, partial(SwitchError, model, reason))

    def refuse_queue(self, model: str, error: Callable[[], LLMuxError]) -> None:
        """Tell everybody in the queue of `model`, and those only, the error that the function makes."""
        for ticket in self.state.refuse(model):
            waiter = cast("Waiter", ticket)
            waiter.error = error
            waiter.event.set()

    def has_shut(self, model: str) -> None:
        """`model` was shut: those in its queue want no turn any more."""
        if not self.state.depth(model):
            self._nobody_waits(model)

    def _nobody_waits(self, model: str) -> None:
        self.drop_deferral(model)
        if self.give_up is not None and model == self.state.target:
            self.give_up.cancel()
        self.changed.set()
        self.look_again()

    def give_up_a_switch_away(self) -> None:
        """The active model may have been pinned, or unpinned. A switch away from a pinned one is given up if it can be."""
        state = self.state
        if state.held and state.target is not None and state.can_be_given_up and self.give_up is not None:
            self.give_up.cancel()
        self.changed.set()
        self.look_again()

    def freeze(self, model: str, limit: float) -> None:
        """Keep the requests that `model` was serving for its next turn: it is asleep, and its server keeps them too."""
        now = self._clock()
        self.state.freeze(now)
        self.frozen[model] = self.activation
        self.activation.begin_freeze(Freeze(now, limit))
        self.activation = Activation()

    def begin(self, model: str | None) -> None:
        """Begin the stretch of time in which `model` is awake, or none: the one that was stopped in the middle, if any was."""
        self.activation = self.frozen.pop(model) if model is not None and model in self.frozen else Activation()
        self.activation.end_freeze(self._clock())

    def grant(self, granted: list[Ticket], switch: SpanContext | None = None) -> None:
        """Tell those whose tickets were granted, and by which switch if it was one. Called after every settled transition."""
        self.shares.note(self._clock())
        self.look_again()
        self.settled()
        for ticket in granted:
            waiter = cast("Waiter", ticket)
            waiter.activation, waiter.switch = self.activation, switch
            waiter.event.set()
        if self.state.active is not None:
            self.drop_deferral(self.state.active)
