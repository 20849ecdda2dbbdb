"""What is tried before a switch is given up: a second sleep, a second wake, the end of the process. On asyncio and on trio."""

from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    BackendTimeoutError,
    BackendUnreachableError,
    BackendUnsupportedError,
    FifoPolicy,
    Mode,
    SwitchError,
)
from llmux_asgi.exceptions import BackendDeadError, BackendStartError
from tests.support.pool import Pool, Request, running, until_settled, until_waiting

pytestmark = pytest.mark.anyio

OF_NO_USE = pytest.mark.parametrize("kind", [BackendDeadError, BackendTimeoutError, BackendUnreachableError])
"""Errors of a wake after which the same call again would not do better."""


def assert_refused(request: Request, reason: str) -> None:
    assert isinstance(request.error, SwitchError)
    assert reason in str(request.error)


# Sleep


@pytest.mark.parametrize("kind", [BackendError, BackendTimeoutError, BackendUnsupportedError])
async def test_a_sleep_that_fails_once_is_tried_once_more_and_nobody_is_told(kind: type[BackendError]) -> None:
    pool = Pool(awake="a", sleep_levels={"a": 2}, stoppable="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", kind("fake://a: once"))
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["sleep a", "sleep a", "asleep a", "wake b", "awake b"]
    assert pool.backends["a"].levels == [2]
    assert pool.switcher.statistics().failures == 0


@pytest.mark.parametrize("kind", [BackendError, BackendTimeoutError, BackendUnsupportedError])
async def test_the_process_of_a_model_that_twice_does_not_fall_asleep_is_ended_and_started_when_it_is_wanted(
    kind: type[BackendError], caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(awake="a", stoppable="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", kind("fake://a: stuck"), times=2)
        (await run.served("b")).finish.set()
        assert pool.gpu.events == ["sleep a", "sleep a", "stop a", "stopped a", "wake b", "awake b"]
        pool.gpu.events.clear()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["sleep b", "asleep b", "wake a", "awake a"]
    assert pool.switcher.statistics().failures == 0
    assert [(r.levelno, "ending the process" in r.message) for r in caplog.records if "fake://a: stuck" in r.message] == [
        (logging.WARNING, False),
        (logging.WARNING, True),
    ]


async def test_a_model_that_twice_does_not_fall_asleep_and_is_not_the_gateways_own_fails_the_switch() -> None:
    pool = Pool(awake="a", stoppable="bc")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: POST /sleep answered 500"), times=2)
        second = run.send("b")
        await second.done.wait()
        assert_refused(second, "fake://a: POST /sleep answered 500")
        await until_settled(pool)
        assert pool.switcher.statistics().active_model == "a"
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["sleep a", "sleep a"]
    assert pool.gpu.awake == {"a"}


async def test_a_third_model_that_twice_does_not_fall_asleep_is_ended_before_the_outgoing_one_is_disturbed() -> None:
    pool = Pool(awake="a", stoppable="c")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.gpu.awake.add("c")  # by hand
        pool.backends["c"].fail("sleep", BackendError("fake://c: stuck"), times=2)
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["sleep c", "sleep c", "stop c", "stopped c", "sleep a", "asleep a", "wake b", "awake b"]


async def test_surplus_that_twice_does_not_fall_asleep_is_ended_and_the_other_serves() -> None:
    pool = Pool(awake="ab", stoppable="b")
    pool.backends["b"].fail("sleep", BackendError("fake://b: stuck"), times=2)
    async with running(pool) as run:
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["sleep b", "sleep b", "stop b", "stopped b"]


async def test_nothing_is_woken_while_a_process_cannot_be_ended() -> None:
    pool = Pool(awake="a", stoppable="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("sleep", BackendError("fake://a: stuck"), times=2)
        pool.backends["a"].fail("stop", BackendError("fake://a: cannot be killed"))
        second = run.send("b")
        await second.done.wait()
        assert_refused(second, "fake://a: cannot be killed")
        await until_settled(pool)
        assert pool.switcher.statistics().active_model == "a"
    assert pool.gpu.events == ["sleep a", "sleep a", "stop a"]


async def test_who_holds_a_lease_on_a_model_whose_process_is_ended_is_told() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain=False), awake="a", stoppable="a")
    told = anyio.Event()
    async with running(pool) as run:
        lease = await pool.switcher.acquire("a")
        with lease.exchange(told.set):
            pool.backends["a"].fail("sleep", BackendError("fake://a: stuck"), times=2)
            (await run.served("b")).finish.set()
            assert (lease.interrupted, told.is_set()) == (True, True)
        lease.release()


async def test_who_holds_a_lease_on_a_model_that_was_not_disturbed_is_told_nothing() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain=False), awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        pool.gpu.awake.add("c")  # by hand
        pool.backends["c"].fail("sleep", BackendError("fake://c: stuck"), times=2)
        second = run.send("b")
        await second.done.wait()
        assert_refused(second, "fake://c: stuck")
        await until_settled(pool)
        first.finish.set()
        await first.done.wait()
        assert not first.interrupted


# Wake


async def test_a_wake_that_fails_once_is_tried_once_more_after_the_others_were_asked_again() -> None:
    pool = Pool(awake="a", stoppable="b")
    first, second = pool.backends["b"].gate("wake"), pool.backends["b"].gate("wake")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"))
    async with running(pool) as run:
        request = run.send("b", finish=True)
        await first.entered.wait()
        asked = {name: pool.backends[name].asked for name in "ac"}
        first.open.set()
        await second.entered.wait()
        assert {name: pool.backends[name].asked for name in "ac"} == {name: times + 1 for name, times in asked.items()}
        second.open.set()
        await request.done.wait()
        assert request.error is None
    assert pool.gpu.events == ["sleep a", "asleep a", "wake b", "wake b", "awake b"]
    assert pool.switcher.statistics().failures == 0


async def test_a_woken_model_that_is_not_fit_to_serve_is_woken_once_more() -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("ready", BackendError("fake://b: GET /is_sleeping answered 500"))
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["wake b", "awake b", "wake b", "awake b"]


async def test_a_model_that_awoke_during_a_failed_wake_is_put_to_sleep_before_the_next() -> None:
    pool = Pool(sleep_levels={"c": 2})
    gate = pool.backends["b"].gate("wake")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"))
    async with running(pool) as run:
        request = run.send("b", finish=True)
        await gate.entered.wait()
        pool.gpu.awake.add("c")  # by hand: that is what takes the memory
        gate.open.set()
        await request.done.wait()
        assert request.error is None
    assert pool.gpu.events == ["wake b", "sleep c", "asleep c", "wake b", "awake b"]
    assert pool.backends["c"].levels == [2]


async def test_no_second_wake_is_sent_while_another_model_does_not_fall_asleep() -> None:
    pool = Pool()
    gate = pool.backends["b"].gate("wake")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"))
    pool.backends["c"].fail("sleep", BackendError("fake://c: stuck"), times=4)  # by the switch, and when all are asked again
    async with running(pool) as run:
        request = run.send("b")
        await gate.entered.wait()
        pool.gpu.awake.add("c")  # by hand
        gate.open.set()
        await request.done.wait()
        assert_refused(request, "fake://c: stuck")
    assert pool.gpu.events.count("wake b") == 1


async def test_a_process_that_twice_does_not_wake_is_ended_and_started_again() -> None:
    pool = Pool(awake="a", stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=2)
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["sleep a", "asleep a", "wake b", "wake b", "stop b", "stopped b", "wake b", "awake b"]
    assert pool.switcher.statistics().failures == 0


async def test_who_has_awoken_while_a_process_was_ended_is_put_to_sleep_before_it_is_started_again() -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=2)
    gate = pool.backends["b"].gate("stop")
    async with running(pool) as run:
        request = run.send("b")
        await gate.entered.wait()
        pool.gpu.awake.add("c")  # by hand
        gate.open.set()
        await request.granted.wait()
        request.finish.set()
    assert pool.gpu.events[-6:] == ["stop b", "stopped b", "sleep c", "asleep c", "wake b", "awake b"]


async def test_nothing_is_woken_by_a_switcher_that_is_being_closed() -> None:
    pool = Pool()
    pool.switcher._servers.closing = True
    with pytest.raises(BackendStartError, match="shutting down"):
        await pool.switcher._servers.wake("a")
    assert pool.gpu.events == []


async def test_a_process_that_does_not_wake_after_it_was_started_again_fails_the_switch() -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=3)
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "fake://b: out of memory")
    assert pool.gpu.events == ["wake b", "wake b", "stop b", "stopped b", "wake b"]


async def test_a_process_that_cannot_be_ended_is_not_started_again() -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=2)
    pool.backends["b"].fail("stop", BackendError("fake://b: cannot be killed"))
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "fake://b: cannot be killed")
    assert pool.gpu.events == ["wake b", "wake b", "stop b"]


async def test_a_model_that_twice_does_not_wake_and_is_not_the_gateways_own_fails_the_switch() -> None:
    pool = Pool(stoppable="ac")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"))
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory once more"))
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "fake://b: out of memory once more")
        await until_settled(pool)
        assert pool.switcher.statistics().mode is Mode.IDLE
    assert pool.gpu.events == ["wake b", "wake b"]


@OF_NO_USE
@pytest.mark.parametrize("step", ["wake", "ready"])
async def test_where_a_second_wake_would_be_of_no_use_the_process_is_started_again_at_once(
    kind: type[BackendError], step: str
) -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail(step, kind("fake://b: no"))
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    first = ["wake b", "awake b"] if step == "ready" else ["wake b"]
    assert pool.gpu.events == [*first, "stop b", "stopped b", "wake b", "awake b"]


@OF_NO_USE
async def test_where_a_second_wake_would_be_of_no_use_a_model_that_is_not_the_gateways_own_fails_the_switch(
    kind: type[BackendError],
) -> None:
    pool = Pool(stoppable="ac")
    pool.backends["b"].fail("wake", kind("fake://b: no"))
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "fake://b: no")
    assert pool.gpu.events == ["wake b"]


@pytest.mark.parametrize("kind", [BackendStartError, BackendUnsupportedError])
@pytest.mark.parametrize("before", [0, 1], ids=["at the first wake", "at the second"])
async def test_a_process_that_does_not_start_or_cannot_sleep_fails_the_switch_and_is_not_tried_again(
    before: int, kind: type[BackendError]
) -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=before)
    pool.backends["b"].fail("wake", kind("fake://b: ended before it was ready"))
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "fake://b: ended before it was ready")
        assert pool.gpu.events == ["wake b"] * (before + 1)


async def test_a_half_woken_process_that_twice_does_not_fall_asleep_is_ended_before_another_wakes() -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=3)
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        pool.gpu.events.clear()
        pool.backends["b"].fail("sleep", BackendError("fake://b: stuck"), times=2)
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["sleep b", "sleep b", "stop b", "stopped b", "wake a", "awake a"]


async def test_a_half_woken_process_without_a_clear_state_is_ended_and_that_is_all() -> None:
    pool = Pool(stoppable="b")
    pool.backends["b"].fail("wake", BackendError("fake://b: out of memory"), times=3)
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        await until_settled(pool)
        pool.gpu.events.clear()
        pool.backends["b"].fail("state", BackendError("fake://b: no answer"))
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["stop b", "stopped b", "wake a", "awake a"]


# No clear answer


async def test_a_process_without_a_clear_state_is_ended_before_the_outgoing_model_is_disturbed() -> None:
    pool = Pool(awake="a", stoppable="c")
    pool.backends["c"].fail("state", BackendError("fake://c: no answer"), times=2)  # at the first look, and to the switch
    async with running(pool) as run:
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["stop c", "stopped c", "sleep a", "asleep a", "wake b", "awake b"]


async def test_every_process_without_a_clear_state_is_ended() -> None:
    pool = Pool(stoppable="bc")
    for name in "bc":
        pool.backends[name].fail("state", BackendError("no answer"), times=2)
    async with running(pool) as run:
        (await run.served("a")).finish.set()
    assert set(pool.gpu.events[:-2]) == {"stop b", "stopped b", "stop c", "stopped c"}
    assert pool.gpu.events[-2:] == ["wake a", "awake a"]


async def test_a_process_without_a_clear_state_that_cannot_be_ended_fails_the_switch() -> None:
    pool = Pool(awake="a", stoppable="c")
    pool.backends["c"].fail("state", BackendError("fake://c: no answer"), times=2)
    pool.backends["c"].fail("stop", BackendError("fake://c: cannot be killed"))
    async with running(pool) as run:
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "fake://c: cannot be killed")
    assert pool.gpu.events == ["stop c"]
    assert pool.gpu.awake == {"a"}


async def test_a_sleeping_process_that_gives_no_clear_answer_any_more_is_not_ended() -> None:
    pool = Pool(awake="a", stoppable="c")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["c"].fail("state", BackendTimeoutError("fake://c: no answer"))
        (await run.served("b")).finish.set()
    assert "stop c" not in pool.gpu.events


async def test_an_active_process_without_a_clear_state_is_not_ended_while_it_may_be_serving() -> None:
    pool = Pool(awake="a", stoppable="a")
    async with running(pool) as run:
        first = await run.served("a")
        pool.backends["a"].fail("state", BackendError("fake://a: no answer"))
        pool.switcher.distrust()
        for model in "ab":
            request = run.send(model)
            await request.done.wait()
            assert_refused(request, "the state of the active model 'a' is unknown: fake://a: no answer")
            pool.backends["a"].fail("state", BackendError("fake://a: no answer"))
        assert pool.gpu.events == []
        pool.backends["a"].faults.clear()
        (await run.served("a")).finish.set()
        first.finish.set()
        await first.done.wait()
        assert not first.interrupted


@pytest.mark.parametrize("wanted", ["a", "b"])
async def test_an_active_process_without_a_clear_state_that_serves_nobody_is_ended_and_who_waits_is_served(wanted: str) -> None:
    pool = Pool(awake="a", stoppable="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("state", BackendError("fake://a: no answer"))
        pool.switcher.distrust()
        gate = pool.backends["a"].gate("stop")
        first = run.send(wanted)
        await gate.entered.wait()
        late = run.send("a", finish=True)
        await until_waiting(pool, "a", 2 if wanted == "a" else 1)
        assert not late.granted.is_set()
        gate.open.set()
        await first.granted.wait()
        first.finish.set()
        await late.done.wait()
        assert late.error is None
    assert pool.gpu.events[:4] == ["stop a", "stopped a", f"wake {wanted}", f"awake {wanted}"]


async def test_an_active_process_without_a_clear_state_that_cannot_be_ended_blocks_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Pool(awake="a", stoppable="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        pool.backends["a"].fail("state", BackendError("fake://a: no answer"))
        pool.backends["a"].fail("stop", BackendError("fake://a: cannot be killed"))
        pool.switcher.distrust()
        request = run.send("b")
        await request.done.wait()
        assert_refused(request, "the state of the active model 'a' is unknown: fake://a: cannot be killed")
        assert pool.gpu.events == ["stop a"]
        (await run.served("b")).finish.set()  # it answers again
    assert not [record for record in caplog.records if record.exc_info]
