"""Requests that leave or time out, in each phase of a switch. On asyncio and on trio."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    FifoPolicy,
    Mode,
    Phase,
    QueueTimeoutError,
    SwitchError,
)
from tests.support.pool import Pool, Request, running, until_phase, until_waiting

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN])
async def test_the_only_waiter_is_cancelled_before_the_point_of_no_return(phase: Phase) -> None:
    pool = Pool(FifoPolicy(min_active_duration=60 if phase is Phase.COOLDOWN else 0))
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await until_phase(pool, phase)
        second.scope.cancel()
        await second.done.wait()
        (await run.served("a")).finish.set()
        first.finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]
    assert pool.switcher.statistics().abandoned == 1


@pytest.mark.parametrize("step", ["sleep", "wake", "ready"])
async def test_the_request_that_began_the_switch_is_cancelled_while_a_step_is_on_the_wire(step: str) -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        gate = pool.backends["a" if step == "sleep" else "b"].gate(step)
        leader = run.send("b")
        await gate.entered.wait()
        follower = run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        leader.scope.cancel()
        await leader.done.wait()
        gate.open.set()
        await follower.done.wait()
    assert pool.gpu.events[2:] == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_a_switch_that_everybody_left_during_the_sleep_does_not_wake() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        gate = pool.backends["a"].gate("sleep")
        second = run.send("b")
        await gate.entered.wait()
        second.scope.cancel()
        await second.done.wait()
        gate.open.set()
        third = run.send("a", finish=True)
        await third.done.wait()
    assert pool.gpu.events[2:] == ["sleep a", "asleep a", "wake a", "awake a"]


async def test_a_switch_that_everybody_left_during_the_wake_completes_and_leaves_the_model_active() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("a")
        await gate.entered.wait()
        first.scope.cancel()
        gate.open.set()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_waiter_cancelled_at_the_instant_of_its_grant_gives_the_lease_back() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("ready")
        first = run.send("a")
        await gate.entered.wait()
        gate.open.set()
        while pool.switcher.statistics().mode is not Mode.ACTIVE:
            await anyio.lowlevel.checkpoint()
        first.scope.cancel()  # granted, and perhaps not even resumed yet
        await first.done.wait()
        assert pool.switcher.statistics().in_flight["a"] == 0


async def test_the_only_waiter_leaves_with_the_last_release_of_a_drain() -> None:
    pool = Pool()
    async with running(pool) as run:
        lease = await pool.switcher.acquire("a")
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        second.scope.cancel()
        lease.release()
        await second.done.wait()
        third = run.send("b", finish=True)  # a new one, that a switch given up must not carry over the edge
        await third.done.wait()
    assert pool.gpu.violations == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio has no other cancellation than the one tested above
async def test_natively_cancelled_hosts_do_not_reach_into_a_step() -> None:
    """asyncio's own cancellation passes through anyio's shields: the switch must not run in the request's task."""
    pool = Pool()
    gate = pool.backends["a"].gate("wake")
    request = Request()
    async with running(pool) as run:
        task = asyncio.get_running_loop().create_task(pool.request(request, "a"))
        await gate.entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # on trio only the end of the loop can do it
async def test_a_driver_that_is_cancelled_with_its_loop_refuses_who_waits_and_believes_nothing() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("a")
        await gate.entered.wait()
        [driver] = [task for task in asyncio.all_tasks() if task.get_name() == "llmux_asgi switcher"]
        driver.cancel()
        await first.done.wait()
        assert isinstance(first.error, SwitchError)
        assert pool.switcher.statistics().mode is Mode.UNKNOWN
        pool.gpu.half_woken.clear()
        (await run.served("a")).finish.set()


async def test_the_target_of_a_switch_is_given_up_for_its_own_waiters_only() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        third = run.send("c")
        await until_waiting(pool, "c", 1)
        third.scope.cancel()
        await third.done.wait()
        first.finish.set()
        await second.done.wait()
    assert pool.switcher.statistics().abandoned == 0


async def test_a_waiter_that_times_out_gets_an_error_that_says_why_and_leaves_the_queue() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", timeout=0.01)
        await second.done.wait()
        assert isinstance(second.error, QueueTimeoutError)
        assert "from 'a' (1 in flight), in the phase 'drain'" in str(second.error)
        assert pool.switcher.statistics().waiting["b"] == 0
        # Nobody waits any more: the switch is given up and a goes on, though its first request still runs.
        (await run.served("a")).finish.set()
        first.finish.set()
    assert "sleep a" not in pool.gpu.events
    assert pool.switcher.statistics().abandoned == 1


async def test_a_request_gets_its_timeout_in_time_while_a_step_is_on_the_wire() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["b"].gate("wake")
        first = run.send("b", timeout=0.3)
        await gate.entered.wait()
        await first.done.wait()  # although the wake that it caused is not over
        assert isinstance(first.error, QueueTimeoutError)
        gate.open.set()
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["wake b", "awake b"]
