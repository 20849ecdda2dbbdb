"""What is asked of the gateway: requests that come by the clock, and those that come when others are answered.

The same objects are simulated here and replayed against a real gateway by `make bench-scheduling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Arrival", "Script", "Workload"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. It comes `offset` seconds after its round has begun and runs for `service` seconds once it is admitted."""

    offset: float
    model: str
    service: float
    priority: str | None = None
    """Its priority class; `None`: that of its model, if it has one."""


@dataclass(frozen=True, slots=True)
class Script:
    """A client: rounds of requests, one after the other.

    The first round begins at `start`; each later one `pause` seconds after the last request of the one before is answered.
    An open load, a trace for one, is a single round; a closed loop has rounds of one request.
    """

    rounds: Sequence[Sequence[Arrival]]
    start: float = 0.0
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Scripts that run side by side. Times are in seconds from the beginning."""

    name: str
    scripts: Sequence[Script]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are asked for, in order of their first mention."""
        return tuple(dict.fromkeys(arrival.model for arrival in self._arrivals()))

    @property
    def priorities(self) -> tuple[str, ...]:
        """The priority classes that are asked for, in order of their first mention."""
        return tuple(dict.fromkeys(arrival.priority for arrival in self._arrivals() if arrival.priority is not None))

    @property
    def size(self) -> int:
        """The number of requests."""
        return sum(1 for _ in self._arrivals())

    def _arrivals(self) -> Iterable[Arrival]:
        return (arrival for script in self.scripts for part in script.rounds for arrival in part)
