"""As few switches as a cap on the waits allows."""

from __future__ import annotations

from ..config import DrainMode
from ._base import DrainingPolicy, decide_at, has_waited_longest, idle_ends_at, reached_at
from ._vocabulary import PolicyContext, PolicyDecision, Stay, SwitchNow

__all__ = ["ThroughputPolicy"]


class ThroughputPolicy(DrainingPolicy):
    """Stay with the active model until it is idle, or until somebody has waited for `max_wait`; the longest wait is next.

    Rule: leave the active model i for j, the model whose oldest request has waited longest, as soon as

    - i has served nobody for `linger` seconds, or
    - that request has waited for `max_wait` seconds, and for the largest head start that i serves on top of that.

    It makes the fewest switches, for work that has time: batches, evaluations at night. Choose `max_wait` large against a whole
    round, N·(D + C): with less, a round takes longer than `max_wait` under full load, every turn is cut short, and it
    behaves as FIFO does. Keep it well below `request_timeout`, else requests give up before their turn.

    Bound on a wait, with N models, the largest switch cost C, the longest drain D (`drain_timeout`, else the longest running
    answer) and min_active_duration m:

        max_wait + N·(m + D + C)

    for once a request has waited for `max_wait`, only those that came before it can pass: the turn under way, N - 2 more at
    most, then its own. A switch that fails, with its back-off, comes on top.

    With priorities, H being the largest head start and h the request's own: that, plus H - h. The head start counts in the wait
    and for the active model alike, so that requests of one class leave each other's turns alone.

    Source: exhaustive service in polling systems (Takagi, *Analysis of Polling Systems*, 1986), which is the rule that wastes
    the least time on switching and, without a cap, lets a busy model starve the rest.
    """

    def __init__(
        self,
        *,
        linger: float = 0.5,
        max_wait: float = 30.0,
        sleep_level: int = 1,
        request_timeout: float | None = 60.0,
        min_active_duration: float = 0.0,
        drain: DrainMode | bool = "wait",
        drain_timeout: float | None = None,
        max_freezes: int = 16,
        max_frozen: float = 300.0,
    ) -> None:
        """Take `linger` and `max_wait` in seconds, and the settings of the `policy` section that each policy has."""
        super().__init__(
            sleep_level=sleep_level,
            request_timeout=request_timeout,
            min_active_duration=min_active_duration,
            drain=drain,
            drain_timeout=drain_timeout,
            max_freezes=max_freezes,
            max_frozen=max_frozen,
        )
        self.linger = linger
        self.max_wait = max_wait

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """`SwitchNow` if the active model is idle or the cap is reached, for the model that has waited longest; else `Stay`."""
        if not has_waited_longest(context):
            return Stay()
        if context.active_model is None:
            return SwitchNow()
        cap = reached_at(context, self.linger, lambda served: context.now + (self.max_wait + served - context.oldest_waiting))
        return decide_at(min(cap, idle_ends_at(context, self.linger)), context.now)

    def expected_turn(self, switch_cost: float) -> float:
        """At most as long as the longest wait may become."""
        return max(self.max_wait, self.min_active_duration)
