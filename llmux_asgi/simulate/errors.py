"""What the simulator raises on purpose."""

from __future__ import annotations

from ..exceptions import LLMuxError

__all__ = ["SimulationError"]


class SimulationError(LLMuxError):
    """The load, the trace or the policy cannot be simulated; the message says why."""
