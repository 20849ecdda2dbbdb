"""What a policy is shown, and what it may answer."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

__all__ = [
    "Defer",
    "PolicyContext",
    "PolicyDecision",
    "Stay",
    "SwitchContext",
    "SwitchNow",
    "SwitchPolicy",
]


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy sees when it is asked whether to switch to `target_model`.

    All waits are those that count: a request with a head start of H seconds (its priority class has one) has waited for H
    seconds when it comes.
    """

    target_model: str
    """The model that has waiting requests and is not active."""
    active_model: str | None
    """The model that is awake and serving, `None` if none is."""
    target_queue_depth: int
    """How many requests wait for `target_model`, at least 1."""
    oldest_waiting: float
    """The longest of their waits, in seconds."""
    active_in_flight: int
    """How many requests the active model is serving now; 0 if none is active."""

    # From here on all have defaults, and none counts when contexts are compared: code that makes contexts of the five above,
    # or compares them, goes on working.

    now: float = field(default=0.0, compare=False)
    """The time on the switcher's clock, monotonic, in seconds. Times below are on the same clock."""
    active_since: float = field(default=-math.inf, compare=False)
    """When the active model became active; minus infinity if that is not known, or none is active."""
    idle_for: float = field(default=0.0, compare=False)
    """For how many seconds the active model has served nobody; 0.0 while it serves, or if none is active; infinity if it
    was found awake and has served nobody since."""
    queued_at_activation: int = field(default=0, compare=False)
    """How many requests were waiting for the active model when it became active. All of them were admitted at once."""
    queue_depths: Mapping[str, int] = field(default_factory=dict, compare=False)
    """How many requests wait, by model; the longest wait comes first, and models that nobody waits for are left out."""
    oldest_waits: Mapping[str, float] = field(default_factory=dict, compare=False)
    """The longest of their waits, in seconds, by model, in the same order."""
    total_waits: Mapping[str, float] = field(default_factory=dict, compare=False)
    """The sum of their waits, in seconds, by model, in the same order."""
    head_starts: Mapping[str, float] = field(default_factory=dict, compare=False)
    """The largest of their head starts, in seconds, by model, in the same order."""
    real_waits: Mapping[str, float] | None = field(default=None, compare=False)
    """For how many seconds the first request of each queue has waited, head start aside: what its time limit goes by. Models
    with frozen requests only are left out, for those have none. `None`: not told."""
    served_until: Mapping[float, float] = field(default_factory=dict, compare=False)
    """The head starts of the requests that the active model has served since it became active, each with the time until which
    it did; infinity if it is serving such a request now."""
    sleep_costs: Mapping[str, float] = field(default_factory=dict, compare=False)
    """The estimate of what putting each model to sleep takes, in seconds; empty while nothing is known of any model."""
    wake_costs: Mapping[str, float] = field(default_factory=dict, compare=False)
    """The estimate of what waking each model takes, in seconds; empty while nothing is known of any model."""

    def switch_cost(self, from_model: str | None, to_model: str) -> float:
        """Return the estimate of a switch in seconds, without cooldown and drain; what is not known yet counts as 0."""
        sleep = 0.0 if from_model is None else self.sleep_costs.get(from_model, 0.0)
        return sleep + self.wake_costs.get(to_model, 0.0)


@dataclass(frozen=True, slots=True)
class SwitchNow:
    """Begin the switch now."""


@dataclass(frozen=True, slots=True)
class Defer:
    """Begin the switch when `awaitable` is done, if somebody still waits for the model then.

    The switcher awaits it in a task of its own and cancels it when it has become pointless (nobody waits any more, the
    model became active by other means). An exception from it fails the model's waiters with a `PolicyError`.
    """

    awaitable: Awaitable[object]


@dataclass(frozen=True, slots=True)
class Stay:
    """Not now: ask again at `until` at the latest, and whenever something has changed.

    `until` is a time on the switcher's clock, as `PolicyContext.now` is; `None`: when something has changed. A change is a
    request that arrives, leaves or is over, a switch that is completed, given up or has failed. A time that is past asks
    again at once, though not more often than each millisecond.
    """

    until: float | None = None


PolicyDecision: TypeAlias = SwitchNow | Defer | Stay


class SwitchContext:
    """What a policy's `prepare_switch` may look at and wait for, between the decision to switch and the sleep call."""

    __slots__ = ("_in_flight", "_preempt", "_wait", "from_model", "to_model")

    def __init__(
        self,
        from_model: str | None,
        to_model: str | None,
        in_flight: Callable[[], int],
        wait: Callable[[float | None], Awaitable[bool]],
        preempt: Callable[[int, float], Awaitable[None]],
    ) -> None:
        self.from_model = from_model
        self.to_model = to_model
        """`None`: an operator, or its `ttl`, puts `from_model` to sleep, and no other model is woken."""
        self._in_flight = in_flight
        self._wait = wait
        self._preempt = preempt

    @property
    def in_flight_count(self) -> int:
        """How many requests `from_model` is still serving. It only falls: new ones wait for the model's next turn."""
        return self._in_flight()

    async def wait_for_in_flight(self, timeout: float | None = None) -> bool:
        """Wait until `from_model` serves no request any more, at most `timeout` seconds (`None`: as long as it takes).

        Returns whether it was drained. May be cancelled at any time: the switch is given up if nobody waits for it.
        """
        return await self._wait(timeout)

    async def preempt(self, *, max_freezes: int = 16, max_frozen: float = 300.0) -> None:
        """Have the requests that still run frozen, in place of being aborted: they go on when `from_model` is next woken.

        Returns when all that run may be: one that was frozen `max_freezes` times finishes first. One that is frozen for
        longer than `max_frozen` seconds is ended with an error. Raises `BackendUnsupportedError` if the server of
        `from_model` cannot keep its requests while it sleeps. May be cancelled at any time, as above. Where there is no
        `to_model`, nobody waits for the memory: it then waits until they have finished.
        """
        await self._preempt(max_freezes, max_frozen)


@runtime_checkable
class SwitchPolicy(Protocol):
    """Decides when to switch. Subclass it and write `on_pending_request`; the rest has defaults."""

    sleep_level: int = 1
    """vLLM's sleep level for the outgoing model, unless the model has one of its own in the configuration: 1 or 2."""
    request_timeout: float | None = 60.0
    """The longest time in seconds that a request waits for its model; then it gets a 504. `None`: no limit."""
    min_active_duration: float = 5.0
    """For how many seconds a model stays active once it was woken, before a switch away from it may begin to drain."""

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        """Say whether to switch to `context.target_model`. Called often: answer at once and do not block."""
        ...

    def expected_turn(self, switch_cost: float) -> float:
        """Estimate for how many seconds a model stays active while others wait, if leaving it costs `switch_cost` seconds.

        Nothing is decided by it: clients that have to come back later are told when.
        """
        return self.min_active_duration

    async def prepare_switch(self, context: SwitchContext) -> None:
        """Wait for whatever must be over before the outgoing model is put to sleep. The default drains it fully.

        Requests still running when it returns are aborted by vLLM and reach their clients as an error, unless
        `context.preempt()` was called.
        """
        await context.wait_for_in_flight()
