"""What goes wrong in a switch, and where everybody stands afterwards. On asyncio and on trio."""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    BackendState,
    BackendUnreachableError,
    Defer,
    FifoPolicy,
    Mode,
    PolicyContext,
    PolicyDecision,
    PolicyError,
    SwitchContext,
    SwitchError,
    SwitchNow,
    SwitchPolicy,
)
from tests.support.pool import Pool, running

pytestmark = pytest.mark.anyio


async def until_settled(pool: Pool) -> None:
    """Let other tasks run until the servers have been asked how things stand."""
    while pool.switcher.statistics().mode in (Mode.UNKNOWN, Mode.SWITCHING):
        await anyio.lowlevel.checkpoint()


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


async def test_a_failed_sleep_abandons_the_switch_and_the_model_still_awake_goes_on() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: POST /sleep answered 500"))
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
        pool.backends["a"].fail("sleep", BackendError("sleep failed"))
        pool.backends["a"].fail("state", BackendError("no clear answer"))
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
        assert "fake://c" in str(second.error)
    assert pool.gpu.events == []
    assert pool.gpu.awake == {"a"}


async def test_a_failed_wake_leaves_nobody_awake_and_the_next_request_is_served() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["b"].fail("wake", BackendError("fake://b: POST /wake_up answered 500: out of memory"))
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
            pool.backends["a"].fail("wake", BackendError("no"))
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
    assert pool.gpu.events.count("wake a") == 5


async def test_a_success_ends_the_row_of_failures() -> None:
    now = 0.0
    pool = Pool(clock=lambda: now)
    async with running(pool) as run:
        for attempt in range(2):
            pool.backends["b"].fail("wake", BackendError("no"))
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
        pool.backends["a"].fail("wake", BackendError("no"))
        first = run.send("a")
        await first.done.wait()
        (await run.served("b")).finish.set()


async def test_the_failure_of_a_switch_is_logged_once_however_many_wait(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool()
    async with running(pool) as run:
        pool.backends["a"].fail("wake", BackendError("the reason"))
        requests = [run.send("a") for _ in range(20)]
        for request in requests:
            await request.done.wait()
    assert [record.levelno for record in caplog.records if "the reason" in record.message] == [logging.ERROR]


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


# What is found at the servers


async def test_surplus_models_awake_at_the_start_are_put_to_sleep_and_the_wanted_one_stays() -> None:
    pool = Pool(awake="abc")
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    assert pool.gpu.awake == {"b"}
    assert not any(event.startswith("wake") for event in pool.gpu.events)


async def test_surplus_that_cannot_be_put_to_sleep_is_an_error_and_nothing_is_served() -> None:
    pool = Pool(awake="ab")
    pool.backends["b"].fail("sleep", BackendError("will not"))
    async with running(pool) as run:
        first = run.send("a")
        await first.done.wait()
        assert isinstance(first.error, SwitchError)
        assert "several models are awake" in str(first.error)
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


# Policies that break their contract


class Broken(SwitchPolicy):
    """Answers what the test gives it."""

    min_active_duration = 0.0

    def __init__(self, answer: Callable[[], object]) -> None:
        self.answer = answer

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        return self.answer()  # type: ignore[return-value]


def raising() -> object:
    raise ZeroDivisionError("oops")


async def failing_awaitable() -> None:
    raise ZeroDivisionError("oops")


async def as_a_coroutine() -> SwitchNow:
    return SwitchNow()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raising, r"on_pending_request raised ZeroDivisionError\('oops'\)"),
        (lambda: None, "returned NoneType"),
        (as_a_coroutine, "returned coroutine; it must be a plain function"),
        (lambda: Defer(failing_awaitable()), "the awaitable of its Defer raised ZeroDivisionError"),
    ],
)
async def test_a_policy_that_breaks_its_contract_fails_the_waiters_with_the_reason(
    answer: Callable[[], object], words: str
) -> None:
    policy = Broken(answer)
    pool = Pool(policy)
    async with running(pool) as run:
        first = run.send("a")
        await first.done.wait()
        assert isinstance(first.error, PolicyError)
        with pytest.raises(PolicyError, match=words):
            raise first.error
        policy.answer = SwitchNow
        (await run.served("a")).finish.set()


async def test_a_prepare_switch_that_raises_fails_the_waiters_and_the_active_model_goes_on() -> None:
    class Raising(FifoPolicy):
        async def prepare_switch(self, context: SwitchContext) -> None:
            raise ZeroDivisionError("oops")

    pool = Pool(Raising(min_active_duration=0), awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, PolicyError)
        assert "prepare_switch raised ZeroDivisionError" in str(second.error)
        (await run.served("a")).finish.set()
    assert pool.gpu.events == []


async def test_a_defer_whose_waiters_leave_before_it_starts_leaves_nothing_behind() -> None:
    """The coroutine is closed: Python would warn of one that was never awaited, and warnings are errors here."""

    async def never() -> None:
        raise AssertionError("must not run")

    asked = anyio.Event()

    def answer() -> object:
        asked.set()
        for request in requests:
            request.scope.cancel()
        return Defer(never())

    pool = Pool(Broken(answer))
    async with running(pool) as run:
        requests = [run.send("a")]
        await asked.wait()
        for request in requests:
            await request.done.wait()
