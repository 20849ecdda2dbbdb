"""A model that nobody asks for is put to sleep after its `ttl`. On asyncio and on trio."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import BackendError, FifoPolicy, Mode, Phase, SwitchContext
from tests.support.fleet import Fleet
from tests.support.pool import Pool, Runner, running, until_phase, until_settled, until_waiting

pytestmark = pytest.mark.anyio

TTL = 0.01
"""The timer's seconds are the event loop's; how long a model has been idle is told by the test's own clock."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pool_of(clock: Clock, policy: FifoPolicy | None = None, awake: str = "a") -> Pool:
    return Pool(policy, awake=awake, ttls={"a": TTL}, clock=clock)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await anyio.lowlevel.checkpoint()


async def serve(run: Runner, model: str) -> None:
    request = run.send(model, finish=True)
    await request.done.wait()
    assert request.error is None


async def until_asleep(pool: Pool) -> None:
    await until(lambda: pool.switcher.statistics().mode is Mode.IDLE)


def is_timed(pool: Pool) -> bool:
    return pool.switcher._idle._timer is not None


async def past_the_timer(pool: Pool) -> None:
    """Wait until the timer has been due, and was set again."""
    before = pool.switcher._idle._timer
    await until(lambda: pool.switcher._idle._timer is not before)


async def test_an_idle_model_is_put_to_sleep_when_its_time_is_up_and_not_before() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        request = await run.served("a")
        clock.now += 10 * TTL
        await past_the_timer(pool)
        request.finish.set()
        await request.done.wait()
        await past_the_timer(pool)
        clock.now += TTL / 2
        await past_the_timer(pool)
        assert pool.gpu.events == []
        clock.now += TTL
        await until_asleep(pool)
        assert pool.gpu.events == ["sleep a", "asleep a"]
        await serve(run, "a")
        assert pool.gpu.events[2:] == ["wake a", "awake a"]


async def test_a_model_without_one_stays_awake_and_no_timer_is_set() -> None:
    pool = pool_of(Clock(), awake="b")
    async with running(pool) as run:
        await serve(run, "b")
        assert not is_timed(pool)
        await serve(run, "a")
        assert is_timed(pool)
        await serve(run, "b")
        assert not is_timed(pool)


async def test_a_model_that_was_found_awake_is_watched_from_then_on() -> None:
    pool = pool_of(Clock())
    async with running(pool):
        await pool.switcher.reconcile()
        await until_asleep(pool)
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_a_pinned_model_stays_awake() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        pool.switcher.pin("a")
        await serve(run, "a")
        clock.now += TTL
        await past_the_timer(pool)
        await past_the_timer(pool)
        assert pool.gpu.events == []
        pool.switcher.unpin()
        await until_asleep(pool)


async def test_a_request_that_comes_before_the_sleep_is_on_the_wire_is_served_at_once() -> None:
    entered, go_on = anyio.Event(), anyio.Event()

    class Slow(FifoPolicy):
        async def prepare_switch(self, context: SwitchContext) -> None:
            entered.set()
            await go_on.wait()

    clock = Clock()
    pool = pool_of(clock, Slow(min_active_duration=0))
    async with running(pool) as run:
        await serve(run, "a")
        clock.now += TTL
        await entered.wait()
        late = run.send("a")
        await until_waiting(pool, "a", 1)
        go_on.set()
        await late.granted.wait()
        statistics = pool.switcher.statistics()
        assert (statistics.abandoned, statistics.switches) == (1, 0)
        late.finish.set()
        await late.done.wait()
        clock.now += TTL
        await until_asleep(pool)
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_a_request_that_was_served_while_the_lock_was_awaited_keeps_the_model_awake() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        await serve(run, "a")
        lock = pool.switcher._driver.exclusively()
        async with lock:
            clock.now += TTL
            await until(lambda: lock.statistics().tasks_waiting > 0)
            await serve(run, "a")
            await anyio.wait_all_tasks_blocked()
        await past_the_timer(pool)
        assert pool.gpu.events == []


async def test_those_who_wait_for_another_model_are_not_kept_waiting_by_an_idle_sleep() -> None:
    clock = Clock()
    pool = pool_of(clock, FifoPolicy(min_active_duration=60), awake="")
    async with running(pool) as run:
        await pool.switcher.wake("a")
        other = run.send("b")
        await until_phase(pool, Phase.COOLDOWN)
        clock.now += TTL
        await until(lambda: not is_timed(pool))  # it has been due, and is not set again while there is a switch
        assert pool.switcher.statistics().phase is Phase.COOLDOWN
        other.scope.cancel()
        await other.done.wait()
        await until_asleep(pool)


async def test_where_something_is_in_doubt_the_servers_are_asked_first() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        await serve(run, "a")
        pool.switcher.distrust()
        clock.now += TTL
        await until_asleep(pool)
    assert pool.gpu.events == ["sleep a", "asleep a"]


async def test_a_sleep_that_fails_is_tried_again_after_the_same_time() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        await serve(run, "a")
        pool.backends["a"].fail("sleep", BackendError("no"), times=2)
        clock.now += TTL
        await until_settled(pool)
        await until_asleep(pool)
        assert pool.switcher.statistics().failures == 1
    assert pool.gpu.events == ["sleep a", "sleep a", "sleep a", "asleep a"]


async def test_servers_that_give_no_answer_are_asked_again_after_the_same_time() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        await serve(run, "a")
        pool.switcher.distrust()
        pool.backends["a"].fail("state", BackendError("no answer"))
        clock.now += TTL
        await until_asleep(pool)
        assert [error.model for error in pool.switcher.statistics().errors] == ["a"]


async def test_a_switcher_that_is_closed_sets_no_timer() -> None:
    pool = pool_of(Clock())
    async with running(pool) as run:
        await serve(run, "a")
        await pool.switcher.aclose()
        assert not is_timed(pool)


async def test_another_configuration_may_give_the_active_model_a_ttl_and_take_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch, awake="a", qwen="a")
    async with running(fleet) as run:
        await serve(run, "qwen")
        assert not is_timed(fleet)
        await fleet.reload(qwen={"url": "http://a", "ttl": 3600})
        assert is_timed(fleet)
        await fleet.reload(qwen={"url": "http://a"})
        assert not is_timed(fleet)
        await fleet.reload(qwen={"url": "http://a", "ttl": TTL})
        await until_asleep(fleet)
    assert fleet.gpu.events == ["sleep a", "asleep a"]
