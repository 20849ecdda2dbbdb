"""What is noted of each switch: its entries in the journal, the spans of its phases, what is under way now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ._journal import Journal
from ._statistics import Phase, SwitchStatus
from .telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.util.types import Attributes

__all__ = ["SwitchRecords"]


@dataclass(slots=True)
class _Record:
    status: SwitchStatus
    begun: float
    phases: dict[str, float] = field(default_factory=dict)


class SwitchRecords:
    """Notes one switch after the other. `clock` gives monotonic seconds."""

    def __init__(self, journal: Journal, telemetry: Telemetry, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._telemetry = telemetry
        self._clock = clock
        self._record: _Record | None = None
        self._count = 0

    @property
    def under_way(self) -> SwitchStatus | None:
        """The present switch, if there is one."""
        return self._record.status if self._record is not None else None

    @property
    def elapsed(self) -> float:
        """For how many seconds the present switch has been under way; 0.0: there is none."""
        return self._clock() - self._record.begun if self._record is not None else 0.0

    def begin(self, origin: str | None, to: str | None, *, waiting: int, in_flight: int) -> None:
        """A switch has begun."""
        self._count += 1
        data: dict[str, object] = {"switch": self._count, "from": origin, "to": to, "waiting": waiting, "in_flight": in_flight}
        now = self._journal.write("switch", **data).time
        self._record = _Record(SwitchStatus(self._count, origin, to, now, Phase.COOLDOWN, now), self._clock())

    @contextmanager
    def phase(self, phase: Phase, model: str | None, attributes: Attributes = None) -> Iterator[None]:
        """While in the block, the switch is in this phase, which concerns `model`; with none there is nothing to do in it."""
        record, begun = self._record, self._clock()
        if record is not None:
            now = self._journal.clock()
            if model is not None:
                now = self._journal.write("phase", switch=record.status.number, phase=phase.value, model=model).time
            record.status = replace(record.status, phase=phase, phase_since=now)
        try:
            with self._telemetry.phase(phase.value, attributes):
                yield
        finally:
            if record is not None and model is not None:
                duration = self._clock() - begun
                record.phases[phase.value] = record.phases.get(phase.value, 0.0) + duration
                self._telemetry.phase_took(phase.value, model, duration)

    def end(self, outcome: str, *, served: int = 0, longest_wait: float | None = None) -> float:
        """The switch is over: `completed`, `abandoned` or `failed`. Returns how many seconds it took."""
        record, self._record = self._record, None
        if record is None:
            return 0.0
        duration, status = self._clock() - record.begun, record.status
        data: dict[str, object] = {
            "switch": status.number,
            "from": status.from_model,
            "to": status.to_model,
            "outcome": outcome,
        }
        data |= {"duration": duration, "phases": record.phases, "served": served, "longest_wait": longest_wait}
        self._journal.write("switched", **data)
        return duration
