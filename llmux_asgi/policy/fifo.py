"""First come, first served, model by model."""

from __future__ import annotations

from ..config import DrainMode
from ._base import DrainingPolicy
from ._vocabulary import PolicyContext, PolicyDecision, SwitchNow

__all__ = ["FifoPolicy"]


class FifoPolicy(DrainingPolicy):
    """Switch to whichever model has waited longest, as soon as `min_active_duration` allows.

    Bound on a wait, with N models, switch cost C (sleep + wake, seconds), drain deadline D and min_active_duration M:
    (N - 1) * (M + D + C) + M + D + C. Without `drain_timeout` D is the longest running answer.

    With priorities, H being the largest head start and h the request's own: that, plus H - h. Only those that come within
    H - h seconds after it can pass it.

    It is simple and fair between models, and it thrashes when requests for several models alternate.
    """

    def __init__(
        self,
        *,
        sleep_level: int = 1,
        request_timeout: float | None = 60.0,
        min_active_duration: float = 5.0,
        drain: DrainMode | bool = "wait",
        drain_timeout: float | None = None,
        max_freezes: int = 16,
        max_frozen: float = 300.0,
    ) -> None:
        """Take the settings of the `policy` section that each policy has."""
        super().__init__(
            sleep_level=sleep_level,
            request_timeout=request_timeout,
            min_active_duration=min_active_duration,
            drain=drain,
            drain_timeout=drain_timeout,
            max_freezes=max_freezes,
            max_frozen=max_frozen,
        )

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """Always `SwitchNow`: the switcher asks for the model that has waited longest first."""
        return SwitchNow()
