"""Puts the active model to sleep when nobody has asked for it for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ._orders import Order, OrderKind
from ._spawn import Later
from ._state import Mode, SwitcherState

__all__ = ["IdleSleep"]


class IdleSleep:
    """Gives the order when the active model has been idle for its `ttl`, in seconds by model; those without one stay awake.

    Requests cost nothing: a timer is set when a model becomes active, and looks for how long it has been idle when it is due.
    """

    def __init__(
        self,
        ttls: Mapping[str, float],
        state: SwitcherState,
        clock: Callable[[], float],
        order: Callable[[Order], None],
    ) -> None:
        self._ttls = dict(ttls)
        self._state = state
        self._clock = clock
        self._order = order
        self._timer: Later | None = None

    def use(self, ttls: Mapping[str, float]) -> None:
        """Go by other ones from now on."""
        self._ttls = dict(ttls)
        self.watch()

    def watch(self) -> None:
        """Set the timer anew, for the model that is active now."""
        self.stop()
        ttl = self._ttl()
        if ttl is not None and self._state.mode in (Mode.ACTIVE, Mode.UNKNOWN):
            idle = self._state.idle_for(self._clock())
            self._timer = Later(self._fire, ttl - idle if idle < ttl else ttl)

    def stop(self) -> None:
        """Set no timer."""
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def is_due(self, model: str) -> bool:
        """Say whether `model` is to be put to sleep now: it is active and was idle for long enough, and nobody waits."""
        ttl, state = self._ttl(), self._state
        idle = state.idle_for(self._clock())
        return model == state.active and ttl is not None and idle >= ttl and not state.held and not state.waiting_models()

    def _ttl(self) -> float | None:
        return self._ttls.get(self._state.active) if self._state.active is not None else None

    async def _fire(self) -> None:
        self._timer = None
        self.watch()  # again, in case that it is not due yet, or cannot be done
        model = self._state.active
        if model is not None and self.is_due(model):
            self._order(Order(OrderKind.IDLE, model, self.is_due))
