"""How the time was spent: serving, switching or idle. Pure: time is passed in."""

from __future__ import annotations

from ._state import Mode, Phase, SwitcherState

__all__ = ["TimeShares"]


class TimeShares:
    """Adds up the seconds since `now`. Told whenever the state may have changed from one of the three to another.

    `switching` is from the drain on, when new requests of the outgoing model have to wait, until the switch is over. Else it
    is `serving` while the active model has requests in flight, and `idle` while there is none.
    """

    __slots__ = ("_idle", "_serving", "_since", "_state", "_switching", "idle", "switching")

    def __init__(self, state: SwitcherState, now: float) -> None:
        self._state = state
        self._since = now
        self._serving = self._switching = self._idle = 0.0
        self.idle = True
        """Whether the pool is idle: the next request that is admitted has to be told."""
        self.switching = False

    def note(self, now: float) -> None:
        """Count the time until `now`, and look how it is spent from now on."""
        self._count(now)
        state = self._state
        self.switching = state.mode is Mode.SWITCHING and state.phase is not Phase.COOLDOWN
        self.idle = not self.switching and not state.in_flight(state.active)

    def begin_to_serve(self, now: float) -> None:
        """The first request was admitted while the pool was idle. What `note` does, and cheaper."""
        self._idle += now - self._since
        self._since = now
        self.idle = False

    def served_the_last(self, now: float) -> None:
        """The active model's last running request is over. What `note` does, and cheaper."""
        if not self.switching:
            self._serving += now - self._since
            self._since = now
            self.idle = True

    def _count(self, now: float) -> None:
        passed, self._since = now - self._since, now
        if self.switching:
            self._switching += passed
        elif self.idle:
            self._idle += passed
        else:
            self._serving += passed

    def seconds(self, now: float) -> dict[str, float]:
        """Return the seconds of each, until `now`."""
        self._count(now)
        return {"serving": self._serving, "switching": self._switching, "idle": self._idle}
