"""Time limits on single waits, on asyncio and on trio."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi._waiting import Cancellable, SendWatch, within

pytestmark = pytest.mark.anyio


async def at_once(value: str) -> str:
    return value


async def in_a_moment(value: str) -> str:
    """As a host's middleware does: open a task group, and wait in there."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.lowlevel.checkpoint)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
    return value


async def test_what_comes_in_time_is_returned() -> None:
    assert await within(5, at_once("x")) == "x"
    assert await within(5, in_a_moment("x")) == "x"


async def test_what_is_at_hand_needs_no_timer_even_if_it_is_late(monkeypatch: pytest.MonkeyPatch, anyio_backend: str) -> None:
    if anyio_backend == "asyncio":
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", None)
        assert await within(0, at_once("x")) == "x"


async def test_what_does_not_come_is_cancelled_and_a_timeout() -> None:
    ended = False

    async def never() -> None:
        nonlocal ended
        try:
            async with anyio.create_task_group():
                await anyio.sleep_forever()
        finally:
            ended = True

    with anyio.fail_after(5):
        with pytest.raises(TimeoutError):
            await within(0.01, never())
        assert ended
        await anyio.lowlevel.checkpoint()  # nothing of the cancellation is left


async def test_an_error_is_passed_on() -> None:
    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError("x")

    with pytest.raises(KeyError):
        await within(5, fail())


async def test_a_cancellation_from_outside_is_not_a_timeout() -> None:
    with anyio.fail_after(5):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(within, 60, anyio.sleep_forever())
                tasks.start_soon(within, 60, in_a_moment("x"))
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught


class Bare:
    """An awaitable as those of granian: what `__await__` gives is an iterator, and not a generator."""

    def __init__(self, future: asyncio.Future[str], *, can_be_told: bool = False) -> None:
        self._future = future
        self._begun = self.told = False
        if can_be_told:
            self.throw = self._throw

    def __await__(self) -> Bare:
        return self

    def __iter__(self) -> Bare:
        return self

    def __next__(self) -> asyncio.Future[str]:
        if self._future.done():
            raise StopIteration(self._future.result())
        self._future._asyncio_future_blocking = True
        return self._future

    def _throw(self, exc: BaseException) -> None:
        self.told = True
        raise exc


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)  # trio's own awaitables are all generators
async def test_an_awaitable_need_not_be_a_generator() -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    loop.call_soon(future.set_result, "x")
    assert await within(5, cast("Awaitable[str]", Bare(future))) == "x"

    with pytest.raises(TimeoutError):
        await within(0.01, cast("Awaitable[str]", Bare(loop.create_future())))
    last = Bare(loop.create_future(), can_be_told=True)
    with pytest.raises(TimeoutError):
        await within(0.01, cast("Awaitable[str]", last))
    assert last.told


class Sending:
    """A client that takes messages while `reads` is set."""

    def __init__(self) -> None:
        self.reads = anyio.Event()
        self.taken: list[Any] = []
        self.stalled = anyio.Event()

    async def send(self, message: Any) -> None:
        if not self.reads.is_set():
            await self.reads.wait()
        self.taken.append(message)


async def test_a_send_that_returns_at_once_starts_nothing() -> None:
    client = Sending()
    client.reads.set()
    started: list[Any] = []
    await SendWatch(client.send, 0.01, started.append, client.stalled.set)({"type": "x"})
    assert (client.taken, started) == ([{"type": "x"}], [])


async def test_a_send_that_is_not_taken_is_told_of_once_and_goes_on() -> None:
    client = Sending()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            watch = SendWatch(client.send, 0.02, tasks.start_soon, client.stalled.set)
            tasks.start_soon(watch, {"type": "x"})
            await client.stalled.wait()
            client.reads.set()  # it is left to who is told to cancel it
    assert client.taken == [{"type": "x"}]


@pytest.mark.parametrize(("sends", "pause"), [((0.0, 0.75), 0.75), ((0.0,), 1.0)])
async def test_the_time_of_a_send_that_is_over_does_not_count(
    monkeypatch: pytest.MonkeyPatch, sends: tuple[float, ...], pause: float
) -> None:
    now = 0.0
    pauses: list[float] = []
    over = anyio.Event()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            await anyio.sleep_forever()
        await over.wait()

    client = Sending()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            monkeypatch.setattr("llmux_asgi._waiting.anyio.current_time", lambda: now)
            monkeypatch.setattr("llmux_asgi._waiting.anyio.sleep", sleep)
            watch = SendWatch(client.send, 1.0, tasks.start_soon, client.stalled.set)
            for now in sends:
                client.reads = anyio.Event()
                tasks.start_soon(watch, {"type": "x"})
                await anyio.wait_all_tasks_blocked()
                if now == 0.0:
                    client.reads.set()
                    await anyio.wait_all_tasks_blocked()
            now = 1.0
            over.set()
            await anyio.wait_all_tasks_blocked()
            assert not client.stalled.is_set()
            assert pauses == [1.0, pause]
            monkeypatch.undo()
            tasks.cancel_scope.cancel()


async def test_a_block_is_left_when_another_task_cancels_it_and_nothing_of_that_is_left_over(anyio_backend: str) -> None:
    block, entered = Cancellable(), anyio.Event()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await entered.wait()
                block.cancel()
                block.cancel()

            tasks.start_soon(cancel)
            with block:
                entered.set()
                await anyio.sleep_forever()
            await anyio.lowlevel.checkpoint()
    assert block.cancelled_caught
    if anyio_backend == "asyncio":
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def test_to_cancel_a_block_that_is_over_does_nothing() -> None:
    block = Cancellable()
    with block:
        await anyio.lowlevel.checkpoint()
    block.cancel()
    await anyio.lowlevel.checkpoint()
    assert not block.cancelled_caught


async def test_a_block_is_left_after_a_time_or_ends_before_it() -> None:
    with anyio.fail_after(5):
        late, early = Cancellable(), Cancellable()
        with late:
            late.cancel_after(0.01)
            await anyio.sleep_forever()
        with early:
            early.cancel_after(60)
        await anyio.lowlevel.checkpoint()
    assert [late.cancelled_caught, early.cancelled_caught] == [True, False]


async def test_a_cancellation_from_outside_goes_through_a_block() -> None:
    block = Cancellable()
    with anyio.CancelScope() as scope, block:
        scope.cancel()
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert not block.cancelled_caught
