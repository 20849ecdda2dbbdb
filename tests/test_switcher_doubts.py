"""Doubts about a server, and leases on a model that was lost. On asyncio and on trio."""

from __future__ import annotations

import anyio
import pytest

from llmux_asgi import (
    BackendError,
    FifoPolicy,
    Mode,
    Phase,
)
from tests.support.pool import Pool, running, until_phase, until_settled, until_waiting

pytestmark = pytest.mark.anyio


async def test_a_doubt_during_a_cooldown_closes_the_gate_and_the_servers_are_asked_after_it() -> None:
    pool = Pool(FifoPolicy(min_active_duration=60))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await until_phase(pool, Phase.COOLDOWN)
        pool.gpu.awake.clear()  # a's engine has died, and it was restarted asleep
        pool.switcher.distrust()
        third = run.send("a", finish=True)
        await until_waiting(pool, "a", 1)
        second.scope.cancel()
        await third.done.wait()
        assert third.error is None
    assert pool.gpu.events[-2:] == ["wake a", "awake a"]


async def test_a_doubt_while_the_servers_are_asked_has_them_asked_again() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        gate = pool.backends["c"].gate("state")
        first = run.send("a", finish=True)
        await gate.entered.wait()
        pool.gpu.awake.clear()  # a has said that it is awake, and is not any more
        pool.switcher.distrust()
        gate.open.set()
        await first.done.wait()
        assert first.error is None
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_doubt_during_a_drain_does_not_stop_the_switch() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0), awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        pool.switcher.distrust()
        first.finish.set()
        await second.done.wait()
        assert second.error is None


# Leases on a model that is gone


@pytest.mark.parametrize("how", ["asleep", "gone"])
async def test_who_holds_a_lease_on_a_model_that_was_lost_is_told(how: str) -> None:
    pool = Pool(awake="a")
    told = anyio.Event()
    with anyio.fail_after(5):
        lease = await pool.switcher.acquire("a")
        with lease.exchange(told.set):
            pool.gpu.awake.clear()
            pool.backends["a"].reachable = how == "asleep"
            await pool.switcher.reconcile()
            await told.wait()
        assert lease.interrupted
        lease.release()
        await pool.switcher.aclose()
    pool.check()


async def test_who_was_interrupted_by_a_switch_that_failed_is_told_by_the_one_that_succeeds() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain=False), awake="a", backoff=(0.0, 0.0))
    told = anyio.Event()
    async with running(pool) as run:
        old = await pool.switcher.acquire("a")
        with old.exchange(told.set):
            pool.backends["a"].fail("sleep", BackendError("fake://a: refused"), times=2)
            second = run.send("b")
            await second.done.wait()
            await until_settled(pool)
            fresh = await pool.switcher.acquire("a")
            assert (old.interrupted, fresh.interrupted, told.is_set()) == (True, False, False)
            (await run.served("b")).finish.set()
            assert (old.interrupted, fresh.interrupted, told.is_set()) == (True, True, True)
        old.release()
        fresh.release()


async def test_a_model_found_awake_has_no_pause_to_wait_for() -> None:
    pool = Pool(backoff=(1000.0, 1000.0))
    async with running(pool) as run:
        pool.backends["b"].fail("wake", BackendError("fake://b: no"), times=2)
        first = run.send("b")
        await first.done.wait()
        pool.gpu.half_woken.clear()
        pool.backends["b"].reachable = False
        await pool.switcher.reconcile()
        pool.backends["b"].reachable = True  # its supervisor has restarted it, awake
        pool.gpu.awake.add("b")
        await pool.switcher.reconcile()
        pool.switcher.distrust()
        (await run.served("b")).finish.set()


async def test_a_caller_of_reconcile_that_leaves_does_not_reach_into_its_steps() -> None:
    pool = Pool(awake="ab")
    gate = pool.backends["b"].gate("sleep")
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.switcher.reconcile)
            await gate.entered.wait()
            tasks.cancel_scope.cancel()
        gate.open.set()
        (await pool.switcher.acquire("a")).release()
        await pool.switcher.aclose()
    assert pool.gpu.events == ["sleep b", "asleep b"]
    pool.check()


async def test_reconcile_survives_a_backend_that_breaks_its_contract(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(awake="a")
    pool.backends["b"].fail("state", ZeroDivisionError("oops"))
    with anyio.fail_after(5):
        await pool.switcher.reconcile()
        assert pool.switcher.statistics().mode is Mode.UNKNOWN
        assert "reconciling met an unexpected error" in caplog.text
        (await pool.switcher.acquire("a")).release()
        await pool.switcher.aclose()


async def test_an_exchange_that_begins_after_the_end_is_told_at_once_and_one_that_is_over_never() -> None:
    pool = Pool(awake="a")
    told: list[str] = []
    with anyio.fail_after(5):
        lease = await pool.switcher.acquire("a")
        with lease.exchange(lambda: told.append("over before")):
            pass
        pool.gpu.awake.clear()
        await pool.switcher.reconcile()
        with lease.exchange(lambda: told.append("begun after")):
            assert told == ["begun after"]
        assert pool.switcher.statistics().in_flight["a"] == 0  # it is void
        lease.release()
        await pool.switcher.aclose()
    pool.check()
