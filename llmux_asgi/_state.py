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

A switch may have no target: its model is put to sleep, and no other is woken (`slept` leads from SLEEP to IDLE).

Requests that were running when their model was put to sleep, and that its server keeps (`freeze`), are counted apart from
those in flight. They wait for their model's next turn as those in its queue do, since the time of the freeze.

A model whose server is to be replaced is shut (`shut`): who is in its queue waits for the new server, and the old one only
finishes what it has begun. Only what is frozen there asks for a turn of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from ._queue import Ticket, TicketQueue, TicketStatus
from ._statistics import Mode, Phase, SwitcherStatistics

__all__ = ["Mode", "Phase", "SwitcherState", "SwitcherStatistics", "Ticket", "TicketStatus"]


class SwitcherState:
    """Who is awake, who is being served, who waits. Every method is one atomic step."""

    def __init__(self, models: Iterable[str]) -> None:
        self.mode = Mode.UNKNOWN
        self.active: str | None = None
        self.target: str | None = None
        self.phase: Phase | None = None
        self.pinned: str | None = None
        """The model that an operator keeps active once it is."""
        self.active_since = float("-inf")
        """When the active model became active; minus infinity if that is not known."""
        self.queued_at_activation = 0
        """How many requests were waiting for it then, all of which it serves from then on."""
        self._idle_since = float("-inf")
        self._doubted = False
        self._shut: set[str] = set()
        self._admitting: str | None = None
        """The active model, unless it is shut."""
        self._in_flight = dict.fromkeys(models, 0)
        self._frozen = dict.fromkeys(self._in_flight, 0)
        self._frozen_since = dict.fromkeys(self._in_flight, 0.0)
        self._last_active: dict[str, None] = {}
        self._queues = {model: TicketQueue() for model in self._in_flight}
        # By model and head start: the leases held. By head start: when the active model's last one was released.
        self._held: dict[str, dict[float, int]] = {model: {} for model in self._in_flight}
        self._served_until: dict[float, float] = {}
        self._switches = self._abandoned = self._failures = 0

    # Requests

    def admits(self, model: str) -> bool:
        """Say whether a request for `model` may go to its server now."""
        serving = self.mode is Mode.ACTIVE or (self.phase is Phase.COOLDOWN and not self._doubted)
        return serving and self._admitting == model

    def try_admit(self, model: str, head_start: float = 0.0) -> bool:
        """Count a request in, if its model admits."""
        if not self.admits(model):
            return False
        self._in_flight[model] += 1
        self._hold(model, head_start)
        return True

    def enqueue(self, ticket: Ticket) -> None:
        """Put a request into its model's queue."""
        _require(not self.admits(ticket.model) and ticket.status is TicketStatus.WAITING)
        self._queues[ticket.model].add(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Take a waiting request out of its queue: from now on it counts nowhere."""
        _require(ticket.status is TicketStatus.WAITING)
        self._queues[ticket.model].remove(ticket)
        ticket.status = TicketStatus.LEFT

    def refuse(self, model: str) -> list[Ticket]:
        """Empty a model's queue; the tickets are refused."""
        return self._empty(model, TicketStatus.REFUSED)

    def release(self, model: str, now: float, head_start: float = 0.0) -> bool:
        """Count a request out that was counted in with this `head_start`. Returns whether it was the model's last."""
        _require(self._in_flight[model] > 0)
        self._in_flight[model] -= 1
        self._let_go(model, now, head_start)
        if self._in_flight[model]:
            return False
        if model == self.active:
            self._idle_since = now
        return True

    def release_frozen(self, model: str, now: float, head_start: float = 0.0) -> None:
        """Count a frozen request out."""
        _require(self._frozen[model] > 0)
        self._frozen[model] -= 1
        self._let_go(model, now, head_start)

    def in_flight(self, model: str | None) -> int:
        """How many requests `model` is serving."""
        return self._in_flight[model] if model is not None else 0

    def idle_for(self, now: float) -> float:
        """For how many seconds the active model has served nobody: 0.0 if it serves or none is active."""
        return now - self._idle_since if self.active is not None and not self._in_flight[self.active] else 0.0

    def served_until(self) -> dict[float, float]:
        """By head start, until when the active model has served requests of it in its turn; infinity if it does so now."""
        held = self._held[self.active] if self.active is not None else {}
        return {**self._served_until, **dict.fromkeys(held, math.inf)}

    def queued(self, model: str) -> int:
        """How many requests are in the queue of `model`."""
        return len(self._queues[model])

    @property
    def all_queued(self) -> int:
        """How many requests are in the queues of all models."""
        return sum(map(len, self._queues.values()))

    def frozen(self, model: str) -> int:
        """How many requests of `model` are frozen."""
        return self._frozen[model]

    def depth(self, model: str) -> int:
        """How many requests wait for a turn of `model`, in its queue or frozen. The queue of a shut one does not."""
        if model in self._shut or model not in self._queues:
            return self._frozen.get(model, 0)
        return len(self._queues[model]) + self._frozen[model]

    def waiting_since(self, model: str) -> float:
        """Since when the longest of the waits for `model` counts, head start included. There must be one."""
        frozen = self._frozen_since[model] - max(self._held[model]) if self._frozen[model] else math.inf
        return min(frozen, self._queues[model].counts_since) if self._queues[model] else frozen

    def queued_since(self, model: str) -> float:
        """When the first came of those that are in the queue of `model`; infinity if it is empty."""
        return self._queues[model].first_since if self._queues[model] else math.inf

    def total_wait(self, model: str, now: float) -> float:
        """The sum of the times in seconds that the requests for `model` have waited, head starts included."""
        queued = self._queues[model].total_wait(now)
        if not self._frozen[model]:
            return queued
        head_starts = sum(head_start * count for head_start, count in self._held[model].items())
        return queued + head_starts + self._frozen[model] * (now - self._frozen_since[model])

    def head_start(self, model: str) -> float:
        """The largest head start in seconds of those who wait for `model`."""
        queued = self._queues[model].head_start
        return max(queued, *self._held[model]) if self._frozen[model] else queued

    def first_waits(self, now: float) -> dict[str, float]:
        """For how many seconds the first of those who wait for each model has waited, head starts aside."""
        frozen = {model: since if self._frozen[model] else math.inf for model, since in self._frozen_since.items()}
        since = {
            model: min(self.queued_since(model), frozen[model])
            for model in self._queues
            if self._queues[model] or self._frozen[model]
        }
        return {model: now - each for model, each in since.items()}

    def waiters(self, model: str) -> tuple[Ticket, ...]:
        """Those in the queue of `model`, the longest wait first, head starts included."""
        return tuple(self._queues[model])

    def waiting_models(self) -> list[str]:
        """The models with waiting requests, the one that has waited longest first, head starts included."""
        return list(self.longest_waits())

    def longest_waits(self) -> dict[str, float]:
        """Since when the longest of the waits counts, by model, in the same order."""
        since = {model: self.waiting_since(model) for model in self._queues if self.depth(model)}
        return dict(sorted(since.items(), key=itemgetter(1))) if len(since) > 1 else since

    def by_use(self, models: Iterable[str]) -> list[str]:
        """Sort `models` by when they were active last, the latest first; those that never were keep their order."""
        order = {model: position for position, model in enumerate(self._last_active)}
        return sorted(models, key=lambda model: order.get(model, -1), reverse=True)

    # Models

    @property
    def models(self) -> tuple[str, ...]:
        """All that there are, those that are on their way out included."""
        return tuple(self._queues)

    def add(self, model: str) -> None:
        """Know a further model. It is shut: requests for it are queued, and it gets no turn."""
        _require(model not in self._queues)
        self._in_flight[model] = self._frozen[model] = 0
        self._frozen_since[model] = 0.0
        self._queues[model] = TicketQueue()
        self._held[model] = {}
        self._shut.add(model)

    def forget(self, model: str) -> None:
        """Know a model no longer. Nobody waits for it or is served by it."""
        _require(model != self.active and model != self.target)
        _require(not (self._in_flight[model] or self._frozen[model] or self._queues[model]))
        tables: tuple[dict[str, Any], ...] = (self._in_flight, self._frozen, self._frozen_since, self._queues, self._held)
        for table in tables:
            del table[model]
        self._last_active.pop(model, None)
        self._shut.discard(model)

    def shut(self, model: str) -> None:
        """Admit no request for `model` until `open`, and give it no turn for those in its queue."""
        self._shut.add(model)
        if model == self.active:
            self._admitting = None

    def is_shut(self, model: str) -> bool:
        """Say whether `shut` was called for `model`, or it was never opened."""
        return model in self._shut

    def open(self, model: str) -> list[Ticket]:
        """Undo `shut`. Returns the tickets that this grants."""
        self._shut.discard(model)
        if model != self.active:
            return []
        self._admitting = model
        return self._grant(model) if self.admits(model) else []

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

    @property
    def held(self) -> bool:
        """Whether the active model is pinned: it makes way for no other."""
        return self.pinned is not None and self.active == self.pinned

    @property
    def can_be_given_up(self) -> bool:
        """Whether a switch is under way that has not passed the point of no return."""
        return self.phase in (Phase.COOLDOWN, Phase.DRAIN)

    def begin(self, target: str | None) -> None:
        """Start a switch; to `None`: the active model is put to sleep. It goes on admitting."""
        _require(self.mode in (Mode.IDLE, Mode.ACTIVE) and target != self.active)
        _require(target is None or self.depth(target) > 0)
        self.mode, self.target, self.phase = Mode.SWITCHING, target, Phase.COOLDOWN

    def drain(self) -> None:
        """Close the gate of the outgoing model."""
        self._step(Phase.COOLDOWN, Phase.DRAIN)

    def commit(self) -> bool:
        """Pass the point of no return, unless nobody waits for the target any more. Returns whether it was passed."""
        _require(self.phase is Phase.DRAIN)
        if self.target is not None and not self.depth(self.target):
            return False
        self._step(Phase.DRAIN, Phase.SLEEP)
        return True

    def freeze(self, now: float) -> None:
        """The active model is confirmed asleep, and its server keeps the requests that were running."""
        _require(self.active is not None and (self.phase is Phase.SLEEP or self.mode is Mode.UNKNOWN))
        if self.active is not None and (count := self._in_flight[self.active]):
            self._in_flight[self.active] = 0
            self._frozen[self.active], self._frozen_since[self.active] = count, now

    def wake(self) -> None:
        """Every other model is confirmed out of memory; the target's wake may be sent."""
        _require(self.target is not None)
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

    def slept(self) -> list[Ticket]:
        """The model that was put to sleep for no other is out of memory. Returns the tickets that this grants: none."""
        _require(self.phase is Phase.SLEEP and self.target is None)
        self._activate(None, float("-inf"))
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
            frozen=MappingProxyType(dict(self._frozen)),
            switches=self._switches,
            abandoned=self._abandoned,
            failures=self._failures,
        )

    def describe(self) -> str:
        """What the pool is doing, in words for an error message."""
        if self.mode is Mode.SWITCHING and self.phase is not None:
            origin = f" from {self.active!r} ({self.in_flight(self.active)} in flight)" if self.active else ""
            what = f"switching to {self.target!r}{origin}" if self.target else f"putting {self.active!r} to sleep"
            return f"the gateway is {what}, in the phase {self.phase.value!r}"
        if self.mode is Mode.ACTIVE and self.held:
            return f"the model {self.active!r} is pinned by an operator, and no other is woken until it is unpinned"
        if self.mode is Mode.ACTIVE:
            return f"the model {self.active!r} is active with {self.in_flight(self.active)} requests in flight"
        return "no model is awake" if self.mode is Mode.IDLE else "the servers' states are not known yet"

    def _step(self, before: Phase, after: Phase) -> None:
        _require(self.phase is before)
        self.phase = after

    def _activate(self, model: str | None, since: float) -> None:
        self.active, self.active_since, self._idle_since = model, since, since
        self._admitting = model if model not in self._shut else None
        self._served_until = {}
        self.queued_at_activation = 0
        if model is not None:
            self.queued_at_activation = self.depth(model)
            self._in_flight[model] += self._frozen[model]
            self._frozen[model] = 0

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
        return self._grant(self.active) if self._admitting is not None else []

    def _grant(self, model: str) -> list[Ticket]:
        granted = self._empty(model, TicketStatus.GRANTED)
        self._in_flight[model] += len(granted)
        for ticket in granted:
            self._hold(model, ticket.head_start)
        return granted

    def _hold(self, model: str, head_start: float) -> None:
        held = self._held[model]
        held[head_start] = held.get(head_start, 0) + 1

    def _let_go(self, model: str, now: float, head_start: float) -> None:
        held = self._held[model]
        _require(held.get(head_start, 0) > 0)
        held[head_start] -= 1
        if not held[head_start]:
            del held[head_start]
            if model == self.active:
                self._served_until[head_start] = now

    def _empty(self, model: str, status: TicketStatus) -> list[Ticket]:
        tickets = self._queues[model].clear()
        for ticket in tickets:
            ticket.status = status
        return tickets


def _require(condition: bool) -> None:
    if not condition:
        raise RuntimeError("illegal transition of the switcher's state: please report this as a bug of llmux_asgi")
