"""The switcher under interleavings that the tests force with gates. On asyncio and on trio."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    FifoPolicy,
    Phase,
    SwitchError,
)
from tests.support.fakes import FakeBackend
from tests.support.pool import Pool, running, until_phase, until_waiting

pytestmark = pytest.mark.anyio


async def test_the_first_request_wakes_its_model() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_model_found_awake_serves_without_any_switch() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
    assert pool.gpu.events == []


async def test_the_fast_path_neither_waits_nor_takes_the_lock() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        lease = pool.switcher.try_acquire("a")
        assert lease is not None
        assert pool.switcher.statistics().in_flight["a"] == 2
        lease.release()
        lease.release()
        assert pool.switcher.statistics().in_flight["a"] == 1
        first.finish.set()


async def test_a_switch_drains_then_sleeps_then_wakes() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        assert "sleep a" not in pool.gpu.events
        first.finish.set()
        await second.granted.wait()
        second.finish.set()
    assert pool.gpu.events[2:] == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_requests_for_the_outgoing_model_wait_from_the_drain_on_and_get_the_next_turn() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        late = run.send("a", finish=True)
        await until_waiting(pool, "a", 1)
        first.finish.set()
        await second.done.wait()
        await late.done.wait()
    assert [event for event in pool.gpu.events if event.startswith("awake")] == ["awake a", "awake b", "awake a"]


async def test_requests_for_the_outgoing_model_are_served_during_the_cooldown() -> None:
    pool = Pool(FifoPolicy(min_active_duration=60))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await until_phase(pool, Phase.COOLDOWN)
        during = await run.served("a")
        during.finish.set()
        second.scope.cancel()


async def test_min_active_duration_is_kept() -> None:
    now = 100.0
    pool = Pool(FifoPolicy(min_active_duration=0.05), clock=lambda: now)
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        begun = anyio.current_time()
        now += 0.01
        second = await run.served("b")
        assert anyio.current_time() - begun >= 0.04
        second.finish.set()


async def test_all_waiters_are_granted_in_the_step_that_completes_the_switch() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        gate = pool.backends["b"].gate("ready")
        waiting = [run.send("b") for _ in range(50)]
        await gate.entered.wait()
        await until_waiting(pool, "b", 50)
        other = run.send("c", finish=True)  # wants to switch away at once: it must find a count of fifty
        await until_waiting(pool, "c", 1)
        gate.open.set()
        while pool.switcher.statistics().active_model != "b":
            await anyio.lowlevel.checkpoint()
        assert pool.switcher.statistics().in_flight["b"] == 50
        for request in waiting:
            await request.granted.wait()
            request.finish.set()
        await other.done.wait()


async def test_models_are_served_in_the_order_of_the_longest_wait() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        third = run.send("c", finish=True)
        await until_waiting(pool, "c", 1)
        fourth = run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        first.finish.set()
        for request in (second, third, fourth):
            await request.done.wait()
    assert [event for event in pool.gpu.events if event.startswith("awake")] == ["awake a", "awake b", "awake c"]


async def test_a_request_that_arrives_with_the_last_release_of_a_drain_is_not_admitted() -> None:
    pool = Pool()
    async with running(pool) as run:
        lease = await pool.switcher.acquire("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        lease.release()
        # The switcher has not run since: a gap between its two looks at the count would show here.
        assert pool.switcher.try_acquire("a") is None
        await second.done.wait()


async def test_drain_off_interrupts_what_runs() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain=False))
    async with running(pool) as run:
        first = await run.served("a")
        second = await run.served("b")
        first.finish.set()
        second.finish.set()
    assert first.interrupted
    assert not second.interrupted


async def test_the_drain_deadline_interrupts_what_still_runs() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain_timeout=0.01))
    async with running(pool) as run:
        first = await run.served("a")
        second = await run.served("b")
        first.finish.set()
        second.finish.set()
        await first.done.wait()
        third = await run.served("a")  # awake again: a new activation
        third.finish.set()
    assert first.interrupted
    assert not third.interrupted


async def test_a_backend_is_named_in_errors() -> None:
    pool = Pool()
    pool.backends["a"].reachable = False
    async with running(pool) as run:
        first = run.send("a")
        await first.done.wait()
    assert isinstance(first.error, SwitchError)
    assert str(FakeBackend("a", pool.gpu)) in str(first.error)


async def test_a_target_that_falls_asleep_again_before_its_turn_is_woken() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        pool.gpu.awake.add("b")  # by hand, at the wrong moment
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        pool.gpu.awake.discard("b")
        first.finish.set()
        await second.done.wait()
    assert pool.gpu.events == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_a_request_that_comes_while_the_servers_are_being_asked_waits_for_their_answers() -> None:
    pool = Pool(awake="a")
    gate = pool.backends["b"].gate("state")
    async with running(pool) as run, anyio.create_task_group() as tasks:
        tasks.start_soon(pool.switcher.reconcile)
        await gate.entered.wait()
        first = run.send("a", finish=True)
        await until_waiting(pool, "a", 1)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert not first.done.is_set()
        gate.open.set()
        await first.done.wait()
        assert first.error is None
