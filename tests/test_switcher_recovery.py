"""What the servers say against what the gateway believes: restarts, half-woken servers, late sleeps. On asyncio and on trio."""

from __future__ import annotations

import logging

import pytest

from llmux_asgi import (
    BackendError,
    BackendState,
    BackendTimeoutError,
    Mode,
    Phase,
    SwitchError,
)
from tests.support.pool import Pool, running, until_phase, until_settled

pytestmark = pytest.mark.anyio


async def test_surplus_models_awake_at_the_start_are_put_to_sleep_and_the_wanted_one_stays() -> None:
    pool = Pool(awake="abc")
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}
    assert not any(event.startswith("wake") for event in pool.gpu.events)


async def test_surplus_sleeps_at_its_own_level_and_the_model_in_use_stays_whoever_waits() -> None:
    pool = Pool(awake="a", sleep_levels={"b": 2})
    async with running(pool) as run:
        first = await run.served("a")
        pool.gpu.awake.add("b")  # by hand
        pool.switcher.distrust()
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        assert pool.backends["b"].levels == [2]
        assert not first.interrupted
        first.finish.set()
        await second.granted.wait()
        second.finish.set()


async def test_surplus_that_cannot_be_put_to_sleep_is_an_error_and_nothing_is_served() -> None:
    pool = Pool(awake="ab")
    pool.backends["b"].fail("sleep", BackendError("will not"), times=2)
    async with running(pool) as run:
        first = run.send("a")
        await first.done.wait()
        assert isinstance(first.error, SwitchError)
        assert "'b' must not be awake and could not be put to sleep: will not" in str(first.error)
        assert pool.switcher.statistics().mode is Mode.UNKNOWN
        assert pool.switcher.try_acquire("a") is None
        (await run.served("a")).finish.set()  # the next attempt works


async def test_after_a_report_of_trouble_the_servers_are_asked_again() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        lease = await pool.switcher.acquire("a")
        lease.distrust()
        assert pool.switcher.statistics().mode is Mode.UNKNOWN
        assert pool.switcher.try_acquire("a") is None
        pool.gpu.awake.clear()  # as if somebody had put it to sleep by hand
        lease.release()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_report_of_trouble_that_proves_wrong_changes_nothing_for_who_is_being_served() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        pool.switcher.distrust()
        second = await run.served("a")
        assert pool.switcher.statistics().in_flight["a"] == 2
        first.finish.set()
        second.finish.set()
        await first.done.wait()
        assert not first.interrupted


async def test_a_report_of_trouble_during_a_switch_does_not_disturb_it() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("a", finish=True)
        await gate.entered.wait()
        pool.switcher.distrust()
        gate.open.set()
        await first.done.wait()
        assert first.error is None


async def test_a_model_that_came_back_by_itself_is_put_to_sleep_before_another_wakes() -> None:
    pool = Pool(awake="a")
    pool.backends["c"].reachable = False
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["c"].reachable = True  # its supervisor restarted it, awake
        pool.gpu.awake.add("c")
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}
    assert pool.gpu.events.index("asleep c") < pool.gpu.events.index("wake b")


async def test_a_target_that_is_awake_already_is_not_woken() -> None:
    pool = Pool(awake="a")
    pool.backends["b"].reachable = False
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["b"].reachable = True
        pool.gpu.awake.add("b")
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}
    assert "wake b" not in pool.gpu.events


async def test_reconcile_adopts_what_changed_behind_the_gateways_back() -> None:
    pool = Pool(awake="a")
    await pool.switcher.reconcile()
    assert pool.switcher.statistics().active_model == "a"
    pool.gpu.awake = {"c"}
    await pool.switcher.reconcile()
    assert pool.switcher.statistics().active_model == "c"
    pool.gpu.awake = set()
    await pool.switcher.reconcile()
    assert pool.switcher.statistics().mode is Mode.IDLE
    assert await pool.backends["a"].state() is BackendState.ASLEEP


async def test_a_sleeper_that_was_restarted_awake_is_put_to_sleep_before_another_wakes() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.gpu.awake.add("c")  # known to sleep; its supervisor has restarted it since
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}


async def test_a_server_that_is_gone_is_not_put_to_sleep() -> None:
    pool = Pool(awake="a")
    pool.backends["c"].reachable = False
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    assert "sleep c" not in pool.gpu.events


async def test_a_sleeper_that_gives_no_clear_answer_any_more_is_taken_at_its_confirmed_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["c"].fail("state", BackendTimeoutError("fake://c: no answer"))
        (await run.served("b")).finish.set()
    assert [r.levelno for r in caplog.records if "fake://c: no answer" in r.message] == [logging.WARNING]


async def test_an_active_model_without_a_clear_state_is_neither_disturbed_nor_replaced() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        pool.backends["a"].fail("state", BackendError("fake://a: timed out"))
        pool.switcher.distrust()
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        assert "the state of the active model 'a' is unknown: fake://a: timed out" in str(second.error)
        assert pool.gpu.events == []
        third = run.send("b", finish=True)  # a answers again, and is drained as it should be
        await until_phase(pool, Phase.DRAIN)
        assert pool.gpu.events == []
        first.finish.set()
        await third.done.wait()
        await first.done.wait()
        assert not first.interrupted


# Half-woken servers


async def test_a_half_woken_server_is_put_to_sleep_after_all_others_and_before_another_wakes() -> None:
    """It says that it sleeps. To get its memory back it may have to be woken whole, for which the others must be gone."""
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=2)
        second = run.send("b")
        await second.done.wait()
        pool.gpu.events.clear()
        (await run.served("c")).finish.set()
    assert pool.gpu.events == ["sleep b", "asleep b", "wake c", "awake c"]


async def test_the_next_wake_of_a_half_woken_server_wakes_it_whole() -> None:
    pool = Pool(backoff=(0.0, 0.0))
    async with running(pool) as run:
        pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=2)
        first = run.send("b")
        await first.done.wait()
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["wake b", "wake b", "wake b", "awake b"]


async def test_a_half_woken_server_that_cannot_be_put_to_sleep_blocks_the_wake_of_others() -> None:
    pool = Pool(backoff=(0.0, 0.0))
    async with running(pool) as run:
        pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=2)
        first = run.send("b")
        await first.done.wait()
        pool.backends["b"].fail("sleep", BackendError("fake://b: stuck"), times=2)
        second = run.send("a")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        assert "fake://b: stuck" in str(second.error)
        assert "wake a" not in pool.gpu.events
        pool.backends["b"].reachable = False  # somebody stops it: its memory is free
        pool.gpu.half_woken.clear()
        (await run.served("a")).finish.set()


async def test_a_server_whose_wake_was_not_confirmed_does_not_serve_as_it_is() -> None:
    pool = Pool(backoff=(0.0, 0.0))
    async with running(pool) as run:
        pool.backends["b"].fail("ready", BackendTimeoutError("fake://b: not ready"))
        first = run.send("b")
        await first.done.wait()
        await until_settled(pool)
        assert pool.switcher.statistics().mode is Mode.IDLE
        assert pool.gpu.awake == set()
        (await run.served("b")).finish.set()


# Sleep calls that were given up


async def test_a_model_whose_sleep_timed_out_is_put_to_sleep_before_anything_is_served() -> None:
    """Its server may still act on the call: then a request would have reached a sleeper."""
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendTimeoutError("fake://a: POST /sleep took longer than 120 s"), times=2)
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        third = await run.served("a")
        pool.gpu.doze_off()
        pool.backends["a"].forward()
        third.finish.set()
    assert pool.gpu.events == ["wake a", "awake a", *["sleep a"] * 3, "asleep a", "wake a", "awake a"]


async def test_nothing_is_served_while_it_cannot_be_put_to_sleep() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        # In the switch, and whenever the servers are asked afterwards.
        pool.backends["a"].fail("sleep", BackendTimeoutError("fake://a: POST /sleep took longer than 120 s"), times=100)
        for model in ("b", "a"):
            request = run.send(model)
            await request.done.wait()
            assert isinstance(request.error, SwitchError)
            assert pool.switcher.statistics().mode is not Mode.ACTIVE
        pool.backends["a"].faults.clear()
        pool.gpu.doze_off()  # the calls take effect in the end
        (await run.served("a")).finish.set()


async def test_a_model_that_has_acted_on_one_of_two_such_calls_is_put_to_sleep_before_it_wakes() -> None:
    """It says that it sleeps, and the other call may still come when it is awake."""
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendTimeoutError("fake://a: POST /sleep took longer than 120 s"), times=2)
        pool.backends["a"].gate("sleep").open.set()
        second_call = pool.backends["a"].gate("sleep")
        second = run.send("b")
        await second_call.entered.wait()
        pool.gpu.doze_off()
        second_call.open.set()
        await second.done.wait()
        await until_settled(pool)
        assert pool.switcher.statistics().mode is Mode.IDLE
        pool.gpu.events.clear()
        third = await run.served("a")
        pool.gpu.doze_off()
        pool.backends["a"].forward()
        third.finish.set()
    assert pool.gpu.events == ["sleep a", "asleep a", "wake a", "awake a"]


async def test_a_model_that_refused_to_sleep_goes_on_at_once() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: POST /sleep answered 500"), times=2)
        second = run.send("b")
        await second.done.wait()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a", "sleep a", "sleep a"]
