"""A clock that stands still unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.pool import Pool


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def slowly(pool: Pool, clock: Clock, **seconds: float) -> None:
    """Have each step of every backend take this long on the clock."""

    def slow(step: Callable[..., object], duration: float) -> Callable[..., object]:
        async def run(*args: object) -> object:
            clock.now += duration
            return await step(*args)  # type: ignore[misc]

        return run

    for backend in pool.backends.values():
        for name, duration in seconds.items():
            setattr(backend, name, slow(getattr(backend, name), duration))
