"""When to leave the active model, and for which: the policy seam.

A policy is pure: it is shown a `PolicyContext` and answers at once, without I/O and without waiting. The switcher asks it
for each model that has waiting requests, the one that has waited longest first: *shall we switch to it?*

    SwitchNow()         the switch begins
    Defer(awaitable)    the switch begins when the awaitable is done, without asking again, if somebody still waits for
                        the model by then; one deferral a model at a time, cancelled when it has become pointless

Write your own by subclassing `SwitchPolicy`:

    class NightShift(SwitchPolicy):
        def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
            if context.active_in_flight == 0 or context.oldest_waiting > 10.0:
                return SwitchNow()
            return Defer(anyio.sleep(10.0 - context.oldest_waiting))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

__all__ = [
    "Defer",
    "FifoPolicy",
    "PolicyContext",
    "PolicyDecision",
    "SwitchContext",
    "SwitchNow",
    "SwitchPolicy",
]


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy sees when it is asked whether to switch to `target_model`."""

    target_model: str
    """The model that has waiting requests and is not active."""
    active_model: str | None
    """The model that is awake and serving, `None` if none is."""
    target_queue_depth: int
    """How many requests wait for `target_model`, at least 1."""
    oldest_waiting: float
    """For how many seconds the oldest of them has waited."""
    active_in_flight: int
    """How many requests the active model is serving now; 0 if none is active."""


@dataclass(frozen=True, slots=True)
class SwitchNow:
    """Begin the switch now."""


@dataclass(frozen=True, slots=True)
class Defer:
    """Begin the switch when `awaitable` is done, if somebody still waits for the model then.

    The switcher awaits it in a task of its own and cancels it when it has become pointless (nobody waits any more, the
    model became active by other means). An exception from it fails the model's waiters with a `PolicyError`.
    """

    awaitable: Awaitable[object]


PolicyDecision: TypeAlias = SwitchNow | Defer


class SwitchContext:
    """What a policy's `prepare_switch` may look at and wait for, between the decision to switch and the sleep call."""

    __slots__ = ("_in_flight", "_wait", "from_model", "to_model")

    def __init__(
        self,
        from_model: str | None,
        to_model: str,
        in_flight: Callable[[], int],
        wait: Callable[[float | None], Awaitable[bool]],
    ) -> None:
        self.from_model = from_model
        self.to_model = to_model
        self._in_flight = in_flight
        self._wait = wait

    @property
    def in_flight_count(self) -> int:
        """How many requests `from_model` is still serving. It only falls: new ones wait for the model's next turn."""
        return self._in_flight()

    async def wait_for_in_flight(self, timeout: float | None = None) -> bool:
        """Wait until `from_model` serves no request any more, at most `timeout` seconds (`None`: as long as it takes).

        Returns whether it was drained. May be cancelled at any time: the switch is given up if nobody waits for it.
        """
        return await self._wait(timeout)


@runtime_checkable
class SwitchPolicy(Protocol):
    """Decides when to switch. Subclass it and write `on_pending_request`; the rest has defaults."""

    sleep_level: int = 1
    """vLLM's sleep level for the outgoing model, unless the model has one of its own in the configuration: 1 or 2."""
    request_timeout: float | None = 60.0
    """The longest time in seconds that a request waits for its model; then it gets a 504. `None`: no limit."""
    min_active_duration: float = 5.0
    """For how many seconds a model stays active once it was woken, before a switch away from it may begin to drain."""

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """Say whether to switch to `context.target_model`. Called often: answer at once and do not block."""
        ...

    async def prepare_switch(self, context: SwitchContext) -> None:
        """Wait for whatever must be over before the outgoing model is put to sleep. The default drains it fully.

        Requests still running when it returns are aborted by vLLM and reach their clients as an error.
        """
        await context.wait_for_in_flight()


class FifoPolicy(SwitchPolicy):
    """Switch to whichever model has waited longest, as soon as `min_active_duration` allows.

    Bound on a wait, with N models, switch cost C (sleep + wake, seconds), drain deadline D and min_active_duration M:
    (N - 1) * (M + D + C) + M + D + C. Without `drain_timeout` D is the longest running answer.

    It is simple and fair between models, and it thrashes when requests for several models alternate.
    """

    def __init__(
        self,
        *,
        sleep_level: int = 1,
        request_timeout: float | None = 60.0,
        min_active_duration: float = 5.0,
        drain: bool = True,
        drain_timeout: float | None = None,
    ) -> None:
        """Take the settings of the `policy` section of the configuration.

        `drain`: wait for running requests before the model is put to sleep; if off they are aborted at once.
        `drain_timeout`: the longest drain in seconds; requests still running then are aborted. `None`: no deadline.
        """
        self.sleep_level = sleep_level
        self.request_timeout = request_timeout
        self.min_active_duration = min_active_duration
        self.drain = drain
        self.drain_timeout = drain_timeout

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """Always `SwitchNow`: the switcher asks for the model that has waited longest first."""
        return SwitchNow()

    async def prepare_switch(self, context: SwitchContext) -> None:
        """Drain, up to `drain_timeout` seconds, unless draining is off."""
        if self.drain:
            await context.wait_for_in_flight(self.drain_timeout)
