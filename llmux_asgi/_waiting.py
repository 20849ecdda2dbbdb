"""Waits with a time limit that cost nothing where there is nothing to wait for.

A cancel scope for each message costs more than the message. Mostly `receive` has its message at hand, and `send` has room for
its own: they return without a wait, and no timer is set.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import anyio
from starlette.types import Message, Send

__all__ = ["Cancellable", "SendWatch", "within"]

_T = TypeVar("_T")


class _Rest(Generic[_T]):
    """What is left of an awaitable that was begun and is suspended on `suspended_on`: `yield from` would begin it anew.

    As for `yield from`, an iterator will do: only a generator can be sent something, told of an error, or closed.
    """

    __slots__ = ("_steps", "_suspended_on")

    def __init__(self, steps: Iterator[Any], suspended_on: object) -> None:
        self._steps = steps
        self._suspended_on = suspended_on

    def __await__(self) -> Generator[Any, Any, _T]:
        steps: Any = self._steps
        suspended_on = self._suspended_on
        try:
            while True:
                try:
                    value = yield suspended_on
                except GeneratorExit:
                    if hasattr(steps, "close"):
                        steps.close()
                    raise
                except BaseException as exc:  # handed on to where it belongs
                    if not hasattr(steps, "throw"):
                        raise
                    suspended_on = steps.throw(exc)
                else:
                    suspended_on = next(steps) if value is None else steps.send(value)
        except StopIteration as end:
            result: _T = end.value
            return result


async def within(seconds: float, awaitable: Awaitable[_T]) -> _T:
    """Await `awaitable`. If it has not returned after `seconds` it is cancelled. Raises `TimeoutError`."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # trio: a scope is cheap there, and there is no other way
        with anyio.fail_after(seconds):
            return await awaitable
    steps = awaitable.__await__()
    try:
        suspended_on = next(steps)
    except StopIteration as end:
        result: _T = end.value
        return result
    return await _limited(seconds, _Rest(steps, suspended_on), loop)


async def _limited(seconds: float, rest: _Rest[_T], loop: asyncio.AbstractEventLoop) -> _T:
    task = asyncio.current_task()
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        if task is not None:
            task.cancel()

    timer = loop.call_later(max(0.0, seconds), expire)
    try:
        return await rest
    except asyncio.CancelledError as exc:
        if late and task is not None and task.uncancel() == 0:
            raise TimeoutError from exc
        raise
    finally:
        timer.cancel()


class Cancellable:
    """A block that other tasks may cancel, as an `anyio.CancelScope`, which costs five times as much on asyncio."""

    __slots__ = ("_before", "_cancelled", "_scope", "_task", "_timer", "cancelled_caught")

    def __init__(self) -> None:
        self.cancelled_caught = False
        """Whether it was left because of `cancel`."""
        self._cancelled = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._scope: anyio.CancelScope | None = None

    def __enter__(self) -> None:
        try:
            self._task = asyncio.current_task()
        except RuntimeError:
            self._scope = anyio.CancelScope()
            self._scope.__enter__()
        else:
            assert self._task is not None  # noqa: S101 (for the type)
            self._before = self._task.cancelling()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, where: TracebackType | None) -> bool:
        if self._scope is not None:
            caught = self._scope.__exit__(kind, exc, where)
            self.cancelled_caught = self._scope.cancelled_caught
            return caught
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if task is not None and self._cancelled and task.uncancel() <= self._before:
            self.cancelled_caught = kind is asyncio.CancelledError
        return self.cancelled_caught

    def cancel(self) -> None:
        """Have the block left. Nothing happens if it was left already."""
        if self._scope is not None:
            self._scope.cancel()
        elif self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def cancel_after(self, seconds: float) -> None:
        """Have it left in so many seconds, if it is not over by then."""
        if self._scope is not None:
            self._scope.deadline = anyio.current_time() + seconds
        elif self._task is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.cancel)


class SendWatch:
    """Sends messages, and calls `stalled` once if one of them is not taken for `limit` seconds.

    It does not cancel the `send`: some servers shield theirs (hypercorn on trio). `start` starts a task that ends with the
    exchange; that happens when a message has to wait for the first time.
    """

    __slots__ = ("_limit", "_send", "_since", "_stalled", "_start", "_watched")

    def __init__(
        self,
        send: Send,
        limit: float,
        start: Callable[[Callable[[], Coroutine[Any, Any, None]]], object],
        stalled: Callable[[], None],
    ) -> None:
        self._send = send
        self._limit = limit
        self._start = start
        self._since: float | None = None
        """When the message that is being sent began to wait."""
        self._watched = False
        self._stalled = stalled

    def end(self) -> None:
        """Nothing more is sent. Lets go of those who are told, who mostly hold this in turn."""
        self._start = self._stalled = _nobody

    @property
    def busy(self) -> bool:
        """Whether a message is waiting to be taken."""
        return self._since is not None

    async def __call__(self, message: Message) -> None:
        """Send one message. One at a time."""
        steps = self._send(message).__await__()
        try:
            suspended_on = next(steps)
        except StopIteration:
            return
        self._waits()
        try:
            await _Rest(steps, suspended_on)
        finally:
            self._since = None

    def _waits(self) -> None:
        self._since = anyio.current_time()
        if not self._watched:
            self._watched = True
            self._start(self._watch)

    async def _watch(self) -> None:
        while True:
            now = anyio.current_time()
            left = self._limit if self._since is None else self._since + self._limit - now
            if left <= 0:
                self._stalled()
                return
            await anyio.sleep(left)


def _nobody(*arguments: object) -> None:
    """Do nothing."""
