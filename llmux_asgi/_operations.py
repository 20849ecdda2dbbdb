"""What an operator may do to a switcher by hand, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

from ._backoff import Backoff
from ._driver import Driver
from ._estimates import ModelCosts
from ._journal import Journal
from ._orders import Order, OrderKind
from ._room import WaitingRoom
from ._servers import Servers
from ._state import SwitcherStatistics
from .exceptions import OperationError

__all__ = ["Operations"]


class Operations:
    """Carries them out on the parts of one switcher. Models are told by their configured names."""

    def __init__(
        self,
        room: WaitingRoom,
        servers: Servers,
        driver: Driver,
        backoff: Backoff,
        journal: Journal,
        costs: Callable[[str], ModelCosts],
        clock: Callable[[], float],
    ) -> None:
        self._room = room
        self._state = room.state
        self._servers = servers
        self._driver = driver
        self._backoff = backoff
        self._journal = journal
        self._costs = costs
        self._clock = clock
        self.draining = False

    def require_wakeable(self, model: str) -> None:
        """Raise `OperationError` if another model is pinned and active."""
        if self._state.held and model != self._state.active:
            raise OperationError(f"The model {model!r} cannot be woken: {self._state.active!r} is pinned. Unpin it first.")

    async def sleep(self, model: str) -> None:
        """Put it to sleep if it is active, and wake no other for it."""
        await self._give(Order(OrderKind.SLEEP, model))

    async def stop(self, model: str) -> None:
        """The same, and end its process."""
        self._servers.require_stoppable(model)
        await self._give(Order(OrderKind.STOP, model))

    async def _give(self, order: Order) -> None:
        self._driver.order(order)
        await order.done.wait()
        if order.error is not None:
            raise order.error

    def pin(self, model: str | None) -> None:
        """Keep `model` active once it is; `None`: none any more."""
        if model == self._state.pinned:
            return
        self._state.pinned = model
        self._journal.write("pin", model=model)
        self._room.give_up_a_switch_away()

    def drain(self, *, draining: bool) -> None:
        """Refuse new requests, or admit them again."""
        if draining != self.draining:
            self.draining = draining
            self._journal.write("drain", draining=draining)

    def statistics(self) -> SwitcherStatistics:
        """Return a frozen snapshot of what the pool is doing."""
        now, models = self._clock(), self._state.models
        return replace(
            self._state.snapshot(),
            servers=MappingProxyType(dict.fromkeys(models, "unknown") | self._servers.states()),
            costs=MappingProxyType({model: self._costs(model) for model in models}),
            oldest_waits=MappingProxyType(self._state.first_waits(now)),
            retry_in=MappingProxyType(self._backoff.retry_in(now)),
            pinned=self._state.pinned,
            draining=self.draining,
            switch=self._driver.records.under_way,
            shares=MappingProxyType(self._room.shares.seconds(now)),
            errors=self._journal.errors,
            last_errors=MappingProxyType(self._journal.last_errors),
        )
