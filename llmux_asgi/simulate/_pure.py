"""What a policy may ask of the simulator: it must do without an event loop."""

from __future__ import annotations

import inspect

from ..policy import Defer, PolicyContext, PolicyDecision, SwitchPolicy
from .errors import SimulationError

__all__ = ["Drained", "PurePolicy", "Released"]


class Drained:
    """What `SwitchContext.wait_for_in_flight` waits for: that the model is drained, or `timeout` seconds have passed."""

    __slots__ = ("timeout",)

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout


class Released:
    """What `SwitchContext.preempt` waits for: that any request of the model is over."""

    __slots__ = ()


class PurePolicy(SwitchPolicy):
    """The policy, unless it asks for something that takes an event loop."""

    def __init__(self, policy: SwitchPolicy) -> None:
        self._policy = policy

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """Ask it. Raises `SimulationError` if it answers `Defer`."""
        decision = self._policy.on_pending_request(context)
        if isinstance(decision, Defer):
            if inspect.iscoroutine(decision.awaitable):
                decision.awaitable.close()
            name = type(self._policy).__name__
            raise SimulationError(f"{name} answers Defer, which cannot be simulated: let it answer Stay(until)")
        return decision
