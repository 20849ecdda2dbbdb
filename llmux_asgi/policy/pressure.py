"""Turns as with the gated quantum; next is where a switch relieves most waiting for its cost."""

from __future__ import annotations

from ..config import DrainMode
from ._base import DrainingPolicy, decide_at, turn_ends_at
from ._vocabulary import PolicyContext, PolicyDecision, Stay

__all__ = ["PressurePolicy"]


class PressurePolicy(DrainingPolicy):
    """Leave as `GatedQuantumPolicy` does; next is the model with the most waiting for the cost of the switch to it.

    Rule: next is the model j with the largest pressure W_j / (Ĉ(i→j) + 1 s), W_j being the sum of the times that its requests
    have waited. A model whose oldest request has waited for `max_wait` seconds comes before that; the longest wait first. The
    active model i is left for j as soon as it has served nobody for `linger` seconds, has been active for κ·Ĉ(i→j) seconds, or
    the oldest request for j has 1.5·Ĉ(i→j) seconds left until `request_timeout`.

    Its mean wait is the best where queues differ much in length; a lone request waits longer than under the gated quantum. With
    two models there is no choice to make, and the two policies are the same.

    Bound on a wait, with N models, the largest switch cost C (estimated or real), the longest drain D, and
    min_active_duration m:

        max_wait + N·(max(κ·C, m) + D + C)

    for once a request has waited for `max_wait`, only those that came before it can pass: the turn under way, N - 2 more at
    most, then its own. A switch that fails, with its back-off, comes on top.

    With priorities, H being the largest head start and h the request's own, it is

        max(max_wait, H) - h + N·(max(κ·C, m) + D + C)

    Head starts count in W_j and for `max_wait`: keep them below it, else whoever has one comes before all that is weighed. A
    turn ends sooner across classes as it does under `GatedQuantumPolicy`.

    Source: max-weight scheduling (Tassiulas and Ephremides, 1992) with waiting times for weights, divided by the switchover
    time so that dear switches need more to be worth it; `max_wait` bounds what max-weight alone does not.
    """

    def __init__(
        self,
        *,
        quantum: float = 4.0,
        linger: float = 0.5,
        max_wait: float = 30.0,
        base: float = 1.0,
        sleep_level: int = 1,
        request_timeout: float | None = 60.0,
        min_active_duration: float = 0.0,
        drain: DrainMode | bool = "wait",
        drain_timeout: float | None = None,
        max_freezes: int = 16,
        max_frozen: float = 300.0,
    ) -> None:
        """Take κ (a factor), `linger` and `max_wait` in seconds, and the settings of the `policy` section.

        `base` is the 1 s of the rule: what each switch is taken to cost beside its estimate. It belongs to the rule and not to
        the configuration; where all times are scaled, as in a benchmark, it is scaled too.
        """
        super().__init__(
            sleep_level=sleep_level,
            request_timeout=request_timeout,
            min_active_duration=min_active_duration,
            drain=drain,
            drain_timeout=drain_timeout,
            max_freezes=max_freezes,
            max_frozen=max_frozen,
        )
        self.quantum = quantum
        self.linger = linger
        self.max_wait = max_wait
        self.base = base

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """`SwitchNow` once the turn is over, for the model with the largest pressure; else `Stay`."""
        end = turn_ends_at(context, self.quantum, self.linger, self.request_timeout)
        if self._next(context) == context.target_model:
            return decide_at(end, context.now)
        # By then it may have the largest pressure.
        return Stay(until=end) if end > context.now else Stay()

    def expected_turn(self, switch_cost: float) -> float:
        """Return κ·`switch_cost`, at least `min_active_duration`."""
        return max(self.quantum * switch_cost, self.min_active_duration)

    def _next(self, context: PolicyContext) -> str:
        """The model whose turn is next. Of equals the one that has waited longest: it comes first in the context."""
        oldest = next(iter(context.oldest_waits), context.target_model)
        if context.oldest_waits.get(oldest, context.oldest_waiting) >= self.max_wait:
            return oldest
        return max(
            context.total_waits,
            key=lambda model: context.total_waits[model] / (context.switch_cost(context.active_model, model) + self.base),
            default=context.target_model,
        )
