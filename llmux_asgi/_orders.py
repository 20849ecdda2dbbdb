"""What the driver is told to do apart from what waiting requests ask for: put a model to sleep, end its process."""

from __future__ import annotations

import enum

import anyio
from opentelemetry import context as otel_context

__all__ = ["Order", "OrderKind"]


class OrderKind(enum.Enum):
    """What is to be done."""

    SLEEP = "sleep"
    """Let running requests finish and put the model to sleep."""
    STOP = "stop"
    """The same, and end its process; also if it sleeps already."""
    IDLE = "idle"
    """Put the model to sleep, if nobody has come meanwhile."""


class Order:
    """One of it. It is carried out whether the one who gave it stays or leaves."""

    def __init__(self, kind: OrderKind, model: str) -> None:
        self.kind = kind
        self.model = model
        self.context = otel_context.get_current()
        """The trace of whoever gave it."""
        self.error: Exception | None = None
        self.done = anyio.Event()

    def finish(self, error: Exception | None = None) -> None:
        """It was carried out, or `error` is why not."""
        self.error = error
        self.done.set()
