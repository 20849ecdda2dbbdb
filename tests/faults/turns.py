"""A policy that preempts and leaves the turns to the test."""

from __future__ import annotations

from llmux_asgi import FifoPolicy, PolicyContext, PolicyDecision, Stay, SwitchNow

__all__ = ["Turns"]

_ASK_AGAIN = 0.02


class Turns(FifoPolicy):
    """First come, first served; if `turn` is set, only that model may be switched to."""

    turn: str | None = None

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        return SwitchNow() if self.turn in (None, context.target_model) else Stay(context.now + _ASK_AGAIN)
