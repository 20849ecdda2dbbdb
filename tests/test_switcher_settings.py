"""What a switcher is told at its making, and its end. On asyncio and on trio."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    FifoPolicy,
    GatedQuantumPolicy,
    Mode,
    ModelSwitcher,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
    VLLMBackend,
    load_config,
)
from tests.support.pool import LIMIT, Pool, running

pytestmark = pytest.mark.anyio


async def test_the_models_own_level_comes_before_the_policys() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, sleep_level=2), sleep_levels={"b": 1})
    async with running(pool) as run:
        for model in ("a", "b", "c"):
            (await run.served(model)).finish.set()
    assert pool.backends["a"].levels == [2]
    assert pool.backends["b"].levels == [1]


async def test_the_models_own_timeout_comes_before_the_policys() -> None:
    pool = Pool(FifoPolicy(min_active_duration=60), request_timeouts={"b": 0.01})
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await second.done.wait()
    assert isinstance(second.error, QueueTimeoutError)


async def test_aliases_lead_to_their_model_and_unknown_names_nowhere() -> None:
    pool = Pool(aliases={"gpt": "a"})
    async with running(pool) as run:
        (await run.served("gpt")).finish.set()
        with pytest.raises(UnknownModelError, match="'nobody' does not exist"):
            await pool.switcher.acquire("nobody")
    assert pool.gpu.awake == {"a"}


async def test_the_fast_path_takes_aliases_and_knows_no_strangers() -> None:
    pool = Pool(awake="a", aliases={"gpt": "a", "b": "a"})
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        lease = pool.switcher.try_acquire("gpt")
        assert lease is not None
        assert lease.model == "a"
        lease.release()
        assert pool.switcher.try_acquire("nobody") is None
        assert pool.switcher.try_acquire("b") is None  # a model's own name comes before an alias


def test_the_configuration_arrives_where_it_belongs() -> None:
    config = load_config(
        {
            "models": {
                "a": {"url": "http://x:1", "sleep_level": 2, "aliases": ["gpt"], "timeouts": {"request": 7, "wake": 9}},
                "b": {"url": "http://x:2"},
            },
            "policy": {"name": "fifo", "sleep_level": 2, "request_timeout": 8, "min_active_duration": 3, "drain_timeout": 4},
            "limits": {"backoff_initial": 0.25, "backoff_max": 0.5},
        }
    )
    switcher = ModelSwitcher.from_config(config)
    policy = switcher._policy
    assert isinstance(policy, FifoPolicy)
    assert vars(policy) == {
        "sleep_level": 2,
        "request_timeout": 8,
        "min_active_duration": 3,
        "drain": "wait",
        "drain_timeout": 4,
        "max_freezes": 16,
        "max_frozen": 300.0,
    }
    assert switcher.resolve("gpt") == "a"
    assert switcher._sleep_levels == {"a": 2}
    assert switcher._request_timeouts == {"a": 7}
    assert [switcher._backoff.failed("a", "why", 0.0).pause for _ in range(3)] == [0.25, 0.5, 0.5]
    a, b = switcher._servers._backends.values()
    assert isinstance(a, VLLMBackend)
    assert isinstance(b, VLLMBackend)
    assert (a.url, a._default_level, a._timeouts.wake) == ("http://x:1", 2, 9)
    assert (b.url, b._default_level, b._timeouts.wake) == ("http://x:2", 2, 300)
    assert ModelSwitcher.from_config(config, policy=FifoPolicy(sleep_level=1))._sleep_level("b") == 1


async def test_a_switcher_can_be_made_outside_an_event_loop_and_knows_its_models() -> None:
    switcher = ModelSwitcher({})
    assert switcher.models == ()
    assert isinstance(switcher._policy, GatedQuantumPolicy)
    assert switcher.statistics().mode is Mode.UNKNOWN


async def test_closing_refuses_who_waits_and_waits_for_the_step_on_the_wire() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("a")
        await gate.entered.wait()
        async with anyio.create_task_group() as closing:
            closing.start_soon(pool.switcher.aclose)
            await first.done.wait()
            assert isinstance(first.error, SwitchError)
            assert "shutting down" in str(first.error)
            assert pool.backends["a"].closed == 0
            gate.open.set()
        assert pool.backends["a"].closed == 1


async def test_a_backend_that_cannot_be_closed_is_an_error_in_the_log_and_the_others_are_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool()
    pool.backends["a"].fail("aclose", BackendError("fake://a: cannot be killed"))
    with anyio.fail_after(LIMIT):
        await pool.switcher.aclose()
    assert {name: backend.closed for name, backend in pool.backends.items()} == {"a": 0, "b": 1, "c": 1}
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("ERROR", "closing the backend of the model 'a': fake://a: cannot be killed")
    ]


async def test_closing_refuses_newcomers_too_and_ends_although_they_keep_coming() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("a")
        await gate.entered.wait()
        async with anyio.create_task_group() as closing:
            closing.start_soon(pool.switcher.aclose)
            await first.done.wait()
            for model in ("a", "b"):
                late = run.send(model)
                await late.done.wait()
                assert isinstance(late.error, SwitchError)
                assert "shutting down" in str(late.error)
            gate.open.set()
        assert {backend.closed for backend in pool.backends.values()} == {1}
        assert pool.gpu.events == ["wake a", "awake a"]


async def test_after_closing_the_servers_are_asked_anew() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        await pool.switcher.aclose()
        pool.gpu.awake = {"b"}
        (await run.served("b")).finish.set()
    assert pool.gpu.events == []


async def test_it_is_open_again_when_the_last_of_several_closings_is_over() -> None:
    pool = Pool(awake="a")
    with anyio.fail_after(5):
        lease = await pool.switcher.acquire("a")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(pool.switcher.aclose, drain=5))
            await anyio.wait_all_tasks_blocked()
            await pool.switcher.aclose()
            with pytest.raises(SwitchError, match="shutting down"):
                await pool.switcher.acquire("a")
            lease.release()
        (await pool.switcher.acquire("a")).release()
        await pool.switcher.aclose()
    pool.check()
