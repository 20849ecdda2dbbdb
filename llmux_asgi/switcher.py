"""The switcher: leases, queues, and the switches that state and policy decide.

Nothing runs while nothing waits. The first request that has to wait starts the *driver*, one task for the whole switcher,
which asks the policy, switches, and ends when the queues are empty.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import MappingProxyType

import anyio

from ._admission import Priorities, QueueLimits
from ._backoff import Backoff
from ._driver import CLOSING, Driver
from ._estimates import Estimates, ModelCosts
from ._estimates_file import EstimatesFile
from ._forecast import next_turn_in
from ._lease import Lease, Waiter
from ._memory import MemoryCheck, MemoryGauge, NvmlGauge
from ._reload import Plan, Settings, build_servers, plan, require_freezing
from ._room import WaitingRoom
from ._servers import Servers
from ._spawn import spawn
from ._state import Mode, SwitcherState, SwitcherStatistics, TicketStatus
from ._turnover import Turnover
from .backends import Backend, BackendState, TunableBackend, with_ports
from .config import Config, ConfigSource, ReloadReport, load_config
from .exceptions import (
    BackendError,
    BackendTimeoutError,
    BackendUnreachableError,
    ConfigError,
    LLMuxError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
)
from .policy import GatedQuantumPolicy, SwitchPolicy, build_policy
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
    how many by model. `clock` gives monotonic seconds.
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
        max_waiting: int | None = 1000,
        queue_limits: Mapping[str, int] | None = None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(policy, type):
            raise TypeError(f"policy must be an instance of {policy.__name__}, not the class: {policy.__name__}(...)")
        self._servers = Servers(backends, MemoryCheck(memory, memory_settle) if memory is not None else None)
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
            self._sleep_level,
            clock,
            self._estimates,
            self._save_estimates,
        )
        self._turnover = Turnover(self._room, self._servers, self._driver, self._sleep_level, clock, self._has_settled)
        self.config: Config | None = None
        """The configuration that it goes by, with the ports that were chosen; `None`: it was built from backends."""
        self._given: Config | None = None
        self._keeps_policy = True
        self.settled: Callable[[str], None] = lambda model: None
        """Called when a model has its new server after a reload, or is gone."""
        self._closers = 0
        """How many calls of `aclose` are under way."""

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
        given, config = config, with_ports(config)
        if memory is None and config.memory.check == "nvml":
            memory = NvmlGauge(config.memory.device)
        keeps_policy = policy is not None
        if policy is None:
            policy = build_policy(config.policy)
        servers = build_servers(config, policy)
        settings = Settings.of(config)
        switcher = cls(
            {name: server.backend for name, server in servers.items()},
            policy,
            sleep_levels=settings.sleep_levels,
            memory=memory,
            memory_settle=config.memory.settle,
            costs={name: ModelCosts(model.costs.sleep, model.costs.wake) for name, model in config.models.items()},
            estimates=config.policy.estimates,
            telemetry=telemetry,
        )
        switcher.config, switcher._given, switcher._keeps_policy = config, given, keeps_policy
        switcher._turnover.present.update(servers)
        switcher._go_by(settings)
        return switcher

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
        return self._priorities.choose(self.resolve(model) or model, asked)

    def try_acquire(self, model: str, *, priority: str | None = None) -> Lease | None:
        """Return a lease if `model` (a name or an alias) is active now, else `None`. Takes no lock and does not wait.

        Raises `InvalidRequestError` if there is no class `priority`.
        """
        name = self.resolve(model)
        if name is None or self._closers:
            return None
        head_start = self._priorities.head_start(self._priorities.choose(name, priority))
        if not self._state.try_admit(name, head_start):
            return None
        return Lease(self, self._room.activation, name, head_start=head_start)

    async def acquire(self, model: str, *, timeout: float | None = None, priority: str | None = None) -> Lease:
        """Wait for a lease on `model` (a name or an alias); the caller has to release it.

        `timeout` in seconds replaces the `request_timeout` of the model or policy, `priority` the model's class. Raises
        `UnknownModelError`, `InvalidRequestError` (no such class), `QueueFullError`, `QueueTimeoutError`, `SwitchError` or
        `PolicyError`.
        """
        name = self.resolve(model)
        if name is None:
            raise UnknownModelError(model)
        head_start = self._priorities.head_start(self._priorities.choose(name, priority))
        if lease := self.try_acquire(name, priority=priority):
            return lease
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
        models = self._state.models
        return replace(
            self._state.snapshot(),
            servers=MappingProxyType(dict.fromkeys(models, "unknown") | self._servers.states()),
            costs=MappingProxyType({model: self._estimates.of(model, self._sleep_level(model)) for model in models}),
            unsettled=self._turnover.unsettled,
        )

    # Another configuration

    async def reload(self, config: ConfigSource) -> ReloadReport:
        """Go by another configuration from now on, without losing a request. Returns what has changed.

        Raises `ConfigError` if it cannot be used, or not without a restart, and `BackendUnsupportedError` if it has `drain:
        preempt` and a server that answers cannot freeze its requests: nothing has changed then. Servers that are replaced or
        removed are put to sleep when their requests are over, after this has returned.
        """
        plan = self.plan(load_config(config))
        await self.check_plan(plan)
        return self.adopt(plan)

    def plan(self, given: Config) -> Plan:
        """Prepare for another configuration, and change nothing yet. Raises `ConfigError`."""
        if self.config is None or self._given is None:
            raise ConfigError("$: the switcher was built from backends, and not from a configuration that could be replaced")
        config, turnover = with_ports(given, self.config), self._turnover
        return plan(self._given, given, config, self._policy, turnover.present, turnover.next, keep_policy=self._keeps_policy)

    async def check_plan(self, plan: Plan) -> None:
        """Raise `BackendUnsupportedError` if a server of `plan` should freeze requests and cannot; others are not asked."""
        if plan.config.policy.drain == "preempt" and (plan.built or "policy" in plan.report.settings):
            await require_freezing(plan)

    def adopt(self, plan: Plan) -> ReloadReport:
        """Go by a prepared configuration from now on. Does not wait and does not fail."""
        before = self.config
        levels = {model: self._sleep_level(model) for model in self._state.models}
        self.config, self._given = plan.config, plan.given
        self._models = tuple(plan.config.models)
        if plan.policy is not None:
            self._policy = plan.policy
            self._driver.use(plan.policy)
        self._go_by(Settings.of(plan.config))
        self._turnover.want(plan.servers)
        unsettled = self._turnover.unsettled
        # What is put to sleep is the old server, and it may not know the new level.
        self._sleep_levels |= {model: levels[model] for model in unsettled if model in levels}
        for name, model in plan.config.models.items():
            if name in unsettled:
                continue
            backend = plan.servers[name].backend
            if isinstance(backend, TunableBackend):
                backend.retune(model.timeouts, freezes=plan.config.policy.drain == "preempt")
            level = self._sleep_level(name)
            old = before.models.get(name) if before is not None else None
            if old is None or model.costs != old.costs or self._estimates.of(name, level) == ModelCosts():
                self._estimates.seed(name, level, ModelCosts(model.costs.sleep, model.costs.wake))
        self._room.changed.set()
        return plan.report

    def _go_by(self, settings: Settings) -> None:
        self._names = settings.names
        self._sleep_levels = dict(settings.sleep_levels)
        self._request_timeouts = dict(settings.request_timeouts)
        self._priorities, self._limits = settings.priorities, settings.limits
        self._backoff.set_pauses(*settings.backoff)

    def _has_settled(self, model: str) -> None:
        """`model` has its new server, of which nothing is known yet, or is gone."""
        self._backoff.succeeded(model)
        self._estimates.forget(model)
        self._sleep_levels.pop(model, None)
        if self.config is not None and (config := self.config.models.get(model)) is not None:
            if config.sleep_level is not None:
                self._sleep_levels[model] = config.sleep_level
            self._estimates.seed(model, self._sleep_level(model), ModelCosts(config.costs.sleep, config.costs.wake))
        self.settled(model)

    # What the servers say

    def distrust(self) -> None:
        """Have every server asked for its state before the next request is admitted, because something went wrong."""
        self._state.distrust()
        self._room.changed.set()

    async def reconcile(self) -> None:
        """Ask every server for its state and adopt it. The first request does this by itself.

        A caller that is cancelled leaves; the steps that this takes run to their end.
        """

        async def run() -> None:
            self.distrust()
            await self._driver.reconcile()

        await self._in_its_own_task(run)

    async def require_freezing(self) -> None:
        """Raise `BackendUnsupportedError` if a server that answers cannot keep its requests while it sleeps."""
        for model in self._servers.models:
            with suppress(BackendUnreachableError, BackendTimeoutError):
                await self._servers.require_freezing(model)

    async def check(self) -> None:
        """Ask the active model's server how it is. If it is not awake, ask all of them, and adopt what they say.

        One that takes too long to answer is taken to be busy.
        """

        async def run() -> None:
            model = self._state.active
            if model is None or self._state.mode is not Mode.ACTIVE:
                return
            try:
                if await self._servers.look(model) is BackendState.AWAKE:
                    return
                logger.warning("the server of the active model %r is not awake any more", model)
            except BackendTimeoutError:
                return
            except BackendError as exc:
                logger.warning("the server of the active model %r does not say that it is awake: %s", model, exc)
            self.distrust()
            await self._driver.reconcile()

        await self._in_its_own_task(run)

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
        self._servers.closing = True
        try:
            self._room.close(CLOSING)
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
                await self._servers.aclose()
            if self._estimates_file is not None:
                await self._estimates_file.wait(1.0)
        finally:
            self._closers -= 1
            self._servers.closing = self._closers > 0
        if not self._closers:
            self._driver.forget_the_loop()

    async def _in_its_own_task(self, function: Callable[[], Awaitable[None]]) -> None:
        done = anyio.Event()

        async def run() -> None:
            try:
                async with self._driver.exclusively():
                    await function()
            except Exception as exc:
                logger.exception("reconciling met an unexpected error")
                self._room.refuse_all(f"unexpected error: {exc!r}")
            finally:
                done.set()

        spawn(run, "llmux_asgi inquiry")
        await done.wait()

    def _save_estimates(self) -> None:
        if self._estimates_file is not None:
            self._estimates_file.save(self._estimates)

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
