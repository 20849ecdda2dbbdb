"""The switcher: leases, queues, and the switches that state and policy decide.

Nothing runs while nothing waits. The first request that has to wait starts the *driver*, one task for the whole switcher,
which asks the policy, switches, and ends when the queues are empty. It belongs to no request: a client that goes away, a
time limit, a cancelled host never reach into a step that is on the wire.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import anyio

from . import telemetry as names
from ._backoff import Backoff
from ._decision import Decider
from ._lease import Activation, Lease, Waiter
from ._memory import MemoryCheck, MemoryGauge, NvmlGauge
from ._servers import Servers
from ._spawn import only_own_cancellation, spawn
from ._state import Mode, SwitcherState, SwitcherStatistics, Ticket, TicketStatus
from ._steps import Steps
from .backends import Backend, BackendState, build_backend, with_ports
from .config import Config, PolicyConfig
from .exceptions import (
    BackendError,
    BackendTimeoutError,
    LLMuxError,
    PolicyError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
)
from .policy import FifoPolicy, SwitchContext, SwitchPolicy
from .telemetry import Telemetry, failed

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

__all__ = ["Lease", "ModelSwitcher"]

logger = logging.getLogger(__name__)

_CLOSING = "the gateway is shutting down"


class ModelSwitcher:
    """Keeps at most one of several models awake, and hands out leases on the awake one.

    `backends` are the servers by model name; `aliases` are further names. `sleep_levels` and `request_timeouts` (seconds)
    override the policy's, by model. `backoff` is the pause after a model's first failed switch and the longest one, in
    seconds: it doubles with each failure in a row. `memory` reads the GPU, to confirm that a sleeper is
    out of it within `memory_settle` seconds. `clock` gives monotonic seconds.
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
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(policy, type):
            raise TypeError(f"policy must be an instance of {policy.__name__}, not the class: {policy.__name__}(...)")
        self._servers = Servers(backends, MemoryCheck(memory, memory_settle) if memory is not None else None)
        self._names = {**(aliases or {}), **{model: model for model in backends}}
        self._policy: SwitchPolicy = policy or FifoPolicy()
        self._sleep_levels = dict(sleep_levels or {})
        self._request_timeouts = dict(request_timeouts or {})
        self._backoff = Backoff(*backoff)
        self.telemetry = telemetry or Telemetry()
        self._clock = clock

        self._state = SwitcherState(self.models)
        self._activation = Activation()
        self._lock: anyio.Lock | None = None
        self._driving = False
        self._closing = False
        self._stopped = anyio.Event()
        self._changed = anyio.Event()
        self._drained = anyio.Event()
        self._released = anyio.Event()
        self._give_up: anyio.CancelScope | None = None
        self._steps = Steps(self._servers, self._state, self.telemetry, self._sleep_level)
        self._decider = Decider(self._policy, self._state, clock, self._blame_policy, lambda: self._changed.set())

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
        config = with_ports(config)
        if memory is None and config.memory.check == "nvml":
            memory = NvmlGauge(config.memory.device)
        levels = {name: model.sleep_level for name, model in config.models.items() if model.sleep_level is not None}
        if policy is None:
            policy = _policy(config.policy)
        return cls(
            {
                name: build_backend(name, model, sleep_level=levels.get(name, policy.sleep_level))
                for name, model in config.models.items()
            },
            policy,
            aliases=config.aliases,
            sleep_levels=levels,
            request_timeouts={
                name: model.timeouts.request for name, model in config.models.items() if model.timeouts.request is not None
            },
            memory=memory,
            memory_settle=config.memory.settle,
            backoff=(config.limits.backoff_initial, config.limits.backoff_max),
            telemetry=telemetry,
        )

    # Leases

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, in the order of the configuration."""
        return self._servers.models

    def resolve(self, name: str) -> str | None:
        """Return the model that `name` (a model's name or an alias) stands for, `None` if there is none."""
        return self._names.get(name)

    @asynccontextmanager
    async def lease(self, model: str, *, timeout: float | None = None) -> AsyncIterator[Lease]:
        """Wait until `model` is active and hold it awake inside the block.

        Raises what `acquire` raises. May be cancelled at any time.
        """
        lease = await self.acquire(model, timeout=timeout)
        try:
            yield lease
        finally:
            lease.release()

    def try_acquire(self, model: str) -> Lease | None:
        """Return a lease if `model` (a name or an alias) is active now, else `None`. Takes no lock and does not wait."""
        name = self.resolve(model)
        if name is None or self._closing or not self._state.try_admit(name):
            return None
        return Lease(self, self._activation, name)

    async def acquire(self, model: str, *, timeout: float | None = None) -> Lease:
        """Wait for a lease on `model` (a name or an alias); the caller has to release it.

        `timeout` in seconds replaces the `request_timeout` of the model or policy. Raises `UnknownModelError`,
        `QueueTimeoutError`, `SwitchError` or `PolicyError`.
        """
        name = self.resolve(model)
        if name is None:
            raise UnknownModelError(model)
        if lease := self.try_acquire(name):
            return lease
        if self._closing:
            raise SwitchError(name, _CLOSING)
        self._refuse_while_backing_off(name)
        if timeout is None:
            timeout = self._request_timeouts.get(name, self._policy.request_timeout)
        waiter = Waiter(name, self._clock())
        self._state.enqueue(waiter)
        self._wake_driver()
        try:
            with anyio.move_on_after(timeout):
                await waiter.event.wait()
        except BaseException:
            self._withdraw(waiter)
            raise
        waited = self._clock() - waiter.since
        if waiter.status is TicketStatus.GRANTED:
            return Lease(self, waiter.activation or self._activation, name, waited, waiter.switch)
        if waiter.error is not None:
            raise waiter.error()
        reason = self._state.describe()
        self._withdraw(waiter)
        raise QueueTimeoutError(name, waited, reason, retry_after=max(1.0, self._policy.min_active_duration))

    def statistics(self) -> SwitcherStatistics:
        """Return a frozen snapshot of what the pool is doing."""
        return replace(self._state.snapshot(), servers=MappingProxyType(self._servers.states()))

    def distrust(self) -> None:
        """Have every server asked for its state before the next request is admitted, because something went wrong."""
        self._state.distrust()
        self._changed.set()

    async def reconcile(self) -> None:
        """Ask every server for its state and adopt it. The first request does this by itself.

        A caller that is cancelled leaves; the steps that this takes run to their end.
        """

        async def run() -> None:
            self.distrust()
            await self._reconcile()

        await self._in_its_own_task(run)

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
            await self._reconcile()

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
        self._closing = True
        try:
            self._refuse_all(_CLOSING)
            with anyio.move_on_after(drain):
                while any(self._state.in_flight(model) for model in self.models):
                    self._released = anyio.Event()
                    await self._released.wait()
            if self._activation.leases:
                self._activation.interrupted = True
            # Before a step on the wire is waited for: to start a server takes minutes, and it would be ended right after it.
            await self._servers.end_processes()
            if self._driving:
                await self._stopped.wait()
            async with self._exclusively():
                self._state.distrust()
                await self._servers.aclose()
        finally:
            self._closing = False
        self._lock = None  # one that was used on an event loop does not work on another

    async def _in_its_own_task(self, function: Callable[[], Awaitable[None]]) -> None:
        done = anyio.Event()

        async def run() -> None:
            try:
                async with self._exclusively():
                    await function()
            except Exception as exc:
                logger.exception("reconciling met an unexpected error")
                self._refuse_all(f"unexpected error: {exc!r}")
            finally:
                done.set()

        spawn(run, "llmux_asgi inquiry")
        await done.wait()

    def _release(self, model: str) -> None:
        if self._state.release(model) and model == self._state.active:
            self._drained.set()
        self._released.set()
        self._changed.set()

    def _withdraw(self, waiter: Waiter) -> None:
        """Undo what a request that goes away has got: its place in the queue, or the lease granted a moment ago."""
        if waiter.status is TicketStatus.GRANTED:
            self._release(waiter.model)
        elif waiter.status is TicketStatus.WAITING:
            self._state.leave(waiter)
            if not self._state.depth(waiter.model):
                self._nobody_waits(waiter.model)

    def _refuse(self, model: str, error: Callable[[], LLMuxError]) -> None:
        for ticket in self._state.refuse(model):
            waiter = cast("Waiter", ticket)
            waiter.error = error
            waiter.event.set()
        self._nobody_waits(model)

    def _refuse_all(self, reason: str) -> None:
        for model in self._state.waiting_models():
            self._refuse(model, partial(SwitchError, model, reason))

    def _nobody_waits(self, model: str) -> None:
        self._decider.drop(model)
        if self._give_up is not None and model == self._state.target:
            self._give_up.cancel()
        self._changed.set()

    def _grant(self, granted: list[Ticket], switch: SpanContext | None = None) -> None:
        for ticket in granted:
            waiter = cast("Waiter", ticket)
            waiter.activation, waiter.switch = self._activation, switch
            waiter.event.set()
        if self._state.active is not None:
            self._decider.drop(self._state.active)

    def _refuse_while_backing_off(self, model: str) -> None:
        if failure := self._backoff.pausing(model, self._clock()):
            pause = failure.retry_at - self._clock()
            raise SwitchError(model, f"{failure.reason} (next attempt in {pause:.1f} s)", retry_after=pause)

    # The driver

    def _wake_driver(self) -> None:
        self._changed.set()
        if not self._driving:
            self._driving = True
            self._stopped = anyio.Event()
            spawn(self._drive, "llmux_asgi switcher")

    async def _drive(self) -> None:
        try:
            with only_own_cancellation():
                await self._serve_queues()
        except Exception as exc:
            logger.exception("the switcher met an unexpected error")
            self._refuse_all(f"unexpected error: {exc!r}")
        finally:
            self._driving = False
            self._decider.drop_all()
            if self._state.mode is Mode.SWITCHING:
                self._grant(self._state.fail())
            # Somebody still waits only if the event loop is being closed around this task.
            self._refuse_all(_CLOSING)
            self._stopped.set()

    async def _serve_queues(self) -> None:
        while self._state.waiting_models():
            self._changed = anyio.Event()
            if self._state.mode is Mode.UNKNOWN:
                async with self._exclusively():
                    await self._reconcile()
            elif (target := self._decider.choose()) is not None:
                async with self._exclusively():
                    await self._switch(target)
            else:
                await self._changed.wait()

    def _blame_policy(self, model: str, what: str, exc: Exception | None = None) -> PolicyError:
        error = f"The switch policy {type(self._policy).__name__} failed for the model {model!r}: {what}"
        logger.error(error, exc_info=exc)
        self._refuse(model, partial(PolicyError, error))
        return PolicyError(error)

    async def _reconcile(self) -> None:
        """Adopt what the servers say. Where several are awake, keep the one in use or most wanted and put the rest to sleep."""
        if self._state.mode is not Mode.UNKNOWN:
            return  # somebody else has done it while the lock was awaited
        self._state.inquire()
        previous = self._state.active
        unclear = await self._servers.look_at(self.models)
        for model, why in unclear.items():
            logger.warning("the state of the model %r is unknown: %s", model, why)
        if previous in unclear and not self._state.in_flight(previous):
            try:
                await self._servers.stop(previous, unclear.pop(previous))
            except BackendError as exc:  # it is not the gateway's own, or cannot be ended
                unclear[previous] = exc
        if previous in unclear:
            # It may be serving. Nothing is done about it, and nobody is served, before it is known.
            self._refuse_all(f"the state of the active model {previous!r} is unknown: {unclear[previous]}")
            return
        awake = self._state.by_use(model for model in self.models if self._servers.says_awake(model))
        sound = [model for model in awake if self._servers.is_sound(model)]
        keep = next((model for model in (previous, *self._state.waiting_models(), *sound) if model in sound), None)
        try:
            for model in reversed(awake):
                if model != keep:
                    logger.warning("putting the model %r to sleep: awake are %s, kept is %r", model, awake, keep)
                    await self._servers.sleep(model, self._sleep_level(model))
        except BackendError as exc:
            reason = f"the model {model!r} must not be awake and could not be put to sleep: {exc}"
            logger.error("%s", reason)
            self._refuse_all(reason)
            return
        if keep != previous:
            self._activation.end()  # whatever is left of it: its model is confirmed out of memory
            self._activation = Activation()
        elif self._activation.interrupted:
            self._activation = Activation(self._activation)
        if keep is not None:
            self._backoff.succeeded(keep)
        self._grant(self._state.adopt(keep))

    def _exclusively(self) -> anyio.Lock:
        """The lock that guards every change of who is awake."""
        if self._lock is None:
            self._lock = anyio.Lock()
        return self._lock

    def _sleep_level(self, model: str) -> int:
        return self._sleep_levels.get(model, self._policy.sleep_level)

    # One switch

    async def _switch(self, to: str) -> None:
        state, origin = self._state, self._state.active
        if state.mode not in (Mode.IDLE, Mode.ACTIVE) or to == origin or not state.depth(to):
            return  # while the lock was awaited, something happened that asks for a new decision
        waiters = [cast("Waiter", ticket) for ticket in state.waiters(to)]
        attributes: dict[str, str | int] = {
            names.SWITCH_TO: to,
            names.SWITCH_POLICY: type(self._policy).__name__,
            names.SWITCH_WAITING: len(waiters),
            names.SWITCH_IN_FLIGHT: state.in_flight(origin),
        }
        if origin is not None:
            attributes |= {names.SWITCH_FROM: origin, names.SWITCH_SLEEP_LEVEL: self._sleep_level(origin)}
        state.begin(to)
        begun = self._clock()
        with self.telemetry.switch(waiters[0].context, [waiter.span for waiter in waiters], attributes) as span:
            try:
                with only_own_cancellation():
                    switched = await self._prepare(origin, to) and await self._execute(origin, to)
            except Exception as exc:  # noqa: BLE001 - whatever a backend raises, nothing may be left half-done
                outcome = "failed"
                failed(span, exc)
                self._link_newcomers(span, waiters, to)
                await self._recover(origin, to, exc, span.get_span_context())
            else:
                outcome = "completed" if switched else "abandoned"
                self._link_newcomers(span, waiters, to)
                self._grant(state.complete(self._clock()) if switched else state.abandon(), span.get_span_context())
                if switched:
                    text = "switched from %r to %r in %.3f s; %d requests waited for it"
                    logger.info(text, origin, to, self._clock() - begun, state.in_flight(to))
            span.set_attribute(names.SWITCH_OUTCOME, outcome)
            self.telemetry.switch_duration.record(
                self._clock() - begun,
                {names.SWITCH_FROM: origin or "", names.SWITCH_TO: to, names.SWITCH_OUTCOME: outcome},
            )

    def _link_newcomers(self, span: Span, linked: list[Waiter], to: str) -> None:
        for waiter in set(cast("tuple[Waiter, ...]", self._state.waiters(to))).difference(linked):
            if waiter.span.is_valid:
                span.add_link(waiter.span)

    async def _prepare(self, origin: str | None, to: str) -> bool:
        """Do what precedes the point of no return. Returns whether it was passed; not if nobody waits for `to` any more."""
        error: Exception | None = None

        async def run(step: Callable[[], Awaitable[None]]) -> None:
            nonlocal error
            try:
                await step()
            except Exception as exc:  # noqa: BLE001 - raised again below, where no task group wraps it
                error = error or exc
                steps.cancel_scope.cancel()

        async def make_room() -> None:
            await self._cool_down(origin)
            self._state.drain()
            await self._drain(origin, to)

        wary = self._backoff.has_failed(to)
        look = partial(self._servers.require_reachable, to, has_failed=wary)
        with anyio.CancelScope() as scope:
            self._give_up = scope
            try:
                # Beside the drain, so that it costs no time; but the gate is not closed twice for a model that does not answer.
                if wary:
                    await look()
                async with anyio.create_task_group() as steps:
                    if not wary:
                        steps.start_soon(run, look)
                    await run(make_room)
                if error is not None:
                    raise error
            finally:
                self._give_up = None
        return not scope.cancel_called and self._state.commit()

    async def _cool_down(self, origin: str | None) -> None:
        if origin is not None:
            with self.telemetry.phase("cooldown"):
                rest = self._state.active_since + self._policy.min_active_duration - self._clock()
                if rest > 0:
                    await anyio.sleep(rest)

    async def _drain(self, origin: str | None, to: str) -> None:
        async def wait(timeout: float | None) -> bool:
            with anyio.move_on_after(timeout):
                while self._state.in_flight(origin):
                    await self._drained.wait()
            return not self._state.in_flight(origin)

        self._drained = anyio.Event()
        context = SwitchContext(origin, to, lambda: self._state.in_flight(origin), wait)
        with self.telemetry.phase("drain", {names.SWITCH_IN_FLIGHT: context.in_flight_count}):
            try:
                with only_own_cancellation():
                    await self._policy.prepare_switch(context)
            except Exception as exc:
                raise self._blame_policy(to, f"prepare_switch raised {exc!r}", exc) from exc

    async def _execute(self, origin: str | None, to: str) -> bool:
        """Put everything else to sleep and wake `to`. Returns False if nobody waited for it any more when that was due."""

        def interrupt() -> None:
            if self._state.in_flight(origin):
                self._activation.interrupted = True

        await self._servers.settle(to)
        await self._steps.make_room(to, origin, interrupt)
        if self._activation.interrupted:
            self._activation.end()
        self._state.wake()
        if not self._state.depth(to):
            return False
        await self._steps.bring_up(to)
        self._backoff.succeeded(to)
        self._activation = Activation()
        return True

    async def _recover(self, origin: str | None, to: str, exc: Exception, switch: SpanContext) -> None:
        """Tell those who waited, back off, and find out from the servers where things stand."""
        granted = self._state.fail()
        if not isinstance(exc, PolicyError):  # those have been told and logged already
            reason = str(exc) if isinstance(exc, LLMuxError) else f"unexpected error: {exc!r}"
            failure = self._backoff.failed(to, reason, self._clock())
            text = "switching from %r to %r failed (%d in a row), next attempt in %.1f s: %s"
            trace_back = None if isinstance(exc, LLMuxError) else exc
            logger.error(text, origin, to, failure.in_a_row, failure.pause, reason, exc_info=trace_back)
            self._refuse(to, partial(SwitchError, to, reason, retry_after=failure.pause, switch=switch))
        self._grant(granted)
        if self._state.mode is Mode.UNKNOWN:
            await self._reconcile()


def _policy(config: PolicyConfig) -> SwitchPolicy:
    return FifoPolicy(
        sleep_level=config.sleep_level,
        request_timeout=config.request_timeout,
        min_active_duration=config.min_active_duration,
        drain=config.drain,
        drain_timeout=config.drain_timeout,
    )
