"""Asks the policy, and keeps the deferrals that it answered with."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import anyio

from ._spawn import only_own_cancellation, spawn
from ._state import SwitcherState
from .policy import Defer, PolicyContext, SwitchNow, SwitchPolicy

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


class Decider:
    """Which model to switch to now, as the policy has it. `changed` is called when that may have become another one."""

    def __init__(
        self,
        policy: SwitchPolicy,
        state: SwitcherState,
        clock: Callable[[], float],
        blame: Blame,
        changed: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._state = state
        self._clock = clock
        self._blame = blame
        self._changed = changed
        self._deferrals: dict[str, _Deferral] = {}

    def choose(self) -> str | None:
        """Ask for each model that has waiting requests, the longest wait first; `None`: for none of them now."""
        for model in self._state.waiting_models():
            if deferral := self._deferrals.get(model):
                if deferral.done:
                    del self._deferrals[model]
                    return model
                continue
            try:
                decision: object = self._policy.on_pending_request(self._context(model))
            except Exception as exc:  # noqa: BLE001 - the policy is the user's code
                self._blame(model, f"on_pending_request raised {exc!r}", exc)
                continue
            match decision:
                case SwitchNow():
                    return model
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
                        "returns SwitchNow() or Defer(awaitable)",
                    )
        return None

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

    def _context(self, model: str) -> PolicyContext:
        active = self._state.active
        return PolicyContext(
            target_model=model,
            active_model=active,
            target_queue_depth=self._state.depth(model),
            oldest_waiting=self._clock() - self._state.oldest(model).since,
            active_in_flight=self._state.in_flight(active),
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
