"""What the policies of this package have in common."""

from __future__ import annotations

from ._vocabulary import PolicyContext, PolicyDecision, Stay, SwitchContext, SwitchNow, SwitchPolicy

__all__ = ["DrainingPolicy", "decide_at", "has_waited_longest", "idle_ends_at", "turn_ends_at"]


class DrainingPolicy(SwitchPolicy):
    """The settings of the `policy` section of the configuration that each policy has.

    `drain`: wait for running requests before the model is put to sleep; if off they are aborted at once.
    `drain_timeout`: the longest drain in seconds; requests still running then are aborted. `None`: no deadline.
    """

    def __init__(
        self,
        *,
        sleep_level: int,
        request_timeout: float | None,
        min_active_duration: float,
        drain: bool,
        drain_timeout: float | None,
    ) -> None:
        self.sleep_level = sleep_level
        self.request_timeout = request_timeout
        self.min_active_duration = min_active_duration
        self.drain = drain
        self.drain_timeout = drain_timeout

    async def prepare_switch(self, context: SwitchContext) -> None:
        """Drain, up to `drain_timeout` seconds, unless draining is off."""
        if self.drain:
            await context.wait_for_in_flight(self.drain_timeout)


def has_waited_longest(context: PolicyContext) -> bool:
    """Say whether nobody has waited for longer than the target's oldest request."""
    return context.oldest_waiting >= max(context.oldest_waits.values(), default=context.oldest_waiting)


_RESERVE = 1.5
"""What is kept of a request's time limit for the switch to its model and the drain before it, in costs of the switch."""


def turn_ends_at(context: PolicyContext, quantum: float, linger: float, request_timeout: float | None) -> float:
    """When the active model's turn is over for the target's sake, on the clock of `context.now`, as things stand.

    That is when it has been active for `quantum` times the estimated cost of the switch, or idle for `linger` seconds; and in
    any case in time for the target's oldest request, if that gives up after `request_timeout` seconds.
    """
    if context.active_model is None:
        return context.now
    cost = context.switch_cost(context.active_model, context.target_model)
    end = min(context.active_since + quantum * cost, idle_ends_at(context, linger))
    if request_timeout is None:
        return end
    return min(end, context.now + request_timeout - _RESERVE * cost - context.oldest_waiting)


def idle_ends_at(context: PolicyContext, linger: float) -> float:
    """When the active model will have been idle for `linger` seconds if nothing comes for it; infinity if it is busy."""
    if context.active_in_flight:
        return float("inf")
    return context.now if context.idle_for >= linger else context.now + (linger - context.idle_for)


def decide_at(time: float, now: float) -> PolicyDecision:
    """`SwitchNow` from `time` on, `Stay` before it."""
    return SwitchNow() if time <= now else Stay(until=time)
