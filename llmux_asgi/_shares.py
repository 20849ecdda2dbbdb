"""How the time was spent: serving, switching or idle. Pure: time is passed in."""

from __future__ import annotations

from ._state import Mode, Phase, SwitcherState

__all__ = ["TimeShares"]


class TimeShares:
    """Adds up the seconds since `now`. Told whenever the state may have changed from one of the three to another.

    `switching` is from the drain on, when new requests of the outgoing model have to wait, until the switch is over. Else it
    is `serving` while the active model has requests in flight, and `idle` while there is none.
    """

    def __init__(self, state: SwitcherState, now: float) -> None:
        self._state = state
        self._since = now
        self._seconds = {"serving": 0.0, "switching": 0.0, "idle": 0.0}
        self._share = "idle"
        self.idle = True
        """Whether the pool is idle: the next request that is admitted has to be told."""

    def note(self, now: float) -> None:
        """Count the time until `now`, and look how it is spent from now on."""
        self._seconds[self._share] += now - self._since
        self._since = now
        state = self._state
        if state.mode is Mode.SWITCHING and state.phase is not Phase.COOLDOWN:
            self._share = "switching"
        else:
            self._share = "serving" if state.in_flight(state.active) else "idle"
        self.idle = self._share == "idle"

    def seconds(self, now: float) -> dict[str, float]:
        """Return the seconds of each, until `now`."""
        return {**self._seconds, self._share: self._seconds[self._share] + now - self._since}
