"""What the ledger of the simulated GPU says about the gateway, once the soak is over."""

from __future__ import annotations

from collections.abc import Sequence

from llmux_asgi.sim import GpuEvent
from tests.soak.fleet import HandCall

__all__ = ["audit"]

_TOLD = 12
"""Events that are told with a violation, the last one first."""

_LATE = 1.0
"""Seconds after its end in which a call by hand may still take effect: a stopped server answers it late."""


def audit(events: Sequence[GpuEvent], by_hand: Sequence[HandCall]) -> list[str]:
    """List what must not have happened: two models in memory, a request on a sleeping server. What a hand did is excused."""
    violations = []
    since: dict[str, float] = {}  # model → when it was first seen in memory, of those that are
    slept_by_hand: dict[int, float] = {}  # process → when it was told by hand to sleep, until it is awake again
    wakes = [call for call in by_hand if call.path == "/wake_up"]
    sleeps = [call for call in by_hand if call.path != "/wake_up"]
    for index, event in enumerate(events):
        since = {model: since.get(model, event.at) for model in event.awake}
        ours = [model for model in event.awake if not _caused(model, since[model], wakes)]
        if len(ours) > 1:
            told = " < ".join(_tell(each) for each in reversed(events[max(0, index - _TOLD) : index + 1]))
            violations.append(f"{ours} are in memory at once: {told}")
        if event.event == "wake_end":
            slept_by_hand.pop(event.pid, None)
        if _caused(event.model, event.at, sleeps):
            slept_by_hand[event.pid] = event.at
        if event.event == "request_while_asleep" and event.pid not in slept_by_hand:
            violations.append(f"a request reached a sleeping server: {event}")
    return violations


def _tell(event: GpuEvent) -> str:
    return f"{event.at:.3f} {event.event} of {event.model} ({event.pid}) {event.awake} {event.detail}"


def _caused(model: str, at: float, calls: Sequence[HandCall]) -> bool:
    return any(call.model == model and call.begun <= at <= call.ended + _LATE for call in calls)
