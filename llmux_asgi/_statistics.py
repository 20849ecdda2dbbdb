"""What a switcher tells of itself. Pure: plain values, the times passed in."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from ._estimates import ModelCosts

__all__ = ["ErrorRecord", "Mode", "Phase", "SwitchStatus", "SwitcherStatistics"]


class Mode(enum.Enum):
    """What the pool is doing."""

    UNKNOWN = "unknown"
    """Nothing is verified: at start, after a failure. The servers must be asked before anything is admitted."""
    IDLE = "idle"
    """No model is awake."""
    ACTIVE = "active"
    """One model is awake and serves."""
    SWITCHING = "switching"
    """On the way from one model (or none) to another."""


class Phase(enum.Enum):
    """How far a switch has come."""

    COOLDOWN = "cooldown"
    """The outgoing model has not been active for long enough: it goes on serving."""
    DRAIN = "drain"
    """The outgoing model's requests finish; new ones wait for its next turn."""
    SLEEP = "sleep"
    """Past the point of no return: the outgoing model is put to sleep."""
    WAKE = "wake"
    """The target is waking. Everything else is confirmed out of memory."""
    READY = "ready"
    """The target is awake as far as its server says, and being probed."""


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """Something that went wrong, addresses of servers left out."""

    time: float
    """Unix time in seconds."""
    model: str | None
    kind: str
    """The name of the exception's class."""
    message: str


@dataclass(frozen=True, slots=True)
class SwitchStatus:
    """The switch that is under way. Times are Unix times in seconds."""

    number: int
    from_model: str | None
    to_model: str | None
    """`None`: the model is put to sleep, and no other is woken."""
    since: float
    phase: Phase
    phase_since: float


@dataclass(frozen=True, slots=True)
class SwitcherStatistics:
    """A snapshot of a switcher. Nothing in it changes any more."""

    mode: Mode
    active_model: str | None
    """The model that serves, or that is on its way out while switching."""
    target_model: str | None
    """The model that is being switched to; `None` too while one is put to sleep for no other."""
    phase: Phase | None
    in_flight: Mapping[str, int]
    """Leases held, by model."""
    waiting: Mapping[str, int]
    """Requests queued, by model."""
    frozen: Mapping[str, int]
    """Requests that a switch has stopped in the middle and that go on at their model's next turn, by model."""
    switches: int
    """Switches completed; to put a model to sleep for no other is one too."""
    abandoned: int
    """Switches given up before the point of no return, or before the wake, because nobody waited any more."""
    failures: int
    """Switches that failed."""
    servers: Mapping[str, str] = field(default_factory=dict)
    """What each model's server was last known to be: `awake`, `asleep`, `stopped`, `unreachable` or `unknown`."""
    costs: Mapping[str, ModelCosts] = field(default_factory=dict)
    """What putting each model to sleep and waking it is estimated to take, at its sleep level."""
    unsettled: tuple[str, ...] = ()
    """Models whose server is replaced or removed after a reload, and is not out of memory yet."""
    oldest_waits: Mapping[str, float] = field(default_factory=dict)
    """For how many seconds the first of those who wait for each model has waited, frozen ones since they were frozen. Models
    that nobody waits for are left out."""
    retry_in: Mapping[str, float] = field(default_factory=dict)
    """In how many seconds those models may be switched to again whose last switch failed."""
    pinned: str | None = None
    """The model that an operator keeps active."""
    draining: bool = False
    """Whether new requests are refused because an operator said so."""
    switch: SwitchStatus | None = None
    """The switch that is under way."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """For how many seconds since the start the pool was `serving`, `switching` (from the drain on) and `idle`."""
    errors: tuple[ErrorRecord, ...] = ()
    """The last 20 errors, the newest first."""
    last_errors: Mapping[str, ErrorRecord] = field(default_factory=dict)
    """The last error by model."""

    @property
    def at_rest(self) -> bool:
        """Whether nothing is in flight, nothing waits and nothing is frozen."""
        return not any(any(counts.values()) for counts in (self.in_flight, self.waiting, self.frozen))

    @property
    def drained(self) -> bool:
        """Whether new requests are refused and none is left: the gateway may be stopped, or its servers worked on."""
        return self.draining and self.at_rest
