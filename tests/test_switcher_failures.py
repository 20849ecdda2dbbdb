"""What goes wrong in a switch, and where everybody stands afterwards. On asyncio and on trio."""

from __future__ import annotations

import logging

import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    BackendUnreachableError,
    Phase,
    SwitchError,
)
from tests.support.pool import Pool, running, until_phase, until_settled, until_waiting

pytestmark = pytest.mark.anyio


async def test_an_unreachable_target_fails_its_waiters_and_leaves_the_active_model_alone() -> None:
    pool = Pool(awake="a")
    pool.backends["b"].reachable = False
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        assert "nothing listens there" in str(second.error)
        (await run.served("a")).finish.set()
        first.finish.set()
    assert pool.gpu.events == []
    assert pool.switcher.statistics().failures == 1


async def test_a_target_that_fails_to_answer_ends_the_drain_and_who_was_held_up_by_it_is_served() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        gate = pool.backends["b"].gate("state")
        pool.backends["b"].fail("state", BackendError("fake://b: no answer"))
        second = run.send("b")
        await gate.entered.wait()
        await until_phase(pool, Phase.DRAIN)
        held_up = run.send("a")
        await until_waiting(pool, "a", 1)
        gate.open.set()
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        await held_up.granted.wait()
        held_up.finish.set()
        first.finish.set()
    assert pool.gpu.events == []


async def test_no_switch_begins_before_its_target_has_answered_and_the_gate_stays_open_if_it_has_failed_before() -> None:
    pool = Pool(awake="a", backoff=(0.0, 0.0))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        for failed_before in (False, True):
            gate = pool.backends["b"].gate("state")
            pool.backends["b"].fail("state", BackendError("fake://b: no answer"))
            second = run.send("b")
            await gate.entered.wait()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert pool.switcher.statistics().phase is (Phase.COOLDOWN if failed_before else Phase.DRAIN)
            assert pool.gpu.events == []
            gate.open.set()
            await second.done.wait()


async def test_a_failed_sleep_abandons_the_switch_and_the_model_still_awake_goes_on() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: POST /sleep answered 500"), times=2)
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        assert "POST /sleep answered 500" in str(second.error)
        await until_settled(pool)
        assert pool.switcher.statistics().active_model == "a"
        (await run.served("a")).finish.set()
    assert "wake b" not in pool.gpu.events


async def test_a_sleep_whose_answer_was_lost_counts_if_the_server_says_that_it_sleeps() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: POST /sleep broke off"))
        pool.gpu.awake.discard("a")
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}


async def test_a_model_whose_process_is_gone_holds_no_memory() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendUnreachableError("fake://a: nothing listens there"))
        pool.gpu.awake.discard("a")
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}


async def test_nothing_is_woken_while_a_sleeper_cannot_be_confirmed() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("sleep failed"), times=2)
        pool.backends["a"].fail("state", BackendError("no clear answer"), times=2)
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        assert "sleep failed" in str(second.error)
    assert "wake b" not in pool.gpu.events


async def test_a_third_model_of_unknown_state_blocks_the_wake_before_anything_is_disturbed() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        for _ in range(2):  # at the first look, and when the switch needs to know
            pool.backends["c"].fail("state", BackendError("fake://c: GET /is_sleeping answered 500"))
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        assert "the model 'c' may be in memory, its server gives no clear answer: fake://c: " in str(second.error)
    assert pool.gpu.events == []
    assert pool.gpu.awake == {"a"}


async def test_a_failed_wake_leaves_nobody_awake_and_the_next_request_is_served() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["b"].fail("wake", BackendError("fake://b: POST /wake_up answered 500: out of memory"), times=2)
        second, third = run.send("b"), run.send("b")
        await second.done.wait()
        await third.done.wait()
        assert isinstance(second.error, SwitchError)
        assert isinstance(third.error, SwitchError)
        assert second.error is not third.error
        assert "out of memory" in str(third.error)
        (await run.served("a")).finish.set()
    assert pool.gpu.awake == {"a"}


async def test_after_a_failure_requests_fail_at_once_until_the_pause_is_over_and_the_pause_doubles() -> None:
    now = 0.0
    pool = Pool(clock=lambda: now, backoff=(1.0, 3.0))
    pauses = []
    async with running(pool) as run:
        for _ in range(4):
            pool.backends["a"].fail("wake", BackendError("no"), times=2)
            first = run.send("a")
            await first.done.wait()
            await until_settled(pool)
            second = run.send("a")
            await second.done.wait()
            assert isinstance(second.error, SwitchError)
            assert "next attempt in" in str(second.error)
            pauses.append(second.error.retry_after)
            now += second.error.retry_after
        (await run.served("a")).finish.set()
    assert pauses == [1.0, 2.0, 3.0, 3.0]
    assert pool.gpu.events.count("wake a") == 4 * 2 + 1


async def test_who_waited_for_a_switch_that_fails_is_told_when_the_next_attempt_is_allowed() -> None:
    pool = Pool(backoff=(7.0, 30.0))
    async with running(pool) as run:
        pool.backends["a"].fail("wake", BackendError("no"), times=2)
        first = run.send("a")
        await first.done.wait()
        assert isinstance(first.error, SwitchError)
        assert first.error.retry_after == 7.0


async def test_a_target_that_has_failed_before_is_asked_once_for_a_switch() -> None:
    pool = Pool(awake="a", backoff=(0.0, 0.0))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["b"].fail("state", BackendError("no answer"))
        first = run.send("b")
        await first.done.wait()
        asked = pool.backends["b"].asked
        (await run.served("b")).finish.set()
    assert pool.backends["b"].asked == asked + 1


async def test_a_success_ends_the_row_of_failures() -> None:
    now = 0.0
    pool = Pool(clock=lambda: now)
    async with running(pool) as run:
        for attempt in range(2):
            pool.backends["b"].fail("wake", BackendError("no"), times=2)
            failed = run.send("b")
            await failed.done.wait()
            assert isinstance(failed.error, SwitchError)
            assert failed.error.retry_after == 1.0, attempt
            now += 1.0
            (await run.served("b")).finish.set()
            (await run.served("a")).finish.set()


async def test_other_models_are_served_while_one_backs_off() -> None:
    pool = Pool()
    async with running(pool) as run:
        pool.backends["a"].fail("wake", BackendError("no"), times=2)
        first = run.send("a")
        await first.done.wait()
        (await run.served("b")).finish.set()


async def test_the_failure_of_a_switch_is_logged_once_however_many_wait(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool()
    async with running(pool) as run:
        pool.backends["a"].fail("wake", BackendError("the reason"), times=2)
        requests = [run.send("a") for _ in range(20)]
        for request in requests:
            await request.done.wait()
    levels = [record.levelno for record in caplog.records if "the reason" in record.message]
    assert levels == [logging.WARNING, logging.ERROR]  # that it is tried once more, and that it has failed


async def test_any_exception_of_a_backend_is_a_failed_switch() -> None:
    pool = Pool()
    async with running(pool) as run:
        pool.backends["a"].fail("wake", ZeroDivisionError("oops"))
        first = run.send("a")
        await first.done.wait()
        assert isinstance(first.error, SwitchError)
        assert "ZeroDivisionError" in str(first.error)
        (await run.served("b")).finish.set()


async def test_an_exception_where_none_is_expected_fails_the_waiters_and_not_the_gateway() -> None:
    pool = Pool()
    async with running(pool) as run:
        pool.backends["a"].fail("state", ZeroDivisionError("oops"))
        first = run.send("a")
        await first.done.wait()
        assert isinstance(first.error, SwitchError)
        assert "unexpected error" in str(first.error)
        (await run.served("a")).finish.set()
