"""When to leave the active model, and for which: the policy seam.

A policy is pure: it is shown a `PolicyContext` and answers at once, without I/O and without waiting. The switcher asks it
for each model that has waiting requests, the one that has waited longest first: *shall we switch to it?*

    SwitchNow()         the switch begins
    Stay(until)         not now: it asks again at that time at the latest, and whenever something changes
    Defer(awaitable)    the switch begins when the awaitable is done, without asking again, if somebody still waits for
                        the model by then; one deferral a model at a time, cancelled when it has become pointless

Write your own by subclassing `SwitchPolicy`:

    class NightShift(SwitchPolicy):
        def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
            if context.active_in_flight == 0 or context.oldest_waiting > 10.0:
                return SwitchNow()
            return Stay(until=context.now + 10.0 - context.oldest_waiting)
"""

from __future__ import annotations

from ._build import build_policy
from ._vocabulary import Defer, PolicyContext, PolicyDecision, Stay, SwitchContext, SwitchNow, SwitchPolicy
from .fifo import FifoPolicy
from .gated_quantum import GatedQuantumPolicy
from .pressure import PressurePolicy
from .throughput import ThroughputPolicy

__all__ = [
    "Defer",
    "FifoPolicy",
    "GatedQuantumPolicy",
    "PolicyContext",
    "PolicyDecision",
    "PressurePolicy",
    "Stay",
    "SwitchContext",
    "SwitchNow",
    "SwitchPolicy",
    "ThroughputPolicy",
    "build_policy",
]
