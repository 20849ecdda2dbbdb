"""What a request holds while it waits for its model, and while it is being served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
from opentelemetry import context as otel_context
from opentelemetry import trace

from ._state import Ticket
from .exceptions import LLMuxError

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

    from .switcher import ModelSwitcher

__all__ = ["Activation", "Lease", "Waiter"]


class Activation:
    """One stretch of time in which a model was awake; shared by the leases granted in it.

    `previous` is the one before, if a failed switch has interrupted it and the same model has gone on.
    """

    __slots__ = ("exchanges", "interrupted", "leases", "over", "previous")

    def __init__(self, previous: Activation | None = None) -> None:
        self.previous = previous
        self.interrupted = False
        """Whether it is being ended, or was, while leases were held."""
        self.over = False
        """Whether the model is confirmed asleep: what has not been answered by now never will be."""
        self.leases: set[Lease] = set()
        """The leases of it that are held."""
        self.exchanges: set[Callable[[], None]] = set()
        """To be called when it is over, by the exchanges with the server that are still under way."""

    def end(self) -> None:
        """Void the leases that are still held, because the model is confirmed out of memory, and tell who holds them."""
        self.interrupted = self.over = True
        for lease in list(self.leases):
            lease.release()
        for tell in self.exchanges:
            tell()
        if self.previous is not None:
            self.previous.end()


class Lease:
    """The right to have one request answered by an awake model. It keeps the model awake until it is released.

    If the model is put to sleep all the same (draining off, a deadline passed), the lease is void from then on.
    """

    __slots__ = ("_activation", "_released", "_switcher", "head_start", "model", "switch", "waited")

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

    @property
    def interrupted(self) -> bool:
        """Whether the model was put to sleep while this lease was held: what the server answers now is cut short."""
        return self._activation.interrupted

    @contextmanager
    def exchange(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """While in the block, have `interrupt` called when the model sleeps although this lease is held."""
        exchanges = self._activation.exchanges
        exchanges.add(interrupt)
        try:
            if self._activation.over:
                interrupt()
            yield
        finally:
            exchanges.discard(interrupt)

    def release(self) -> None:
        """Give the lease back. Never waits, and may be called again."""
        if not self._released:
            self._released = True
            self._activation.leases.discard(self)
            self._switcher._release(self.model, self.head_start)

    def distrust(self) -> None:
        """Report that the server did not behave as an awake one does: every server is asked before the next request."""
        self._switcher.distrust()


class Waiter(Ticket):
    """A ticket with the means to tell its request, and the trace that the request belongs to."""

    __slots__ = ("activation", "context", "error", "event", "span", "switch")

    def __init__(self, model: str, since: float, head_start: float = 0.0) -> None:
        super().__init__(model, since, head_start)
        self.event = anyio.Event()
        self.context = otel_context.get_current()
        self.span = trace.get_current_span().get_span_context()
        self.error: Callable[[], LLMuxError] | None = None
        self.activation: Activation | None = None
        self.switch: SpanContext | None = None
