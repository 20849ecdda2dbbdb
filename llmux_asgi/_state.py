"""The switcher's state machine and its counts. Pure: no I/O, no event loop, time is passed in.

                     adopt                    begin                       commit       wake     ready
    UNKNOWN ───────────────▶ IDLE / ACTIVE ──────────▶ SWITCHING: COOLDOWN ▶ DRAIN ▶ SLEEP ▶ WAKE ▶ READY
       ▲                        ▲   │    ▲                            │       │               ▲     │
       │        distrust        │   │    └────────── abandon ─────────┴───────┘               └─────┤ wake_up
       ├────────────────────────┼───┘                                                               │
       │                        └──────────────────────── complete ─────────────────────────────────┘
       └─────────────────────────────────────── fail (from any phase)

Requests are admitted while their model is active; during COOLDOWN the outgoing model goes on admitting, from DRAIN on the
gate is closed. `commit` is the point of no return: it is refused when nobody waits for the target any more.

A doubt (`distrust`) that comes up while the servers are asked, or before the point of no return, closes the gate too and
leads back to UNKNOWN: what was verified before it does not count. `wake` and `complete` are verified after it.

`wake_up` begins each attempt to wake the target, the first one too. One that has failed may have come as far as READY.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ._estimates import ModelCosts

__all__ = ["Mode", "Phase", "SwitcherState", "SwitcherStatistics", "Ticket", "TicketStatus"]


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


class TicketStatus(enum.Enum):
    """What became of a waiting request."""

    WAITING = "waiting"
    GRANTED = "granted"
    REFUSED = "refused"
    LEFT = "left"


class Ticket:
    """A request's place in the queue of its model."""

    __slots__ = ("model", "since", "status")

    def __init__(self, model: str, since: float) -> None:
        self.model = model
        self.since = since
        self.status = TicketStatus.WAITING


@dataclass(frozen=True, slots=True)
class SwitcherStatistics:
    """A snapshot of a switcher. Nothing in it changes any more."""

    mode: Mode
    active_model: str | None
    """The model that serves, or that is on its way out while switching."""
    target_model: str | None
    """The model that is being switched to."""
    phase: Phase | None
    in_flight: Mapping[str, int]
    """Leases held, by model."""
    waiting: Mapping[str, int]
    """Requests queued, by model."""
    switches: int
    """Switches completed."""
    abandoned: int
    """Switches given up before the point of no return, or before the wake, because nobody waited any more."""
    failures: int
    """Switches that failed."""
    servers: Mapping[str, str] = field(default_factory=dict)
    """What each model's server was last known to be: `awake`, `asleep`, `stopped`, `unreachable` or `unknown`."""
    costs: Mapping[str, ModelCosts] = field(default_factory=dict)
    """What putting each model to sleep and waking it is estimated to take, at its sleep level."""


class SwitcherState:
    """Who is awake, who is being served, who waits. Every method is one atomic step."""

    def __init__(self, models: Iterable[str]) -> None:
        self.mode = Mode.UNKNOWN
        self.active: str | None = None
        self.target: str | None = None
        self.phase: Phase | None = None
        self.active_since = float("-inf")
        """When the active model became active; minus infinity if that is not known."""
        self.queued_at_activation = 0
        """How many tickets were granted when it did."""
        self._idle_since = float("-inf")
        self._doubted = False
        self._in_flight = dict.fromkeys(models, 0)
        self._last_active: dict[str, None] = {}
        # Tickets in order of arrival. One in the middle leaves in O(1), and the first is found in O(1) however many have left
        # before it: a plain dict would walk over the places that they have had.
        self._queues: dict[str, OrderedDict[Ticket, None]] = {model: OrderedDict() for model in self._in_flight}
        # The sum of each queue's times of arrival, so that the sum of its waits is known without a walk through it.
        self._arrivals = dict.fromkeys(self._in_flight, 0.0)
        self._switches = self._abandoned = self._failures = 0

    # Requests

    def admits(self, model: str) -> bool:
        """Say whether a request for `model` may go to its server now."""
        serving = self.mode is Mode.ACTIVE or (self.phase is Phase.COOLDOWN and not self._doubted)
        return serving and self.active == model

    def try_admit(self, model: str) -> bool:
        """Count a request in, if its model admits."""
        if not self.admits(model):
            return False
        self._in_flight[model] += 1
        return True

    def enqueue(self, ticket: Ticket) -> None:
        """Put a request at the end of its model's queue."""
        _require(not self.admits(ticket.model) and ticket.status is TicketStatus.WAITING)
        self._queues[ticket.model][ticket] = None
        self._arrivals[ticket.model] += ticket.since

    def leave(self, ticket: Ticket) -> None:
        """Take a waiting request out of its queue: from now on it counts nowhere."""
        _require(ticket.status is TicketStatus.WAITING)
        del self._queues[ticket.model][ticket]
        # Set back when it is empty, so that what rounding leaves does not add up.
        self._arrivals[ticket.model] = self._arrivals[ticket.model] - ticket.since if self._queues[ticket.model] else 0.0
        ticket.status = TicketStatus.LEFT

    def refuse(self, model: str) -> list[Ticket]:
        """Empty a model's queue; the tickets are refused."""
        return self._empty(model, TicketStatus.REFUSED)

    def release(self, model: str, now: float) -> bool:
        """Count a request out. Returns whether it was the model's last."""
        _require(self._in_flight[model] > 0)
        self._in_flight[model] -= 1
        if self._in_flight[model]:
            return False
        if model == self.active:
            self._idle_since = now
        return True

    def in_flight(self, model: str | None) -> int:
        """How many requests `model` is serving."""
        return self._in_flight[model] if model is not None else 0

    def idle_for(self, now: float) -> float:
        """For how many seconds the active model has served nobody: 0.0 if it serves or none is active."""
        return now - self._idle_since if self.active is not None and not self._in_flight[self.active] else 0.0

    def depth(self, model: str) -> int:
        """How many requests wait for `model`."""
        return len(self._queues[model])

    def oldest(self, model: str) -> Ticket:
        """The request that has waited longest for `model`. There must be one."""
        return next(iter(self._queues[model]))

    def total_wait(self, model: str, now: float) -> float:
        """The sum of the times in seconds that the requests in the queue of `model` have waited."""
        return max(0.0, len(self._queues[model]) * now - self._arrivals[model])

    def waiters(self, model: str) -> tuple[Ticket, ...]:
        """Those who wait for `model`, in order of arrival."""
        return tuple(self._queues[model])

    def waiting_models(self) -> list[str]:
        """The models with waiting requests, the one that has waited longest first."""
        return sorted((m for m, queue in self._queues.items() if queue), key=lambda m: self.oldest(m).since)

    def by_use(self, models: Iterable[str]) -> list[str]:
        """Sort `models` by when they were active last, the latest first; those that never were keep their order."""
        order = {model: position for position, model in enumerate(self._last_active)}
        return sorted(models, key=lambda model: order.get(model, -1), reverse=True)

    # Transitions

    def inquire(self) -> None:
        """Begin to ask the servers: doubts that come up from now on count."""
        _require(self.mode is Mode.UNKNOWN)
        self._doubted = False

    def adopt(self, model: str | None) -> list[Ticket]:
        """Take over what the servers say: `model` (or none) is awake. Returns the tickets that this grants."""
        _require(self.mode is Mode.UNKNOWN)
        if model != self.active:
            # How long it has been awake is not known: no cooldown is owed for it.
            self._activate(model, float("-inf"))
        return self._settle()

    def distrust(self) -> None:
        """Forget what was verified: the servers must be asked again before the next request is admitted."""
        if self.mode in (Mode.IDLE, Mode.ACTIVE):
            self.mode = Mode.UNKNOWN
        else:
            self._doubted = True

    def begin(self, target: str) -> None:
        """Start a switch. The active model goes on admitting."""
        _require(self.mode in (Mode.IDLE, Mode.ACTIVE) and target != self.active and self.depth(target) > 0)
        self.mode, self.target, self.phase = Mode.SWITCHING, target, Phase.COOLDOWN

    def drain(self) -> None:
        """Close the gate of the outgoing model."""
        self._step(Phase.COOLDOWN, Phase.DRAIN)

    def commit(self) -> bool:
        """Pass the point of no return, unless nobody waits for the target any more. Returns whether it was passed."""
        _require(self.phase is Phase.DRAIN and self.target is not None)
        if self.target is None or not self.depth(self.target):
            return False
        self._step(Phase.DRAIN, Phase.SLEEP)
        return True

    def wake(self) -> None:
        """Every other model is confirmed out of memory; the target's wake may be sent."""
        self._step(Phase.SLEEP, Phase.WAKE)
        self._activate(None, float("-inf"))
        self._doubted = False

    def wake_up(self) -> None:
        """The target's wake is sent: for the first time, or again because the one before has failed."""
        _require(self.phase in (Phase.WAKE, Phase.READY))
        self.phase = Phase.WAKE

    def ready(self) -> None:
        """The target's server says that it is awake."""
        self._step(Phase.WAKE, Phase.READY)

    def complete(self, now: float) -> list[Ticket]:
        """The target serves. Grants everyone who waits for it, in the same step; returns their tickets."""
        _require(self.phase is Phase.READY and self.target is not None)
        self._activate(self.target, now)
        self._doubted = False
        self._switches += 1
        return self._settle()

    def abandon(self) -> list[Ticket]:
        """Nobody waits for the target any more. Returns the tickets that this grants.

        Before `commit` the outgoing model goes on serving; after `wake` (it is confirmed asleep) the pool is idle.
        """
        _require(self.phase in (Phase.COOLDOWN, Phase.DRAIN, Phase.WAKE))
        self._abandoned += 1
        return self._settle()

    def fail(self) -> list[Ticket]:
        """The switch failed. Returns the tickets that this grants.

        Before `commit` nothing has changed and the outgoing model goes on serving; later the servers must be asked.
        """
        _require(self.mode is Mode.SWITCHING)
        self._failures += 1
        if self.phase in (Phase.COOLDOWN, Phase.DRAIN):
            return self._settle()
        self.mode, self.target, self.phase = Mode.UNKNOWN, None, None
        return []

    def snapshot(self) -> SwitcherStatistics:
        """Return the numbers as they are now."""
        return SwitcherStatistics(
            mode=self.mode,
            active_model=self.active,
            target_model=self.target,
            phase=self.phase,
            in_flight=MappingProxyType(dict(self._in_flight)),
            waiting=MappingProxyType({model: len(queue) for model, queue in self._queues.items()}),
            switches=self._switches,
            abandoned=self._abandoned,
            failures=self._failures,
        )

    def describe(self) -> str:
        """What the pool is doing, in words for an error message."""
        if self.mode is Mode.SWITCHING and self.phase is not None:
            origin = f" from {self.active!r} ({self.in_flight(self.active)} in flight)" if self.active else ""
            return f"the gateway is switching to {self.target!r}{origin}, in the phase {self.phase.value!r}"
        if self.mode is Mode.ACTIVE:
            return f"the model {self.active!r} is active with {self.in_flight(self.active)} requests in flight"
        return "no model is awake" if self.mode is Mode.IDLE else "the servers' states are not known yet"

    def _step(self, before: Phase, after: Phase) -> None:
        _require(self.phase is before)
        self.phase = after

    def _activate(self, model: str | None, since: float) -> None:
        self.active, self.active_since, self._idle_since = model, since, since
        self.queued_at_activation = self.depth(model) if model is not None else 0

    def _settle(self) -> list[Ticket]:
        self.target = self.phase = None
        if self._doubted:
            self.mode = Mode.UNKNOWN
            return []
        if self.active is None:
            self.mode = Mode.IDLE
            return []
        self.mode = Mode.ACTIVE
        self._last_active.pop(self.active, None)
        self._last_active[self.active] = None
        return self._grant(self.active)

    def _grant(self, model: str) -> list[Ticket]:
        granted = self._empty(model, TicketStatus.GRANTED)
        self._in_flight[model] += len(granted)
        return granted

    def _empty(self, model: str, status: TicketStatus) -> list[Ticket]:
        tickets = list(self._queues[model])
        self._queues[model].clear()
        self._arrivals[model] = 0.0
        for ticket in tickets:
            ticket.status = status
        return tickets


def _require(condition: bool) -> None:
    if not condition:
        raise RuntimeError("illegal transition of the switcher's state: please report this as a bug of llmux_asgi")
