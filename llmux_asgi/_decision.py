"""Asks the policy, and keeps the deferrals that it answered with."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Protocol

import anyio

from ._spawn import only_own_cancellation, spawn
from ._state import SwitcherState
from .policy import Defer, PolicyContext, Stay, SwitchNow, SwitchPolicy

__all__ = ["Blame", "Decider"]

logger = logging.getLogger(__name__)


class Blame(Protocol):
    """Told of what a policy did wrong for a model."""

    def __call__(self, model: str, what: str, exc: Exception | None = None) -> object:
        """Fail those who wait for `model`."""
        ...


@dataclass(slots=True)
class _Deferral:
    awaitable: Awaitable[object]
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    started: bool = False
    dropped: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True)
class _Situation:
    """What is the same in every context of one round of questions. The models with the longest wait come first."""

    now: float
    depths: Mapping[str, int]
    oldest_waits: Mapping[str, float]
    total_waits: Mapping[str, float]
    head_starts: Mapping[str, float]
    real_waits: Mapping[str, float]
    served_until: Mapping[float, float]
    sleep_costs: Mapping[str, float]
    wake_costs: Mapping[str, float]


class Decider:
    """Which model to switch to now, as the policy has it. `changed` is called when that may have become another one.

    `costs` tells the estimates of sleep and of wake, in seconds by model.
    """

    def __init__(
        self,
        policy: SwitchPolicy,
        state: SwitcherState,
        clock: Callable[[], float],
        blame: Blame,
        changed: Callable[[], None],
        costs: Callable[[], tuple[Mapping[str, float], Mapping[str, float]]],
    ) -> None:
        self._policy = policy
        self._state = state
        self._clock = clock
        self._blame = blame
        self._changed = changed
        self._costs = costs
        self._deferrals: dict[str, _Deferral] = {}
        self.ask_again_at = math.inf
        """When the policy wants to be asked again although nothing has changed, on `clock`. As of the last `choose`."""

    def choose(self) -> str | None:
        """Ask for each model that has waiting requests, the longest wait first; `None`: for none of them now."""
        self.ask_again_at = math.inf
        if self._state.held:
            return None
        situation = self._look()
        for model in situation.depths:
            if deferral := self._deferrals.get(model):
                if deferral.done:
                    del self._deferrals[model]
                    return model
                continue
            try:
                decision: object = self._policy.on_pending_request(self._context(model, situation))
            except Exception as exc:  # noqa: BLE001 - the policy is the user's code
                self._blame(model, f"on_pending_request raised {exc!r}", exc)
                continue
            match decision:
                case SwitchNow():
                    return model
                case Stay(None):
                    pass
                case Stay(until) if isinstance(until, int | float) and not math.isnan(until):
                    self.ask_again_at = min(self.ask_again_at, until)
                case Stay(until):
                    self._blame(model, f"on_pending_request returned {decision!r}; until must be a time in seconds or None")
                case Defer(awaitable):
                    self._deferrals[model] = deferral = _Deferral(awaitable)
                    # In a task of its own: the user's code may be slow to end, or cancel what it is given.
                    spawn(partial(self._await, model, deferral), "llmux_asgi deferral")
                case _:
                    if inspect.iscoroutine(decision):
                        decision.close()
                    self._blame(
                        model,
                        f"on_pending_request returned {type(decision).__name__}; it must be a plain function that "
                        "returns SwitchNow(), Stay(until) or Defer(awaitable)",
                    )
        return None

    def use(self, policy: SwitchPolicy) -> None:
        """Ask another policy from now on."""
        self._policy = policy
        self.drop_all()
        self._changed()

    def drop(self, model: str) -> None:
        """Cancel the deferral of `model`, if there is one: it has become pointless."""
        if deferral := self._deferrals.pop(model, None):
            deferral.dropped = True
            deferral.scope.cancel()
            if not deferral.started and inspect.iscoroutine(deferral.awaitable):
                deferral.awaitable.close()  # else Python warns that it was never awaited

    def drop_all(self) -> None:
        """Cancel every deferral."""
        for model in list(self._deferrals):
            self.drop(model)

    def _look(self) -> _Situation:
        """Once for all models that are asked about. What it costs grows with the number of models, not of requests."""
        state, now = self._state, self._clock()
        waiting = state.longest_waits()
        return _Situation(
            now,
            MappingProxyType({model: state.depth(model) for model in waiting}),
            MappingProxyType({model: now - since for model, since in waiting.items()}),
            MappingProxyType({model: state.total_wait(model, now) for model in waiting}),
            MappingProxyType({model: state.head_start(model) for model in waiting}),
            MappingProxyType({model: now - state.queued_since(model) for model in waiting if state.queued(model)}),
            MappingProxyType(state.served_until()),
            *self._costs(),
        )

    def _context(self, model: str, situation: _Situation) -> PolicyContext:
        state, active = self._state, self._state.active
        return PolicyContext(
            target_model=model,
            active_model=active,
            target_queue_depth=situation.depths[model],
            oldest_waiting=situation.oldest_waits[model],
            active_in_flight=state.in_flight(active),
            now=situation.now,
            active_since=state.active_since,
            idle_for=state.idle_for(situation.now),
            queued_at_activation=state.queued_at_activation,
            queue_depths=situation.depths,
            oldest_waits=situation.oldest_waits,
            total_waits=situation.total_waits,
            head_starts=situation.head_starts,
            real_waits=situation.real_waits,
            served_until=situation.served_until,
            sleep_costs=situation.sleep_costs,
            wake_costs=situation.wake_costs,
        )

    async def _await(self, model: str, deferral: _Deferral) -> None:
        if deferral.dropped:
            return
        deferral.started = True
        try:
            with deferral.scope, only_own_cancellation():
                await deferral.awaitable
                deferral.done = True
        except Exception as exc:
            if self._deferrals.get(model) is deferral:
                self._blame(model, f"the awaitable of its Defer raised {exc!r}", exc)
            else:  # dropped meanwhile: who waits for the model now has nothing to do with it
                logger.warning("the awaitable of a Defer raised when it was cancelled", exc_info=exc)
        self._changed()
