"""Policies of one's own: what they see, what becomes of their answers, and of their mistakes. On asyncio and on trio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    Defer,
    FifoPolicy,
    Phase,
    PolicyContext,
    PolicyDecision,
    PolicyError,
    Stay,
    SwitchContext,
    SwitchNow,
    SwitchPolicy,
)
from tests.support.pool import Pool, running, until_phase, until_waiting

pytestmark = pytest.mark.anyio


class Recorder(SwitchPolicy):
    """Asks the test what to do."""

    min_active_duration = 0.0

    def __init__(self, *decisions: PolicyDecision) -> None:
        self.decisions = list(decisions)
        self.contexts: list[PolicyContext] = []

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        self.contexts.append(context)
        return self.decisions.pop(0) if self.decisions else SwitchNow()


async def test_a_policy_sees_the_whole_small_vocabulary() -> None:
    now = 10.0
    policy = Recorder()
    pool = Pool(policy, clock=lambda: now, awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        wait = anyio.Event()
        policy.decisions.append(Defer(wait.wait()))
        pool.switcher.distrust()  # holds the switcher up, so that it asks when all is in place
        gate = pool.backends["a"].gate("state")
        second, third = run.send("b", finish=True), run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        now += 3.0
        gate.open.set()
        while not policy.contexts:
            await anyio.lowlevel.checkpoint()
        fourth = run.send("c", finish=True)
        await until_waiting(pool, "c", 1)
        first.finish.set()
        wait.set()
        for request in (second, third, fourth):
            await request.done.wait()
    assert policy.contexts[0] == PolicyContext(
        target_model="b", active_model="a", target_queue_depth=2, oldest_waiting=3.0, active_in_flight=1
    )
    assert [context.target_model for context in policy.contexts[:2]] == ["b", "c"]


async def test_a_deferred_switch_begins_when_the_awaitable_is_done_without_asking_again() -> None:
    go = anyio.Event()
    policy = Recorder()
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        policy.decisions.append(Defer(go.wait()))
        second = run.send("b", finish=True)
        await until_waiting(pool, "b", 1)
        third = run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        assert pool.gpu.events == []
        go.set()
        await second.done.wait()
        await third.done.wait()
    assert len(policy.contexts) == 1


async def test_a_deferral_that_has_become_pointless_is_cancelled() -> None:
    cancelled = anyio.Event()

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    policy = Recorder()
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        policy.decisions.append(Defer(wait()))
        second = run.send("b")
        while not policy.contexts:
            await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        second.scope.cancel()
        await cancelled.wait()
        third = run.send("b", finish=True)  # asks anew
        await third.done.wait()
    assert len(policy.contexts) == 2


async def test_a_deferred_model_does_not_hold_up_another() -> None:
    policy = Recorder()
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        policy.decisions.append(Defer(anyio.sleep_forever()))
        second = run.send("b")
        await until_waiting(pool, "b", 1)
        third = run.send("c", finish=True)
        await third.done.wait()
        second.scope.cancel()
    assert pool.gpu.awake == {"c"}


async def test_prepare_switch_may_look_and_wait() -> None:
    seen: list[object] = []

    class Watching(Recorder):
        async def prepare_switch(self, context: SwitchContext) -> None:
            seen.extend([context.from_model, context.to_model, context.in_flight_count])
            seen.append(await context.wait_for_in_flight(timeout=0.01))
            release.set()
            seen.append(await context.wait_for_in_flight())

    release = anyio.Event()
    pool = Pool(Watching(), awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await release.wait()
        first.finish.set()
        await second.done.wait()
    assert seen == ["a", "b", 1, False, True]


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
        (lambda: Stay(until=math.nan), r"returned Stay\(until=nan\); until must be a time in seconds or None"),
        (lambda: Stay(until="soon"), r"returned Stay\(until='soon'\)"),  # type: ignore[arg-type]
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


async def test_who_waits_for_the_outgoing_model_is_served_when_prepare_switch_raises_and_the_other_is_not_paused() -> None:
    class Raising(FifoPolicy):
        broken = True

        async def prepare_switch(self, context: SwitchContext) -> None:
            await context.wait_for_in_flight()
            if self.broken:
                raise ZeroDivisionError("oops")

    policy = Raising(min_active_duration=0)
    pool = Pool(policy, awake="a", backoff=(1000.0, 1000.0))
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        late = run.send("a")
        await until_waiting(pool, "a", 1)
        first.finish.set()
        await second.done.wait()
        await late.granted.wait()
        late.finish.set()
        policy.broken = False
        (await run.served("b")).finish.set()


async def test_an_awaitable_that_raises_when_it_is_cancelled_is_no_concern_of_who_waits_next() -> None:
    go = anyio.Event()

    async def spiteful() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError("oops")

    policy = Recorder()
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        policy.decisions.append(Defer(spiteful()))
        second = run.send("b")
        while not policy.contexts:
            await anyio.lowlevel.checkpoint()
        for _ in range(5):  # the awaitable is under way
            await anyio.lowlevel.checkpoint()
        policy.decisions.append(Defer(go.wait()))
        second.scope.cancel()
        await second.done.wait()
        third = run.send("b", finish=True)
        while len(policy.contexts) < 2:
            await anyio.lowlevel.checkpoint()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        go.set()
        await third.done.wait()
        assert third.error is None


async def test_an_awaitable_that_takes_its_time_to_be_cancelled_holds_nobody_up() -> None:
    begun, end = anyio.Event(), anyio.Event()

    async def slow() -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await end.wait()

    policy = Recorder()
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        policy.decisions.append(Defer(slow()))
        second = run.send("b")
        await begun.wait()
        second.scope.cancel()
        await second.done.wait()
        (await run.served("c")).finish.set()
        end.set()


async def test_a_deferral_is_cancelled_when_its_model_becomes_active_by_other_means() -> None:
    begun, cancelled = anyio.Event(), anyio.Event()

    async def wait() -> None:
        try:
            begun.set()
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    policy = Recorder(Defer(wait()))
    pool = Pool(policy)
    async with running(pool) as run:
        first = run.send("a", finish=True)
        await begun.wait()
        pool.gpu.awake.add("a")  # by hand
        pool.switcher.distrust()
        await first.done.wait()
        await cancelled.wait()


async def test_a_deferral_does_not_keep_the_policy_from_being_asked_about_the_next_model_at_once() -> None:
    policy = Recorder(Defer(anyio.sleep_forever()), Defer(anyio.sleep_forever()))
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        gate = pool.backends["a"].gate("state")
        second, third = run.send("b"), run.send("c")
        await until_waiting(pool, "b", 1)
        await until_waiting(pool, "c", 1)
        gate.open.set()
        while len(policy.contexts) < 2:
            await anyio.lowlevel.checkpoint()
        assert {context.target_model for context in policy.contexts} == {"b", "c"}
        second.scope.cancel()
        third.scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio has no futures that somebody else could cancel
async def test_a_cancelled_future_in_a_defer_fails_its_waiters_and_reaches_nobody_else() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    policy = Recorder(Defer(future))
    pool = Pool(policy)
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("c")
        while not policy.contexts:
            await anyio.lowlevel.checkpoint()
        second = run.send("a", finish=True)
        await gate.entered.wait()  # a step is on the wire when it happens
        future.cancel()
        await first.done.wait()
        assert isinstance(first.error, PolicyError)
        assert "somebody cancelled what it was waiting for" in str(first.error)
        gate.open.set()
        await second.done.wait()
        assert second.error is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_future_in_prepare_switch_is_the_policys_fault() -> None:
    class Cancelled(FifoPolicy):
        async def prepare_switch(self, context: SwitchContext) -> None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    pool = Pool(Cancelled(min_active_duration=0), awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await second.done.wait()
        assert isinstance(second.error, PolicyError)
        (await run.served("a")).finish.set()


def test_a_class_in_place_of_a_policy_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"policy must be an instance of FifoPolicy, not the class: FifoPolicy\(\.\.\.\)"):
        Pool(FifoPolicy)  # type: ignore[arg-type]
