"""One request inside the simulated engine, and the scheduler's pause states."""

from __future__ import annotations

import asyncio
from enum import Enum

__all__ = ["PauseState", "Sequence"]


class PauseState(Enum):
    """What the scheduler does."""

    UNPAUSED = "unpaused"
    """Starts waiting requests, steps running ones."""
    PAUSED_NEW = "paused_new"
    """Steps running requests, starts none."""
    PAUSED_ALL = "paused_all"
    """Everything stands still."""


class Sequence:
    """One request inside the engine. `total` tokens are to be generated; `finish` is the reason once it has ended.

    Reasons: `length`, `abort`, `error` (the engine died), `gone` (the client left).
    """

    __slots__ = ("arrived", "changed", "finish", "prompt", "ready", "started", "timer", "tokens", "total")

    def __init__(self, prompt: str, total: int) -> None:
        self.prompt = prompt
        self.total = total
        self.arrived = 0.0
        self.tokens: list[int] = []  # drawn when it starts: they depend on the weights then
        self.ready = 0  # tokens generated; exact only once finished
        self.started: float | None = None  # loop time at which the first token's prefill was over
        self.finish: str | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.changed: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Wake the coroutine that waits in `Engine.produced`."""
        if self.changed is not None and not self.changed.done():
            self.changed.set_result(None)
