"""Start a task that belongs to nobody's request, on asyncio and on trio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

__all__ = ["spawn"]

_running: set[asyncio.Task[None]] = set()
"""asyncio keeps only weak references to its tasks."""


def spawn(function: Callable[[], Awaitable[None]], name: str) -> None:
    """Run `function()` in a task of its own. It must not raise.

    A switch is not run by the request that began it, because anyio's shields do not stop asyncio's own cancellation
    (`asyncio.timeout` in a host, a server that cancels handlers): a step on the wire has to run to its end all the same.
    """
    try:
        on_asyncio = asyncio.current_task() is not None
    except RuntimeError:
        on_asyncio = False
    if on_asyncio:
        task = asyncio.get_running_loop().create_task(_run(function), name=name)
        _running.add(task)
        task.add_done_callback(_running.discard)
    else:
        import trio

        trio.lowlevel.spawn_system_task(function, name=name)


async def _run(function: Callable[[], Awaitable[None]]) -> None:
    await function()
