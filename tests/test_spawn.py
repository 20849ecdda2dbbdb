"""Tasks that belong to nobody's request."""

from __future__ import annotations

import anyio
import pytest

from llmux_asgi._spawn import Later

pytestmark = pytest.mark.anyio


async def test_what_is_to_be_done_later_is_done() -> None:
    done = anyio.Event()

    async def run() -> None:
        done.set()

    Later(run, 0.0)
    with anyio.fail_after(5):
        await done.wait()


async def test_what_is_stopped_in_time_is_never_begun() -> None:
    begun = anyio.Event()

    async def run() -> None:
        begun.set()

    stopped = Later(run, 0.0)
    stopped.stop()
    stopped.stop()
    await anyio.wait_all_tasks_blocked()
    after = anyio.Event()

    async def set_after() -> None:
        after.set()

    Later(set_after, 0.0)
    with anyio.fail_after(5):
        await after.wait()
    assert not begun.is_set()


async def test_what_has_begun_is_cancelled() -> None:
    begun, cancelled = anyio.Event(), anyio.Event()

    async def run() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    running = Later(run, 0.0)
    with anyio.fail_after(5):
        await begun.wait()
        running.stop()
        await cancelled.wait()
