"""A target whose server hangs: it is left alone at first, and ended if it is the gateway's own and does so again."""

from __future__ import annotations

import pytest

from llmux_asgi import BackendTimeoutError, BackendUnsupportedError
from tests.support.fakes import FakeBackend
from tests.support.pool import Pool, Runner, running

pytestmark = pytest.mark.anyio


class OwnBackend(FakeBackend):
    """A server whose process belongs to the gateway."""

    async def stop(self) -> None:
        self.gpu.events.append(f"stop {self.name}")
        self._release_memory()
        self.faults.clear()


def pool_with_own_b() -> Pool:
    pool = Pool(awake="a", backoff=(0.0, 0.0))
    own = OwnBackend("b", pool.gpu)
    pool.backends["b"] = pool.switcher._servers._backends["b"] = own
    return pool


async def hang(pool: Pool, run: Runner, model: str, times: int, error: type[Exception] = BackendTimeoutError) -> None:
    """Have the server of `model` not answer, and let one request for it fail."""
    (await run.served("a")).finish.set()
    for _ in range(times):
        pool.backends[model].fail("state", error("no answer"))
    failed = run.send(model)
    await failed.done.wait()
    assert "no answer" in str(failed.error)


async def test_a_server_of_the_gateways_own_that_hangs_twice_is_ended_and_started_again() -> None:
    pool = pool_with_own_b()
    async with running(pool) as run:
        await hang(pool, run, "b", 2)
        assert "stop b" not in pool.gpu.events
        (await run.served("b")).finish.set()
        assert pool.gpu.events == ["stop b", "sleep a", "asleep a", "wake b", "awake b"]


async def test_a_server_of_somebody_elses_that_hangs_fails_each_switch_to_it() -> None:
    pool = pool_with_own_b()
    async with running(pool) as run:
        await hang(pool, run, "c", 2)
        again = run.send("c")
        await again.done.wait()
        assert "no answer" in str(again.error)
        assert pool.gpu.events == []


async def test_a_server_that_cannot_be_used_is_not_ended() -> None:
    pool = pool_with_own_b()
    async with running(pool) as run:
        await hang(pool, run, "b", 2, BackendUnsupportedError)
        again = run.send("b")
        await again.done.wait()
        assert "no answer" in str(again.error)
        assert pool.gpu.events == []
