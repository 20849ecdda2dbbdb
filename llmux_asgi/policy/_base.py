"""What the policies of this package have in common."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import DrainMode
from ._vocabulary import PolicyContext, PolicyDecision, Stay, SwitchContext, SwitchNow, SwitchPolicy

__all__ = ["DrainingPolicy", "decide_at", "has_waited_longest", "idle_ends_at", "reached_at", "turn_ends_at"]


class DrainingPolicy(SwitchPolicy):
    """The settings of the `policy` section of the configuration that each policy has.

    `drain` says what becomes of requests that run when their model has to make way: with `"wait"` (or `True`) they finish
    first, with `"preempt"` their server keeps them and goes on with them at the model's next turn, with `"abort"` (or
    `False`) they are aborted. `drain_timeout` is the longest drain in seconds; requests still running then are aborted, or
    frozen. `None`: no deadline, and no drain before preemption. `max_freezes` is how often one request may be frozen: then it
    finishes first. `max_frozen` is the longest freeze in seconds: then it is ended with an error.
    """

    def __init__(
        self,
        *,
        sleep_level: int,
        request_timeout: float | None,
        min_active_duration: float,
        drain: DrainMode | bool,
        drain_timeout: float | None,
        max_freezes: int,
        max_frozen: float,
    ) -> None:
        self.sleep_level = sleep_level
        self.request_timeout = request_timeout
        self.min_active_duration = min_active_duration
        self.drain: DrainMode = ("wait" if drain else "abort") if isinstance(drain, bool) else drain
        self.drain_timeout = drain_timeout
        self.max_freezes = max_freezes
        self.max_frozen = max_frozen

    async def prepare_switch(self, context: SwitchContext) -> None:
        """Let running requests finish, up to `drain_timeout` seconds, or have them frozen, as `drain` says."""
        if self.drain == "wait" or (self.drain == "preempt" and self.drain_timeout is not None):
            await context.wait_for_in_flight(self.drain_timeout)
        if self.drain == "preempt":
            await context.preempt(max_freezes=self.max_freezes, max_frozen=self.max_frozen)


def has_waited_longest(context: PolicyContext) -> bool:
    """Say whether nobody has waited for longer than the target's longest wait."""
    return context.oldest_waiting >= max(context.oldest_waits.values(), default=context.oldest_waiting)


_RESERVE = 1.5
"""What is kept of a request's time limit for the switch to its model and the drain before it, in costs of the switch."""


def turn_ends_at(context: PolicyContext, quantum: float, linger: float, request_timeout: float | None) -> float:
    """When the active model's turn is over for the target's sake, on the clock of `context.now`, as things stand.

    That is when it has been active for `quantum` times the estimated cost of the switch, or idle for `linger` seconds. If
    somebody with a larger head start waits for the target than the active model serves, it is sooner, by the difference. And
    in any case it is in time for the target's first request, if that gives up after `request_timeout` seconds.
    """
    if context.active_model is None:
        return context.now
    cost = context.switch_cost(context.active_model, context.target_model)
    head_start = context.head_starts.get(context.target_model, 0.0)

    def spent(served: float) -> float:
        return context.active_since + max(0.0, quantum * cost - max(0.0, head_start - served))

    end = min(reached_at(context, linger, spent), idle_ends_at(context, linger))
    if request_timeout is None or (waited := real_wait(context)) is None:
        return end
    return min(end, context.now + request_timeout - _RESERVE * cost - waited)


def real_wait(context: PolicyContext) -> float | None:
    """For how long the target's first request has waited, head start aside; `None` if all that wait for it are frozen."""
    return context.oldest_waiting if context.real_waits is None else context.real_waits.get(context.target_model)


def reached_at(context: PolicyContext, linger: float, time: Callable[[float], float]) -> float:
    """When `time(h)` has come, h being the largest head start that the active model serves then, as things stand.

    A head start counts as served for `linger` seconds beyond the last request that had it: a client that comes again and again
    is still there between two of its requests. The larger h, the later is `time(h)`.
    """
    end, since = math.inf, context.now
    for served, until in sorted(context.served_until.items(), reverse=True):
        end = min(end, max(since, time(served)))
        since = max(since, until + linger)
    return min(end, max(since, time(0.0)))


def idle_ends_at(context: PolicyContext, linger: float) -> float:
    """When the active model will have been idle for `linger` seconds if nothing comes for it; infinity if it is busy."""
    if context.active_in_flight:
        return float("inf")
    return context.now if context.idle_for >= linger else context.now + (linger - context.idle_for)


def decide_at(time: float, now: float) -> PolicyDecision:
    """`SwitchNow` from `time` on, `Stay` before it."""
    return SwitchNow() if time <= now else Stay(until=time)
