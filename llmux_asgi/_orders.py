"""What the driver is told to do apart from what waiting requests ask for: put a model to sleep, end its process."""

from __future__ import annotations

import enum
from collections.abc import Callable

import anyio
from opentelemetry import context as otel_context
from opentelemetry.context import Context

__all__ = ["Order", "OrderKind"]


class OrderKind(enum.Enum):
    """What is to be done."""

    SLEEP = "sleep"
    """Let running requests finish and put the model to sleep."""
    STOP = "stop"
    """The same, and end its process; also if it sleeps already."""
    IDLE = "idle"
    """Put the model to sleep because nobody has asked for it, unless somebody has meanwhile."""


class Order:
    """One of it. It is carried out whether the one who gave it stays or leaves."""

    def __init__(self, kind: OrderKind, model: str, is_due: Callable[[str], bool] = lambda model: True) -> None:
        self.kind = kind
        self.model = model
        self.is_due = is_due
        """Asked right before it is carried out, and again before the point of no return."""
        self.context = Context() if kind is OrderKind.IDLE else otel_context.get_current()
        """The trace of whoever gave it, if it was somebody."""
        self.error: Exception | None = None
        self.done = anyio.Event()

    def finish(self, error: Exception | None = None) -> None:
        """It was carried out, or `error` is why not."""
        self.error = error
        self.done.set()
