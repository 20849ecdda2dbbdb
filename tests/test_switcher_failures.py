"""What goes wrong in a switch, and where everybody stands afterwards. On asyncio and on trio."""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    BackendUnreachableError,
    Defer,
    FifoPolicy,
    PolicyContext,
    PolicyDecision,
    PolicyError,
    SwitchContext,
    SwitchError,
    SwitchNow,
    SwitchPolicy,
)
from tests.support.pool import Pool, running, until_settled

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
