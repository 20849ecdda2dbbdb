"""The driver: asks the policy and carries out its switches, for as long as somebody waits.

It is one task for the whole switcher. It belongs to no request: a client that goes away, a time limit, a cancelled host never
reach into a step that is on the wire.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import anyio
from opentelemetry import trace
from opentelemetry.context import Context

from . import telemetry as names
from ._backoff import Backoff
from ._decision import Decider
from ._estimates import Estimates
from ._lease import Activation, Lease, Waiter
from ._room import WaitingRoom
from ._servers import Servers
from ._spawn import only_own_cancellation, spawn
from ._state import Mode
from ._steps import Steps
from .exceptions import BackendError, LLMuxError, PolicyError, SwitchError
from .policy import SwitchContext, SwitchPolicy
from .telemetry import Telemetry, failed

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

__all__ = ["CLOSING", "Driver"]

logger = logging.getLogger("llmux_asgi.switcher")  # whose part this is

CLOSING = "the gateway is shutting down"
_ASK_AGAIN = 1.0
"""Seconds until the servers are asked again if no clear answer came and only frozen requests wait."""


class Driver:
    """Reconciles and switches, one step after the other."""

    def __init__(
        self,
        room: WaitingRoom,
        servers: Servers,
        policy: SwitchPolicy,
        backoff: Backoff,
        telemetry: Telemetry,
        sleep_level: Callable[[str], int],
        clock: Callable[[], float],
        estimates: Estimates,
        save_estimates: Callable[[], None],
    ) -> None:
        self._room = room
        self._state = room.state
        self._servers = servers
        self._policy = policy
        self._backoff = backoff
        self._telemetry = telemetry
        self._sleep_level = sleep_level
        self._clock = clock
        self._save_estimates = save_estimates
        self._steps = Steps(servers, room.state, telemetry, sleep_level, estimates, clock)
        self._decider = Decider(policy, room.state, clock, self._blame_policy, lambda: room.changed.set(), self._steps.costs)
        room.drop_deferral = self._decider.drop
        self._lock: anyio.Lock | None = None
        self._freeze_limit: float | None = None
        """For how long the requests of the outgoing model may be frozen in the present switch; `None`: they are not."""
        self.driving = False
        self.stopped = anyio.Event()
        """Set when the task has ended."""

    def forget_the_loop(self) -> None:
        """Be usable on another event loop: a lock that was used on one does not work on the next."""
        if self._lock is not None and not self._lock.locked():
            self._lock = None

    def use(self, policy: SwitchPolicy) -> None:
        """Go by another policy from now on. A drain that has begun goes on as it was begun."""
        self._policy = policy
        self._decider.use(policy)

    def costs(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The estimates of sleep and of wake, in seconds by model; empty while nothing is known."""
        return self._steps.costs()

    def wake(self) -> None:
        """Somebody has come to wait: decide, in a task that ends when nobody waits any more."""
        self._room.changed.set()
        if not self.driving:
            self.driving = True
            self.stopped = anyio.Event()
            spawn(self._drive, "llmux_asgi switcher")

    async def _drive(self) -> None:
        try:
            with only_own_cancellation():
                await self._serve_queues()
        except Exception as exc:
            logger.exception("the switcher met an unexpected error")
            self._room.refuse_all(f"unexpected error: {exc!r}")
        finally:
            self.driving = False
            self._decider.drop_all()
            if self._state.mode is Mode.SWITCHING:
                self._room.grant(self._state.fail())
            # Somebody still waits only if the event loop is being closed around this task.
            self._room.refuse_all(CLOSING)
            self.stopped.set()

    async def _serve_queues(self) -> None:
        while self._state.waiting_models():
            self._room.changed = anyio.Event()
            if self._state.mode is Mode.UNKNOWN:
                async with self.exclusively():
                    await self.reconcile()
                if self._state.mode is Mode.UNKNOWN and self._state.waiting_models():
                    with anyio.move_on_after(_ASK_AGAIN):
                        await self._room.changed.wait()
            elif (target := self._decider.choose()) is not None:
                async with self.exclusively():
                    await self._switch(target)
            else:
                # At least a millisecond: a policy that names a time which is past must not keep the event loop busy.
                with anyio.move_on_after(max(self._decider.ask_again_at - self._clock(), 0.001)):
                    await self._room.changed.wait()

    def _blame_policy(self, model: str, what: str, exc: Exception | None = None) -> PolicyError:
        error = f"The switch policy {type(self._policy).__name__} failed for the model {model!r}: {what}"
        logger.error(error, exc_info=exc)
        self._room.refuse(model, partial(PolicyError, error))
        return PolicyError(error)

    async def reconcile(self) -> None:
        """Adopt what the servers say. Where several are awake, keep the one in use or most wanted and put the rest to sleep."""
        if self._state.mode is not Mode.UNKNOWN:
            return  # somebody else has done it while the lock was awaited
        self._state.inquire()
        previous = self._state.active
        unclear = await self._servers.look_at(self._servers.models)
        for model, why in unclear.items():
            logger.warning("the state of the model %r is unknown: %s", model, why)
        if previous in unclear and not self._state.in_flight(previous):
            try:
                await self._servers.stop(previous, unclear.pop(previous))
            except BackendError as exc:  # it is not the gateway's own, or cannot be ended
                unclear[previous] = exc
        if previous in unclear:
            # It may be serving. Nothing is done about it, and nobody is served, before it is known.
            self._room.refuse_queues(f"the state of the active model {previous!r} is unknown: {unclear[previous]}")
            return
        awake = self._state.by_use(model for model in self._servers.models if self._servers.says_awake(model))
        sound = [model for model in awake if self._servers.is_sound(model)]
        keep = next((model for model in (previous, *self._state.waiting_models(), *sound) if model in sound), None)
        try:
            for model in reversed(awake):
                if model != keep:
                    logger.warning("putting the model %r to sleep: awake are %s, kept is %r", model, awake, keep)
                    # As the switch that has failed would have: what it was to freeze is not cut short either.
                    kept = self._state.frozen(model) > 0 or (model == previous and self._freeze_limit is not None)
                    await self._servers.sleep(model, self._sleep_level(model), keep=kept)
        except BackendError as exc:
            reason = f"the model {model!r} must not be awake and could not be put to sleep: {exc}"
            logger.error("%s", reason)
            self._room.refuse_queues(reason)
            return
        if keep != previous:
            self._leave(previous)
            self._room.begin(keep)
        elif self._room.activation.interrupted:
            self._room.activation = Activation(self._room.activation)
        if keep is not None:
            self._backoff.succeeded(keep)
        self._room.grant(self._state.adopt(keep))
        self._freeze_limit = None

    def exclusively(self) -> anyio.Lock:
        """The lock that guards every change of who is awake."""
        if self._lock is None:
            self._lock = anyio.Lock()
        return self._lock

    # One switch

    async def _switch(self, to: str) -> None:
        state, origin = self._state, self._state.active
        if state.mode not in (Mode.IDLE, Mode.ACTIVE) or to == origin or not state.depth(to):
            return  # while the lock was awaited, something happened that asks for a new decision
        waiters: list[Waiter | Lease] = [cast("Waiter", ticket) for ticket in state.waiters(to)]
        if to in self._room.frozen:
            waiters += self._room.frozen[to].leases
        attributes: dict[str, str | int] = {
            names.SWITCH_TO: to,
            names.SWITCH_POLICY: type(self._policy).__name__,
            names.SWITCH_WAITING: len(waiters),
            names.SWITCH_IN_FLIGHT: state.in_flight(origin),
        }
        if origin is not None:
            attributes |= {names.SWITCH_FROM: origin, names.SWITCH_SLEEP_LEVEL: self._sleep_level(origin)}
        self._freeze_limit = None
        state.begin(to)
        begun = self._clock()
        parent = waiters[0].context if waiters else Context()
        links = [waiter.span.get_span_context() for waiter in waiters]
        with self._telemetry.switch(parent, links, attributes) as span:
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
                if switched:
                    self._room.begin(to)
                self._room.grant(state.complete(self._clock()) if switched else state.abandon(), span.get_span_context())
                if switched:
                    text = "switched from %r to %r in %.3f s; %d requests waited for it"
                    logger.info(text, origin, to, self._clock() - begun, state.in_flight(to))
                    self._save_estimates()
                self._freeze_limit = None
            span.set_attribute(names.SWITCH_OUTCOME, outcome)
            self._telemetry.switch_duration.record(
                self._clock() - begun,
                {names.SWITCH_FROM: origin or "", names.SWITCH_TO: to, names.SWITCH_OUTCOME: outcome},
            )

    def _link_newcomers(self, span: Span, linked: list[Waiter | Lease], to: str) -> None:
        for waiter in set(cast("tuple[Waiter, ...]", self._state.waiters(to))).difference(linked):
            if (context := waiter.span.get_span_context()).is_valid:
                span.add_link(context)

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
            self._room.give_up = scope
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
                self._room.give_up = None
        return not scope.cancel_called and self._state.commit()

    async def _cool_down(self, origin: str | None) -> None:
        if origin is not None:
            with self._telemetry.phase("cooldown"):
                rest = self._state.active_since + self._policy.min_active_duration - self._clock()
                if rest > 0:
                    await anyio.sleep(rest)

    async def _drain(self, origin: str | None, to: str) -> None:
        async def wait(timeout: float | None) -> bool:
            with anyio.move_on_after(timeout):
                while self._state.in_flight(origin):
                    await self._room.drained.wait()
            return not self._state.in_flight(origin)

        async def preempt(max_freezes: int, max_frozen: float) -> None:
            if origin is None:
                return
            await self._servers.require_freezing(origin)
            while any(lease.freezes >= max_freezes for lease in self._room.activation.leases):
                await self._room.until_release()
            self._freeze_limit = max_frozen

        self._room.drained = anyio.Event()
        context = SwitchContext(origin, to, lambda: self._state.in_flight(origin), wait, preempt)
        with self._telemetry.phase("drain", {names.SWITCH_IN_FLIGHT: context.in_flight_count}):
            try:
                with only_own_cancellation():
                    await self._policy.prepare_switch(context)
            except Exception as exc:
                raise self._blame_policy(to, f"prepare_switch raised {exc!r}", exc) from exc

    async def _execute(self, origin: str | None, to: str) -> bool:
        """Put everything else to sleep and wake `to`. Returns False if nobody waited for it any more when that was due."""
        keep = self._freeze_limit is not None

        def interrupt() -> None:
            if self._state.in_flight(origin) and not keep:
                self._room.activation.interrupted = True

        await self._servers.settle(to)
        await self._steps.make_room(to, origin, interrupt, keep=keep)
        self._leave(origin)
        self._state.wake()
        if not self._state.depth(to):
            return False
        await self._steps.bring_up(to)
        self._backoff.succeeded(to)
        return True

    def _leave(self, origin: str | None) -> None:
        """Freeze what `origin` was serving if its server has kept it, else void it: the model is confirmed out of memory."""
        if origin is not None and self._freeze_limit is not None and self._servers.says_asleep(origin):
            if frozen := self._state.in_flight(origin):
                trace.get_current_span().set_attribute(names.SWITCH_FROZEN, frozen)
                self._room.freeze(origin, self._freeze_limit)
        elif self._state.in_flight(origin) or self._room.activation.interrupted:
            self._room.activation.end()

    async def _recover(self, origin: str | None, to: str, exc: Exception, switch: SpanContext) -> None:
        """Tell those who waited, back off, and find out from the servers where things stand."""
        granted = self._state.fail()
        if not isinstance(exc, PolicyError):  # those have been told and logged already
            reason = str(exc) if isinstance(exc, LLMuxError) else f"unexpected error: {exc!r}"
            failure = self._backoff.failed(to, reason, self._clock())
            text = "switching from %r to %r failed (%d in a row), next attempt in %.1f s: %s"
            trace_back = None if isinstance(exc, LLMuxError) else exc
            logger.error(text, origin, to, failure.in_a_row, failure.pause, reason, exc_info=trace_back)
            self._room.refuse(to, partial(SwitchError, to, reason, retry_after=failure.pause, switch=switch))
        self._room.grant(granted)
        if self._state.mode is Mode.UNKNOWN:
            await self.reconcile()
