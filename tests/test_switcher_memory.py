"""The memory check where more than one model is in memory: nobody is blamed for what another one holds."""

from __future__ import annotations

import anyio
import pytest

from llmux_asgi import BackendError, BackendState
from tests.support.fakes import GPU, FakeBackend
from tests.support.pool import Pool, running

pytestmark = pytest.mark.anyio


class Gauge:
    """Reads the fake GPU: a model takes 1000 MiB, a half-woken one too."""

    def __init__(self) -> None:
        self.gpu: GPU | None = None

    def used_mib(self) -> int:
        return 1000 * len(self.gpu.awake | self.gpu.half_woken) if self.gpu is not None else 0


def pool_with_gauge() -> Pool:
    gauge = Gauge()
    pool = Pool(memory=gauge, memory_settle=0.5)
    gauge.gpu = pool.gpu
    return pool


async def each_is_seen_waking(pool: Pool) -> None:
    """Without that nothing is known of what a model takes. The last one stays."""
    for model in "bca":
        (await pool.switcher.acquire(model)).release()


def wake_by_hand(backend: FakeBackend) -> None:
    backend.gpu.awake.add(backend.name)


async def test_a_target_that_somebody_has_woken_is_not_taken_for_what_the_outgoing_model_has_kept() -> None:
    pool = pool_with_gauge()
    async with running(pool) as run:
        await each_is_seen_waking(pool)
        wake_by_hand(pool.backends["b"])
        (await run.served("b")).finish.set()
        assert pool.gpu.awake == {"b"}


async def test_a_third_model_that_somebody_has_woken_is_put_to_sleep_beside_the_outgoing_one() -> None:
    pool = pool_with_gauge()
    async with running(pool) as run:
        await each_is_seen_waking(pool)
        wake_by_hand(pool.backends["c"])
        (await run.served("b")).finish.set()
        assert pool.gpu.awake == {"b"}
        assert pool.backends["c"].levels


async def test_a_half_woken_model_is_not_taken_for_what_the_outgoing_one_has_kept() -> None:
    pool = pool_with_gauge()
    async with running(pool) as run:
        await each_is_seen_waking(pool)
        for _ in range(2):
            pool.backends["c"].fail("wake", BackendError("out of memory"))
        failed = run.send("c")
        await failed.done.wait()
        assert failed.error is not None
        assert "c" in pool.gpu.half_woken
        (await run.served("b")).finish.set()
        assert pool.gpu.awake == {"b"}
        assert not pool.gpu.half_woken


async def test_what_a_model_keeps_is_noticed_as_soon_as_it_is_the_only_one_in_memory() -> None:
    pool = pool_with_gauge()

    async def sleep(level: int) -> None:
        await anyio.lowlevel.checkpoint()

    async with running(pool) as run:
        await each_is_seen_waking(pool)
        wake_by_hand(pool.backends["c"])
        pool.backends["c"].sleep = sleep  # type: ignore[method-assign]
        failed = run.send("b")
        await failed.done.wait()
        assert "still has 1000 MiB in use" in str(failed.error)
        assert "b" not in pool.gpu.awake


async def test_a_server_that_listens_no_more_is_waited_for_until_it_has_freed_its_memory() -> None:
    """One that ends in order stops listening first."""
    pool = pool_with_gauge()
    b = pool.backends["b"]
    async with running(pool) as run:
        await each_is_seen_waking(pool)
        (await run.served("b")).finish.set()
        b.reachable = False
        ended = await b.state()
        assert ended is BackendState.UNREACHABLE
        request = run.send("c", finish=True)
        with anyio.move_on_after(0.1):
            await request.done.wait()
        assert "wake c" not in pool.gpu.events[-1:]
        b.die()
        await request.done.wait()
        assert request.error is None
        assert pool.gpu.awake == {"c"}
