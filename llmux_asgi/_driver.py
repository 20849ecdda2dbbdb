"""The driver: asks the policy and carries out its switches, for as long as somebody waits.

It is one task for the whole switcher. It belongs to no request: a client that goes away, a time limit, a cancelled host never
reach into a step that is on the wire.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import anyio
from opentelemetry.context import Context

from . import _names as names
from ._backoff import Backoff
from ._decision import Decider
from ._estimates import Estimates
from ._journal import Journal
from ._lease import Lease, Waiter
from ._orders import Order, OrderKind
from ._reconcile import Reconciler
from ._record import SwitchRecords
from ._room import WaitingRoom
from ._servers import Servers
from ._spawn import only_own_cancellation, spawn
from ._state import Mode, Phase, Ticket
from ._steps import Steps
from .backends import STOP_LEVEL
from .exceptions import LLMuxError, OperationError, PolicyError, SwitchError
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
        journal: Journal,
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
        self._journal = journal
        self.records = SwitchRecords(journal, telemetry, clock)
        self._sleep_level = sleep_level
        self._clock = clock
        self._save_estimates = save_estimates
        self._steps = Steps(servers, room.state, self.records, sleep_level, estimates, clock)
        self._decider = Decider(policy, room.state, clock, self._blame_policy, lambda: room.changed.set(), self._steps.costs)
        room.drop_deferral = self._decider.drop
        self._orders: deque[Order] = deque()
        self._lock: anyio.Lock | None = None
        self.reconcile = Reconciler(room, servers, backoff, journal, sleep_level)
        """Adopt what the servers say. Only under the lock."""
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
        """Somebody has come to wait, or there is an order: decide, in a task that ends when there is nothing left to do."""
        self._room.changed.set()
        if not self.driving:
            self.driving = True
            self.stopped = anyio.Event()
            spawn(self._drive, "llmux_asgi switcher")

    def order(self, order: Order) -> None:
        """Have `order` carried out, after the switch that is under way and before the next one."""
        self._orders.append(order)
        self.wake()

    def refuse_orders(self, reason: str) -> None:
        """Refuse the orders that wait, and give up the one that is being carried out, if that can be."""
        while self._orders:
            self._orders.popleft().finish(OperationError(reason))
        if self._room.give_up is not None and self._state.target is None:
            self._room.give_up.cancel()

    async def _drive(self) -> None:
        try:
            with only_own_cancellation():
                await self._serve_queues()
        except Exception as exc:
            logger.exception("the switcher met an unexpected error")
            self._journal.error(None, type(exc).__name__, f"unexpected error: {exc!r}")
            self._room.refuse_all(f"unexpected error: {exc!r}")
        finally:
            self.driving = False
            self._decider.drop_all()
            if self._state.mode is Mode.SWITCHING:
                self._room.grant(self._state.fail())
                self.records.end("failed")
            # Somebody still waits only if the event loop is being closed around this task.
            self._room.refuse_all(CLOSING)
            self.refuse_orders(CLOSING)
            self.stopped.set()

    async def _serve_queues(self) -> None:
        while self._state.waiting_models() or self._orders:
            self._room.changed = anyio.Event()
            if self._state.mode is Mode.UNKNOWN:
                async with self.exclusively():
                    unclear = await self.reconcile()
                if unclear is not None:
                    self.refuse_orders(unclear)
                if self._state.mode is Mode.UNKNOWN and self._state.waiting_models():
                    with anyio.move_on_after(_ASK_AGAIN):
                        await self._room.changed.wait()
            elif self._orders:
                async with self.exclusively():
                    if self._orders:  # they may have been refused while the lock was awaited
                        await self._carry_out(self._orders.popleft())
            elif (target := self._decider.choose()) is not None:
                async with self.exclusively():
                    await self._switch(target)
            else:
                # At least a millisecond: a policy that names a time which is past must not keep the event loop busy.
                with anyio.move_on_after(max(self._decider.ask_again_at - self._clock(), 0.001)):
                    await self._room.changed.wait()

    async def _carry_out(self, order: Order) -> None:
        state, model = self._state, order.model
        try:
            if state.mode not in (Mode.IDLE, Mode.ACTIVE):
                self._orders.appendleft(order)  # while the lock was awaited, something happened: ask the servers first
                return
            if self._servers.closing:
                raise OperationError(CLOSING)
            if model == state.active:
                if order.is_due(model):
                    await self._switch(None, order)
            elif order.kind is OrderKind.STOP:
                await self._stop_sleeper(model)
        except Exception as exc:  # noqa: BLE001 - whatever a backend raises is for the one who gave the order
            order.finish(exc)
        else:
            order.finish(order.error)

    async def _stop_sleeper(self, model: str) -> None:
        if frozen := self._state.frozen(model):
            raise OperationError(f"The model {model!r} cannot be stopped now: {frozen} requests are frozen in its process.")
        try:
            await self._servers.end(model)
        except Exception:
            self._state.distrust()
            raise

    def _blame_policy(self, model: str | None, what: str, exc: Exception | None = None, *, refuse: bool = True) -> PolicyError:
        error = f"The switch policy {type(self._policy).__name__} failed for the model {model!r}: {what}"
        logger.error(error, exc_info=exc)
        self._journal.error(model, PolicyError.__name__, error)
        if refuse and model is not None:
            self._room.refuse(model, partial(PolicyError, error))
        return PolicyError(error)

    def exclusively(self) -> anyio.Lock:
        """The lock that guards every change of who is awake."""
        if self._lock is None:
            self._lock = anyio.Lock()
        return self._lock

    # One switch

    async def _switch(self, to: str | None, order: Order | None = None) -> None:
        """Switch to `to`; to nothing if `order` says so, whose error is set if that fails."""
        state, origin = self._state, self._state.active
        if order is None and (
            state.mode not in (Mode.IDLE, Mode.ACTIVE) or to is None or to == origin or not state.depth(to) or state.held
        ):
            return  # while the lock was awaited, something happened that asks for a new decision
        waiters = self._those_who_wait_for(to)
        attributes: dict[str, str | int] = {
            names.SWITCH_POLICY: type(self._policy).__name__,
            names.SWITCH_WAITING: len(waiters),
            names.SWITCH_IN_FLIGHT: state.in_flight(origin),
        }
        if to is not None:
            attributes[names.SWITCH_TO] = to
        if origin is not None:
            stops = order is not None and order.kind is OrderKind.STOP
            level = STOP_LEVEL if stops else self._sleep_level(origin)
            attributes |= {names.SWITCH_FROM: origin, names.SWITCH_SLEEP_LEVEL: level}
        self.reconcile.freeze_limit = None
        state.begin(to)
        self.records.begin(origin, to, waiting=len(waiters), in_flight=state.in_flight(origin))
        served, longest_wait = 0, None
        parent = order.context if order is not None else waiters[0].context if waiters else Context()
        links = [waiter.span.get_span_context() for waiter in waiters]
        with self._telemetry.switch(parent, links, attributes) as span:
            error: Exception | None = None
            try:
                with only_own_cancellation():
                    switched = await self._prepare(origin, to, order) and await self._execute(origin, to, order)
            except Exception as exc:  # noqa: BLE001 - whatever a backend raises, nothing may be left half-done
                outcome, error = "failed", exc
                failed(span, exc)
                self._link_newcomers(span, waiters, to)
                if order is not None:
                    order.error = exc
                await self._recover(origin, to, exc, span.get_span_context())
            else:
                outcome = "completed" if switched else "abandoned"
                self._link_newcomers(span, waiters, to)
                if switched and to is not None:
                    longest_wait = state.first_waits(self._clock()).get(to)
                granted = self._settle(to, switched=switched)
                served = state.in_flight(to)
                self._room.grant(granted, span.get_span_context())
                if order is not None and not switched and order.kind is not OrderKind.IDLE:
                    order.error = OperationError(CLOSING)
                self.reconcile.freeze_limit = None
            span.set_attribute(names.SWITCH_OUTCOME, outcome)
            duration = self.records.end(outcome, served=served, longest_wait=longest_wait)
            if outcome == "completed":
                if to is None:
                    logger.info(
                        "%s %r in %.3f s",
                        "stopped" if order and order.kind is OrderKind.STOP else "put to sleep",
                        origin,
                        duration,
                    )
                else:
                    text = "switched from %r to %r in %.3f s; %d requests waited for it"
                    logger.info(text, origin, to, duration, served)
                self._save_estimates()
            self._telemetry.switched(origin, to, outcome, duration, error)

    def _settle(self, to: str | None, *, switched: bool) -> list[Ticket]:
        """End the switch in the state machine. Returns the tickets that this grants."""
        if not switched:
            return self._state.abandon()
        self._room.begin(to)
        self._room.activation.switch_took = self.records.elapsed
        return self._state.slept() if to is None else self._state.complete(self._clock())

    def _those_who_wait_for(self, to: str | None) -> list[Waiter | Lease]:
        if to is None:
            return []
        frozen = self._room.frozen[to].leases if to in self._room.frozen else ()
        return [*(cast("Waiter", ticket) for ticket in self._state.waiters(to)), *frozen]

    def _link_newcomers(self, span: Span, linked: list[Waiter | Lease], to: str | None) -> None:
        for waiter in set(self._those_who_wait_for(to)).difference(linked):
            if (context := waiter.span.get_span_context()).is_valid:
                span.add_link(context)

    async def _prepare(self, origin: str | None, to: str | None, order: Order | None) -> bool:
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
            if order is None:
                await self._cool_down(origin)
            self._state.drain()
            self._room.shares.note(self._clock())
            await self._drain(origin, to)

        async def look() -> None:
            if to is not None:
                await self._servers.require_reachable(to, has_failed=wary)

        wary = to is not None and self._backoff.has_failed(to)
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
        if scope.cancel_called or (order is not None and not order.is_due(order.model)):
            return False
        return self._state.commit()

    async def _cool_down(self, origin: str | None) -> None:
        if origin is not None:
            with self.records.phase(Phase.COOLDOWN, origin):
                rest = self._state.active_since + self._policy.min_active_duration - self._clock()
                if rest > 0:
                    await anyio.sleep(rest)

    async def _drain(self, origin: str | None, to: str | None) -> None:
        async def wait(timeout: float | None) -> bool:
            with anyio.move_on_after(timeout):
                while self._state.in_flight(origin):
                    await self._room.drained.wait()
            return not self._state.in_flight(origin)

        async def preempt(max_freezes: int, max_frozen: float) -> None:
            if origin is None:
                return
            if to is None:
                await wait(None)
                return
            await self._servers.require_freezing(origin)
            while any(lease.freezes >= max_freezes for lease in self._room.activation.leases):
                await self._room.until_release()
            self.reconcile.freeze_limit = max_frozen

        self._room.drained = anyio.Event()
        context = SwitchContext(origin, to, lambda: self._state.in_flight(origin), wait, preempt)
        with self.records.phase(Phase.DRAIN, origin, {names.SWITCH_IN_FLIGHT: context.in_flight_count}):
            try:
                with only_own_cancellation():
                    await self._policy.prepare_switch(context)
            except Exception as exc:
                raise self._blame_policy(to or origin, f"prepare_switch raised {exc!r}", exc, refuse=to is not None) from exc

    async def _execute(self, origin: str | None, to: str | None, order: Order | None) -> bool:
        """Put everything else to sleep and wake `to`. Returns False if nobody waited for it any more when that was due.

        If there is no `to`, put `origin` to sleep or end its process, as `order` says.
        """
        keep = self.reconcile.freeze_limit is not None

        def interrupt() -> None:
            if self._state.in_flight(origin) and not keep:
                self._room.activation.interrupted = True

        if to is None:
            if origin is not None and order is not None:
                interrupt()
                await (self._steps.stop(origin) if order.kind is OrderKind.STOP else self._steps.put_to_sleep(origin))
            self.reconcile.leave(origin)
            return True
        await self._servers.settle(to)
        await self._steps.make_room(to, origin, interrupt, keep=keep)
        self.reconcile.leave(origin)
        self._state.wake()
        if not self._state.depth(to):
            return False
        await self._steps.bring_up(to)
        self._backoff.succeeded(to)
        return True

    async def _recover(self, origin: str | None, to: str | None, exc: Exception, switch: SpanContext) -> None:
        """Tell those who waited, back off, and find out from the servers where things stand."""
        granted = self._state.fail()
        if not isinstance(exc, PolicyError):  # those have been told and logged already
            reason = str(exc) if isinstance(exc, LLMuxError) else f"unexpected error: {exc!r}"
            trace_back = None if isinstance(exc, LLMuxError) else exc
            self._journal.error(to or origin, type(exc).__name__, reason)
            if to is None:
                logger.error("putting the model %r to sleep failed: %s", origin, reason, exc_info=trace_back)
            else:
                failure = self._backoff.failed(to, reason, self._clock())
                text = "switching from %r to %r failed (%d in a row), next attempt in %.1f s: %s"
                logger.error(text, origin, to, failure.in_a_row, failure.pause, reason, exc_info=trace_back)
                self._room.refuse(to, partial(SwitchError, to, reason, retry_after=failure.pause, switch=switch))
        self._room.grant(granted)
        if self._state.mode is Mode.UNKNOWN:
            await self.reconcile()
