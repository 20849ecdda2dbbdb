"""Start a task that belongs to nobody's request, on asyncio and on trio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context, copy_context
from typing import Any

import anyio

__all__ = ["Later", "beside", "only_own_cancellation", "spawn"]

_running: set[asyncio.Task[None]] = set()
"""asyncio keeps only weak references to its tasks."""


def spawn(function: Callable[[], Awaitable[None]], name: str) -> None:
    """Run `function()` in a task of its own, with no context variables of the caller's. It must not raise.

    A switch is not run by the request that began it, because anyio's shields do not stop asyncio's own cancellation
    (`asyncio.timeout` in a host, a server that cancels handlers): a step on the wire has to run to its end all the same.
    """
    try:
        on_asyncio = asyncio.current_task() is not None
    except RuntimeError:
        on_asyncio = False
    if on_asyncio:
        task = asyncio.get_running_loop().create_task(_run(function), name=name, context=Context())
        _running.add(task)
        task.add_done_callback(_running.discard)
    else:
        import trio

        trio.lowlevel.spawn_system_task(function, name=name)


@asynccontextmanager
async def beside(function: Callable[[], Awaitable[None]], name: str) -> AsyncIterator[None]:
    """Run `function()` in a task of its own while in the block; at its end cancel it and wait for it. It must not raise.

    The block may be entered in one task and left in another one, unlike a task group's.
    """
    scope, done = anyio.CancelScope(), anyio.Event()

    async def run() -> None:
        try:
            with scope:
                await function()
        finally:
            done.set()

    spawn(run, name)
    try:
        yield
    finally:
        scope.cancel()
        await done.wait()


class Later:
    """Runs `function()` in a task of its own from `delay` seconds on, unless it is stopped before. It must not raise.

    Much cheaper than a task group where it is mostly stopped in time: then no task was ever made.
    """

    __slots__ = ("_function", "_handle", "_scope", "_task")

    def __init__(self, function: Callable[[], Coroutine[Any, Any, None]], delay: float) -> None:
        self._function = function
        self._task: asyncio.Task[None] | None = None
        self._scope: anyio.CancelScope | None = None
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            import trio

            self._scope = anyio.CancelScope()
            trio.lowlevel.spawn_system_task(self._run_on_trio, delay, context=copy_context())
        else:
            self._handle = loop.call_later(delay, self._start)

    def stop(self) -> None:
        """Do not begin, or cancel it. Does not wait for its end, and may be called again."""
        if self._scope is not None:
            self._scope.cancel()
            return
        self._handle.cancel()
        if self._task is not None:
            self._task.cancel()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._function())

    async def _run_on_trio(self, delay: float) -> None:
        assert self._scope is not None  # noqa: S101 (for the type)
        with self._scope:
            await anyio.sleep(delay)
            await self._function()


async def _run(function: Callable[[], Awaitable[None]]) -> None:
    await function()


@contextmanager
def only_own_cancellation() -> Iterator[None]:
    """Turn a CancelledError that was not meant for this task into a `RuntimeError`.

    On asyncio, who awaits a future that somebody else cancels gets the same exception as one who is cancelled itself.
    """
    try:
        yield
    except asyncio.CancelledError as exc:  # trio has another one
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError("somebody cancelled what it was waiting for") from exc
