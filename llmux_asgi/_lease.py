"""What a request holds while it waits for its model, and while it is being served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import anyio
from opentelemetry import context as otel_context
from opentelemetry import trace

from . import _names as names
from ._state import Ticket
from .exceptions import LLMuxError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext

    from .switcher import ModelSwitcher

__all__ = ["Activation", "Exchange", "Freeze", "Lease", "Waiter", "leased"]


class Exchange(Protocol):
    """What holds a lease and is told, from `Lease.join` to `Lease.leave`, what becomes of its request."""

    def interrupt(self) -> None:
        """Called when the model is asleep: what has not been answered by now never will be."""
        ...

    def freeze(self, freeze: Freeze) -> None:
        """Called when the model is asleep, and the request goes on when it is woken."""
        ...


class _Told:
    """An exchange made of two functions, under way while in the block."""

    __slots__ = ("_lease", "freeze", "interrupt")

    def __init__(self, lease: Lease, interrupt: Callable[[], None], freeze: Callable[[Freeze], None]) -> None:
        self._lease = lease
        self.interrupt = interrupt
        self.freeze = freeze

    def __enter__(self) -> None:
        self._lease.join(self)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None) -> None:
        self._lease.leave(self)


@dataclass(frozen=True, slots=True)
class Freeze:
    """A stretch of time in which the requests of a model are kept by its server and do not go on."""

    since: float
    """On the switcher's clock."""
    limit: float
    """For how many seconds a request may be frozen."""
    over: anyio.Event = field(default_factory=anyio.Event)
    """Set when the requests go on, or are given up."""


class Activation:
    """One stretch of time in which a model was awake; shared by the leases granted in it.

    A switch that freezes its requests does not end it: it goes on at the model's next turn. `previous` is the one before, if
    a failed switch has interrupted it and the same model has gone on.
    """

    __slots__ = ("error", "exchanges", "freeze", "interrupted", "leases", "over", "previous", "switch_took")

    def __init__(self, previous: Activation | None = None) -> None:
        self.previous = previous
        self.error: Callable[[], LLMuxError] | None = None
        """What to tell those whose requests it has cut short, if it is something else than that."""
        self.interrupted = False
        """Whether it is being ended, or was, while leases were held."""
        self.over = False
        """Whether the model is confirmed asleep: what has not been answered by now never will be."""
        self.leases: set[Lease] = set()
        """The leases of it that are held."""
        self.freeze: Freeze | None = None
        """What its requests are in the middle of, if they are frozen."""
        self.switch_took = 0.0
        """How many seconds the switch has taken that led to it."""
        self.exchanges: set[Exchange] = set()
        """The exchanges with the server that are under way."""

    def begin_freeze(self, freeze: Freeze) -> None:
        """Stop the clocks of the requests: the server is confirmed asleep and keeps them."""
        self.freeze = freeze
        for lease in self.leases:
            lease.freezes += 1
            lease.span.add_event("frozen")
        for exchange in list(self.exchanges):
            exchange.freeze(freeze)
        if self.previous is not None:
            self.previous.begin_freeze(freeze)

    def end_freeze(self, now: float) -> None:
        """The requests go on."""
        if self.freeze is not None:
            self.freeze.over.set()
            for lease in self.leases:
                lease.frozen_time += now - self.freeze.since
                lease.span.add_event("thawed")
                lease.span.set_attributes({names.FREEZES: lease.freezes, names.FROZEN_TIME: lease.frozen_time})
            self.freeze = None
        if self.previous is not None:
            self.previous.end_freeze(now)

    def end(self, error: Callable[[], LLMuxError] | None = None) -> None:
        """Void the leases that are still held, because the model is confirmed out of memory, and tell who holds them.

        `error` makes what they are told in place of `InterruptedRequestError`.
        """
        self.interrupted = self.over = True
        self.error = error
        for lease in list(self.leases):
            lease.release()
        if self.freeze is not None:
            self.freeze.over.set()
        for exchange in list(self.exchanges):
            exchange.interrupt()
        if self.previous is not None:
            self.previous.end(error)


class Lease:
    """The right to have one request answered by an awake model. It keeps the model awake until it is released.

    If the model is put to sleep all the same (draining off, a deadline passed), the lease is void from then on.
    """

    __slots__ = (
        "_activation",
        "_released",
        "_switcher",
        "context",
        "freezes",
        "frozen_time",
        "head_start",
        "model",
        "switch",
        "waited",
    )

    def __init__(
        self,
        switcher: ModelSwitcher,
        activation: Activation,
        model: str,
        waited: float = 0.0,
        switch: SpanContext | None = None,
        head_start: float = 0.0,
    ) -> None:
        self._switcher = switcher
        self._activation = activation
        self._released = False
        activation.leases.add(self)
        self.model = model
        """The model's configured name, aliases resolved."""
        self.waited = waited
        """For how many seconds the request waited for its model."""
        self.switch = switch
        """The span of the switch that it waited for, if it waited for one."""
        self.head_start = head_start
        """The head start of the request's priority class, in seconds."""
        self.freezes = 0
        """How often a switch has frozen the request."""
        self.frozen_time = 0.0
        """For how many seconds it has been frozen, in all the freezes that are over."""
        self.context = otel_context.get_current()
        """The trace that the request belongs to."""

    @property
    def span(self) -> Span:
        """The request's span."""
        return trace.get_current_span(self.context)

    @property
    def is_traced(self) -> bool:
        """Whether there is a trace that its request may belong to."""
        return self._switcher.telemetry.is_traced

    @property
    def switch_time(self) -> float | None:
        """For how many of the seconds that the request has waited its switch was under way; `None`: it waited for none."""
        return min(self.waited, self._activation.switch_took) if self.switch is not None else None

    @property
    def freeze(self) -> Freeze | None:
        """What the request is in the middle of, if it is frozen: its server sleeps and goes on with it afterwards."""
        return self._activation.freeze

    @property
    def error(self) -> LLMuxError | None:
        """Why the lease is void, if it is for another reason than that its model had to make way."""
        return self._activation.error() if self._activation.error is not None else None

    @property
    def interrupted(self) -> bool:
        """Whether the model was put to sleep while this lease was held: what the server answers now is cut short."""
        return self._activation.interrupted

    def join(self, exchange: Exchange) -> None:
        """Have `exchange` told when the model sleeps although this lease is held, at once if it already does."""
        activation = self._activation
        activation.exchanges.add(exchange)
        if activation.over:
            exchange.interrupt()
        elif activation.freeze is not None:
            exchange.freeze(activation.freeze)

    def leave(self, exchange: Exchange) -> None:
        """Have it told no more."""
        self._activation.exchanges.discard(exchange)

    def exchange(
        self, interrupt: Callable[[], None], freeze: Callable[[Freeze], None] = lambda freeze: None
    ) -> AbstractContextManager[None]:
        """While in the block, have `interrupt` called when the model sleeps although this lease is held.

        `freeze` is called when it sleeps and its server keeps the request, to go on with it when it is woken.
        """
        return _Told(self, interrupt, freeze)

    def release(self) -> None:
        """Give the lease back. Never waits, and may be called again."""
        if not self._released:
            self._released = True
            self._activation.leases.discard(self)
            self._switcher._release(self.model, self.head_start, frozen=self._activation.freeze is not None)

    def count_failure(self, error: LLMuxError) -> None:
        """Have it counted that the request failed after its answer had begun."""
        self._switcher.telemetry.request_failed(self.model, error)

    def distrust(self) -> None:
        """Report that the server did not behave as an awake one does: every server is asked before the next request."""
        self._switcher.distrust()


async def leased(acquire: Callable[[], Awaitable[Lease]], gone: Callable[[], Awaitable[None]]) -> Lease | None:
    """Wait for `acquire` as long as `gone` has not returned. Returns `None` if it has; raises what `acquire` raises."""
    lease: Lease | None = None
    error: LLMuxError | None = None

    async def watch() -> None:
        await gone()
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                lease = await acquire()
            except LLMuxError as exc:  # by itself, not in a group
                error = exc
            tasks.cancel_scope.cancel()
    except BaseException:
        if lease is not None:
            lease.release()
        raise
    if error is not None:
        raise error
    return lease


class Waiter(Ticket):
    """A ticket with the means to tell its request, and the trace that the request belongs to."""

    __slots__ = ("activation", "context", "error", "event", "switch")

    def __init__(self, model: str, since: float, head_start: float = 0.0) -> None:
        super().__init__(model, since, head_start)
        self.event = anyio.Event()
        self.context = otel_context.get_current()
        self.error: Callable[[], LLMuxError] | None = None
        self.activation: Activation | None = None
        self.switch: SpanContext | None = None

    @property
    def span(self) -> Span:
        """The request's span."""
        return trace.get_current_span(self.context)
