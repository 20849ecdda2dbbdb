"""The switcher: leases, queues, and the switches that state and policy decide.

Nothing runs while nothing waits. The first request that has to wait starts the *driver*, one task for the whole switcher,
which asks the policy, switches, and ends when the queues are empty.
"""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import anyio

from ._admission import Priorities, QueueLimits
from ._backoff import Backoff
from ._driver import CLOSING, Driver
from ._estimates import Estimates, ModelCosts
from ._estimates_file import EstimatesFile
from ._forecast import Progress, next_turn_in
from ._idle import IdleSleep
from ._inquiry import Inquiry
from ._journal import Journal
from ._lease import Lease, Waiter
from ._memory import MemoryCheck, MemoryGauge
from ._operations import Operations
from ._reload import Reloader, build_switcher
from ._room import WaitingRoom
from ._servers import Servers
from ._state import SwitcherState, SwitcherStatistics, TicketStatus
from ._turnover import Turnover
from .backends import Backend
from .config import Config, ConfigSource, ReloadReport, load_config
from .exceptions import (
    DrainingError,
    LLMuxError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
)
from .policy import GatedQuantumPolicy, SwitchPolicy
from .policy._base import DrainingPolicy
from .telemetry import Telemetry

__all__ = ["Lease", "ModelSwitcher"]

logger = logging.getLogger(__name__)


class ModelSwitcher:
    """Keeps at most one of several models awake, and hands out leases on the awake one.

    `backends` are the servers by model name; `policy` is a `GatedQuantumPolicy()` if it is left out; `aliases` are further
    names. `sleep_levels` and `request_timeouts` (seconds) override the policy's, by model. `backoff` is the pause after a
    model's first failed switch and the longest one, in seconds: it doubles with each failure in a row. `memory` reads the
    GPU, to confirm that a sleeper is out of it within `memory_settle` seconds. `costs` is what a sleep and a wake are
    estimated to take before they were measured; `estimates` is the path of a JSON file that keeps what was measured, and is
    read now.

    `priorities` are the priority classes with their head starts in seconds, `default_priorities` the class of a model's
    requests, by model. `max_waiting` is how many requests may wait for all models together (`None`: no limit), `queue_limits`
    how many by model. `ttls` is after how many seconds without a request a model is put to
    sleep, by model; it stays awake without one. `clock` gives monotonic seconds. `journal` gets an entry for whatever happens.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        policy: SwitchPolicy | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        sleep_levels: Mapping[str, int] | None = None,
        request_timeouts: Mapping[str, float] | None = None,
        backoff: tuple[float, float] = (1.0, 30.0),
        memory: MemoryGauge | None = None,
        memory_settle: float = 5.0,
        costs: Mapping[str, ModelCosts] | None = None,
        estimates: str | os.PathLike[str] | None = None,
        priorities: Mapping[str, float] | None = None,
        default_priorities: Mapping[str, str] | None = None,
        ttls: Mapping[str, float] | None = None,
        max_waiting: int | None = 1000,
        queue_limits: Mapping[str, int] | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
        journal: Journal | None = None,
    ) -> None:
        if isinstance(policy, type):
            raise TypeError(f"policy must be an instance of {policy.__name__}, not the class: {policy.__name__}(...)")
        self.journal = journal or Journal()
        """What has happened."""
        self._servers = Servers(backends, MemoryCheck(memory, memory_settle) if memory is not None else None, self._note_server)
        self._models = tuple(backends)
        self._names: Mapping[str, str] = {**(aliases or {}), **{model: model for model in backends}}
        self._policy: SwitchPolicy = policy or GatedQuantumPolicy()
        self._sleep_levels = dict(sleep_levels or {})
        self._request_timeouts = dict(request_timeouts or {})
        self._priorities = Priorities(priorities or {}, default_priorities or {})
        self._limits = QueueLimits(max_waiting, queue_limits or {})
        self._backoff = Backoff(*backoff)
        self.telemetry = telemetry or Telemetry()
        self._clock = clock

        self._state = SwitcherState(self.models)
        self._room = WaitingRoom(self._state, clock)
        self._estimates = Estimates(self.models)
        for model, each in (costs or {}).items():
            self._estimates.seed(model, self._sleep_level(model), each)
        self._estimates_file = EstimatesFile(estimates) if estimates is not None else None
        if self._estimates_file is not None:
            self._estimates_file.load_into(self._estimates)
        self._driver = Driver(
            self._room,
            self._servers,
            self._policy,
            self._backoff,
            self.telemetry,
            self.journal,
            self._sleep_level,
            clock,
            self._estimates,
            self._save_estimates,
        )
        self._operations = Operations(
            self._room,
            self._servers,
            self._driver,
            self._backoff,
            self.journal,
            lambda model: self._estimates.of(model, self._sleep_level(model)),
            clock,
        )
        self._inquiry = Inquiry(self._room, self._servers, self._driver, self.journal)
        self._idle = IdleSleep(ttls or {}, self._state, clock, self._driver.order)
        self._room.settled = self._idle.watch
        self.reloader = Reloader(self)
        self._turnover = Turnover(
            self._room, self._servers, self._driver, self.journal, self._sleep_level, clock, self.reloader.has_settled
        )
        reference = weakref.ref(self)
        self.telemetry.observe(lambda: switcher.statistics() if (switcher := reference()) is not None else None)
        self._closers = 0
        """How many calls of `aclose` are under way."""
        self._refusing = False
        """Whether no new request is admitted: the gateway is draining, or closing."""

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        policy: SwitchPolicy | None = None,
        memory: MemoryGauge | None = None,
        telemetry: Telemetry | None = None,
    ) -> ModelSwitcher:
        """Build the switcher of a configuration, with the backend that each model asks for.

        `policy` and `memory` replace those of the configuration. Raises `ConfigError` if the GPU's memory cannot be read.
        """
        return build_switcher(cls, config, policy, memory, telemetry)

    # Leases

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, in the order of the configuration."""
        return self._models

    def resolve(self, name: str) -> str | None:
        """Return the model that `name` (a model's name or an alias) stands for, `None` if there is none."""
        return self._names.get(name)

    @asynccontextmanager
    async def lease(self, model: str, *, timeout: float | None = None, priority: str | None = None) -> AsyncIterator[Lease]:
        """Wait until `model` is active and hold it awake inside the block.

        Raises what `acquire` raises. May be cancelled at any time.
        """
        lease = await self.acquire(model, timeout=timeout, priority=priority)
        try:
            yield lease
        finally:
            lease.release()

    def priority(self, model: str, asked: str | None = None) -> str | None:
        """Return the priority class of a request for `model` that asks for the class `asked`, or for none.

        `None`: it has no class. Raises `InvalidRequestError` if there is no such class.
        """
        return self._priorities.choose(self._names.get(model, model), asked)

    def try_acquire(self, model: str, *, priority: str | None = None) -> Lease | None:
        """Return a lease if `model` (a name or an alias) is active now, else `None`. Takes no lock and does not wait.

        Raises `InvalidRequestError` if there is no class `priority`.
        """
        name = self._names.get(model)
        if name is None or self._refusing:
            return None
        head_start = self._priorities.head_start(self._priorities.choose(name, priority))
        if not self._state.try_admit(name, head_start):
            return None
        if self._room.shares.idle:
            self._room.shares.begin_to_serve(self._clock())
        return Lease(self, self._room.activation, name, head_start=head_start)

    async def acquire(self, model: str, *, timeout: float | None = None, priority: str | None = None) -> Lease:
        """Wait for a lease on `model` (a name or an alias); the caller has to release it.

        `timeout` in seconds replaces the `request_timeout` of the model or policy, `priority` the model's class. Raises
        `UnknownModelError`, `InvalidRequestError` (no such class), `QueueFullError`, `QueueTimeoutError`, `SwitchError`,
        `DrainingError` or `PolicyError`.
        """
        name = self._require(model)
        head_start = self._priorities.head_start(self._priorities.choose(name, priority))
        if lease := self.try_acquire(name, priority=priority):
            return lease
        if self.draining and not self._closers:
            raise DrainingError
        return await self._wait_for_lease(name, head_start, timeout)

    async def _wait_for_lease(self, name: str, head_start: float = 0.0, timeout: float | None = None) -> Lease:
        if self._closers:
            raise SwitchError(name, CLOSING)
        self._refuse_while_backing_off(name)
        if timeout is None:
            timeout = self.request_timeout(name)
        self._limits.check(self._state, name, lambda: self._next_turn_in(name))
        waiter = Waiter(name, self._clock(), head_start)
        self._state.enqueue(waiter)
        self._driver.wake()
        if self._state.is_shut(name):
            self._turnover.wake()
        try:
            with anyio.move_on_after(timeout):
                await waiter.event.wait()
        except BaseException:
            self._room.withdraw(waiter)
            raise
        waited = self._clock() - waiter.since
        if waiter.status is TicketStatus.GRANTED:
            return Lease(self, waiter.activation or self._room.activation, name, waited, waiter.switch, head_start)
        if waiter.error is not None:
            raise waiter.error()
        reason, pause = self._turnover.describe(name) or self._state.describe(), self._next_turn_in(name)
        self._room.withdraw(waiter)
        raise QueueTimeoutError(name, waited, reason, retry_after=pause)

    def request_timeout(self, model: str) -> float | None:
        """The longest wait of a request for `model` in seconds, `None`: no limit."""
        return self._request_timeouts.get(model, self._policy.request_timeout)

    def progress(self, model: str) -> Progress:
        """Say what those who wait for `model` (its configured name) wait for, and for how long that is expected to take."""
        expected, switch = self._next_turn_in(model), self._driver.records.under_way
        if switch is None or switch.to_model != model:
            return Progress("queued", expected)
        # What it is estimated to take begins with the phase.
        past = self.journal.clock() - switch.phase_since if switch.phase.value in ("sleep", "wake", "ready") else 0.0
        return Progress(switch.phase.value, max(0.0, expected - past))

    @property
    def max_frozen(self) -> float:
        """The longest time in seconds that a request may be frozen; 0.0 if the policy does not preempt."""
        return self.max_frozen_with(None)

    def max_frozen_with(self, policy: SwitchPolicy | None) -> float:
        """The same for another policy; `None`: the present one."""
        policy = policy or self._policy
        return policy.max_frozen if isinstance(policy, DrainingPolicy) and policy.drain == "preempt" else 0.0

    def statistics(self) -> SwitcherStatistics:
        """Return a frozen snapshot of what the pool is doing."""
        return replace(self._operations.statistics(), unsettled=self._turnover.unsettled)

    # What an operator may do

    async def wake(self, model: str) -> None:
        """Make `model` (a name or an alias) active, as a request for it would, and return when it is. Also while draining.

        Raises `OperationError` if another one is pinned and active, else what `acquire` raises.
        """
        name = self._require(model)
        self._operations.require_wakeable(name)
        if not self._state.admits(name):
            (await self._wait_for_lease(name, timeout=math.inf)).release()

    async def sleep(self, model: str) -> None:
        """If `model` is active, let its requests finish and put it to sleep; wake no other for it.

        How long requests may take is the policy's affair, as in any switch, but none is frozen. New ones wait, and the model is
        woken again for them. A caller that is cancelled leaves; what it has begun goes on. Raises `UnknownModelError`,
        `BackendError`, `PolicyError`, or `OperationError` if the gateway is shutting down.
        """
        await self._operations.sleep(self._require(model))

    async def stop(self, model: str) -> None:
        """Do what `sleep` does, and end the process of `model`. The next request for it starts it again.

        Raises what `sleep` raises, and `BackendUnsupportedError` if the process is not the gateway's own.
        """
        await self._operations.stop(self._require(model))

    @property
    def pinned(self) -> str | None:
        """The model that is not switched away from once it is active, if there is one."""
        return self._state.pinned

    def pin(self, model: str) -> None:
        """Switch to no other model while `model` is active. It is not woken for that.

        Requests for others wait; a switch away from it that has not begun to put it to sleep is given up. Raises
        `UnknownModelError`.
        """
        self._operations.pin(self._require(model))

    def unpin(self) -> None:
        """Pin no model any more."""
        self._operations.pin(None)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._operations.draining

    def drain(self) -> None:
        """Refuse new requests with a `DrainingError`. Those that run or wait finish; see `statistics().drained`."""
        self._operations.drain(draining=True)
        self._refusing = True

    def resume(self) -> None:
        """Admit new requests again."""
        self._operations.drain(draining=False)
        self._refusing = self._closers > 0

    # Another configuration

    async def reload(self, config: ConfigSource) -> ReloadReport:
        """Go by another configuration from now on, without losing a request. Returns what has changed.

        Raises `ConfigError` if it cannot be used, or not without a restart, and `BackendUnsupportedError` if it has `drain:
        preempt` and a server that answers cannot freeze its requests: nothing has changed then. Servers that are replaced or
        removed are put to sleep when their requests are over, after this has returned: see `statistics().unsettled`.
        """
        plan = self.reloader.plan(load_config(config))
        await self.reloader.check(plan)
        return self.reloader.adopt(plan)

    # What the servers say

    def distrust(self) -> None:
        """Have every server asked for its state before the next request is admitted, because something went wrong."""
        self._inquiry.distrust()

    async def reconcile(self) -> None:
        """Ask every server for its state and adopt it. The first request does this by itself.

        A caller that is cancelled leaves; the steps that this takes run to their end.
        """
        await self._inquiry.reconcile()

    async def require_freezing(self) -> None:
        """Raise `BackendUnsupportedError` if a server that answers cannot keep its requests while it sleeps."""
        await self._inquiry.require_freezing()

    async def check(self) -> None:
        """Ask the active model's server how it is. If it is not awake, ask all of them, and adopt what they say.

        One that takes too long to answer is taken to be busy.
        """
        await self._inquiry.check()

    async def preload(self, models: Iterable[str]) -> None:
        """Make each of `models` active once, the last one for good. A failure is logged, as that of any switch."""
        for model in models:
            with suppress(LLMuxError):
                (await self.acquire(model, timeout=math.inf)).release()

    async def aclose(self, *, drain: float = 0.0) -> None:
        """Refuse waiting requests and new ones, give running ones `drain` seconds, and end what the gateway has started.

        A step that is on the wire is waited for. Processes of the gateway are ended, connections closed. The switcher may be
        used again afterwards: it then starts by asking the servers for their state.
        """
        self._closers += 1
        self._refusing = self._servers.closing = True
        try:
            self._idle.stop()
            self._room.close(CLOSING)
            self._driver.refuse_orders(CLOSING)
            try:
                with anyio.move_on_after(drain):
                    while any(self._state.in_flight(model) for model in self._state.models):
                        await self._room.until_release()
                if self._room.activation.leases:
                    self._room.activation.interrupted = True
            finally:
                # Also if the host cancels this. And before a step on the wire is waited for: to start a server takes minutes,
                # and it would be ended right after it.
                with anyio.CancelScope(shield=True):
                    await self._servers.end_processes()
                self._state.distrust()
            if self._driver.driving:
                await self._driver.stopped.wait()
            await self._turnover.stop()
            async with self._driver.exclusively():
                self._state.distrust()
                self._idle.stop()
                await self._servers.aclose()
            if self._estimates_file is not None:
                await self._estimates_file.wait(1.0)
        finally:
            self._closers -= 1
            self._servers.closing = self._closers > 0
            self._refusing = self._servers.closing or self.draining
        if not self._closers:
            self._driver.forget_the_loop()

    def _save_estimates(self) -> None:
        if self._estimates_file is not None:
            self._estimates_file.save(self._estimates)

    def _require(self, model: str) -> str:
        name = self.resolve(model)
        if name is None:
            raise UnknownModelError(model)
        return name

    def _note_server(self, model: str, state: str) -> None:
        self.journal.write("model", model=model, state=state)

    def _release(self, model: str, head_start: float, *, frozen: bool) -> None:
        self._room.release(model, head_start, frozen=frozen)

    def _next_turn_in(self, model: str) -> float:
        policy, costs = self._policy, self._driver.costs()
        least = policy.min_active_duration
        # A policy need not be a subclass, and may be older than this method.
        turn: Callable[[float], float] = getattr(policy, "expected_turn", lambda cost: least)
        try:
            return next_turn_in(self._state, model, self._clock(), costs, least, turn)
        except Exception:  # the policy is the user's code, and its estimate is not worth a request
            logger.exception("%s.expected_turn failed", type(policy).__name__)
            return max(1.0, least)

    def _refuse_while_backing_off(self, model: str) -> None:
        if failure := self._backoff.pausing(model, self._clock()):
            pause = failure.retry_at - self._clock()
            raise SwitchError(model, f"{failure.reason} (next attempt in {pause:.1f} s)", retry_after=pause)

    def _sleep_level(self, model: str) -> int:
        return self._sleep_levels.get(model, self._policy.sleep_level)
