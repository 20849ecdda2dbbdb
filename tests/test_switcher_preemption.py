"""Preemption: a switch freezes running requests, and they go on at their model's next turn. On asyncio and on trio."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    BackendTimeoutError,
    FifoPolicy,
    LLMuxError,
    Phase,
    PolicyContext,
    PolicyDecision,
    PolicyError,
    Stay,
    SwitchContext,
    SwitchError,
    SwitchNow,
    SwitchPolicy,
)
from llmux_asgi._lease import Freeze, Lease, Waiter
from llmux_asgi._state import TicketStatus
from tests.support.pool import LIMIT, Pool, Request, Runner, running, until_frozen, until_phase, until_waiting

pytestmark = pytest.mark.anyio

FAILURE = BackendError("the server said no")


def preempting(**options: int) -> FifoPolicy:
    return FifoPolicy(min_active_duration=0, drain="preempt", **options)


class OneByOne(SwitchPolicy):
    """Preempts; switches to whichever model the test names."""

    min_active_duration = 0.0
    request_timeout = None

    def __init__(self) -> None:
        self.wanted = "b"
        self.seen: list[PolicyContext] = []

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        self.seen.append(context)
        return SwitchNow() if context.target_model == self.wanted else Stay()

    async def prepare_switch(self, context: SwitchContext) -> None:
        await context.preempt()

    async def shown(self, model: str, what: Callable[[PolicyContext], bool]) -> PolicyContext:
        """Wait until the policy is asked about `model` in such a situation."""
        while not (found := [context for context in self.seen if context.target_model == model and what(context)]):
            await anyio.lowlevel.checkpoint()
        return found[0]


def lease_of(request: Request) -> Lease:
    assert request.lease is not None
    return request.lease


async def interrupt(runner: Runner) -> tuple[Request, Request]:
    """A request for a that a switch has frozen, and the one for b that it was for. The policy is to switch to b only."""
    frozen = await runner.served("a")
    other = await runner.served("b")
    assert lease_of(frozen).freeze is not None
    return frozen, other


async def test_a_switch_does_not_wait_for_running_requests_and_they_go_on_when_nobody_else_waits() -> None:
    pool = Pool(preempting(), awake="a")
    async with running(pool) as runner:
        long = await runner.served("a")
        other = await runner.served("b")  # although the request for a is not over
        # Nobody asks for a: the frozen request itself brings its model back.
        other.finish.set()
        while lease_of(long).freeze is not None:
            await anyio.lowlevel.checkpoint()
        statistics = pool.switcher.statistics()
        assert (statistics.active_model, dict(statistics.in_flight)) == ("a", {"a": 1, "b": 0, "c": 0})
        long.finish.set()
        await long.done.wait()
    assert not long.interrupted
    assert (lease_of(long).freezes, lease_of(long).frozen_time > 0) == (1, True)
    assert pool.gpu.events == ["freeze a", "asleep a", "wake b", "awake b", "freeze b", "asleep b", "wake a", "awake a"]


async def test_frozen_requests_are_counted_apart_and_wait_as_long_as_they_are_frozen() -> None:
    policy = OneByOne()
    now = 100.0
    pool = Pool(policy, awake="a", clock=lambda: now)
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        statistics = pool.switcher.statistics()
        assert (dict(statistics.in_flight), dict(statistics.frozen)) == ({"a": 0, "b": 1, "c": 0}, {"a": 1, "b": 0, "c": 0})
        assert not any(statistics.waiting.values())
        now = 107.0
        runner.send("c")
        seen = await policy.shown("a", lambda context: "c" in context.queue_depths)
        assert (seen.target_queue_depth, seen.oldest_waiting, seen.active_in_flight) == (1, 7.0, 1)
        assert list(seen.oldest_waits) == ["a", "c"]  # the longest wait first
        late = runner.send("a")
        await until_waiting(pool, "a", 1)
        now = 110.0
        runner.send("c")
        seen = await policy.shown("a", lambda context: context.queue_depths == {"a": 2, "c": 2})
        assert (seen.oldest_waits["a"], seen.total_waits["a"]) == (10.0, 10.0 + 3.0)
        policy.wanted = "a"
        other.finish.set()
        await late.granted.wait()
        assert pool.switcher.statistics().in_flight["a"] == 2
        policy.wanted = "c"
        for request in (frozen, late):
            request.finish.set()
        while pool.switcher.statistics().active_model != "c":
            await anyio.lowlevel.checkpoint()
        pool.switcher._room.refuse_all("the test is over")
        runner._tasks.cancel_scope.cancel()


async def test_a_frozen_request_whose_client_leaves_frees_its_place() -> None:
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        frozen.scope.cancel()
        await frozen.done.wait()
        assert pool.switcher.statistics().frozen["a"] == 0
        policy.wanted = "a"
        other.finish.set()
        await other.done.wait()
        while pool.switcher._driver.driving:  # it ends: nobody waits any more
            await anyio.lowlevel.checkpoint()
    assert pool.gpu.events == ["freeze a", "asleep a", "wake b", "awake b"]


async def test_a_switch_back_is_given_up_when_the_last_frozen_request_leaves() -> None:
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        gate = pool.backends["a"].gate("state")  # the target is asked before the point of no return
        policy.wanted = "a"
        runner.send("c").scope.cancel()  # something changes: the policy is asked
        await gate.entered.wait()
        frozen.scope.cancel()
        await frozen.done.wait()
        while pool.switcher.statistics().phase is not None:
            await anyio.lowlevel.checkpoint()
        assert pool.switcher.statistics().abandoned == 1
        other.finish.set()
    assert "wake a" not in pool.gpu.events


async def test_a_request_that_was_frozen_often_enough_finishes_first() -> None:
    pool = Pool(preempting(max_freezes=1), awake="a")
    async with running(pool) as runner:
        long = await runner.served("a")
        first = await runner.served("b")
        first.finish.set()
        while lease_of(long).freeze is not None:
            await anyio.lowlevel.checkpoint()
        young = await runner.served("a")
        second = runner.send("b")
        await until_phase(pool, Phase.DRAIN)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert not second.granted.is_set()
        long.finish.set()
        await second.granted.wait()  # the young one has been frozen meanwhile
        assert lease_of(young).freeze is not None
        second.finish.set()
        young.finish.set()


async def test_the_drain_before_preemption_lets_short_requests_finish() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain="preempt", drain_timeout=LIMIT), awake="a")
    async with running(pool) as runner:
        short = await runner.served("a")
        other = runner.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        short.finish.set()
        await other.done.wait()
        assert lease_of(short).freezes == 0


async def test_who_holds_a_lease_is_told_of_the_freeze_and_of_its_end() -> None:
    pool = Pool(OneByOne(), awake="a")
    freezes: list[Freeze] = []
    async with running(pool) as runner:
        lease = await pool.switcher.acquire("a")
        with lease.exchange(lambda: pytest.fail("it is not interrupted"), freezes.append):
            other = await runner.served("b")
            (freeze,) = freezes
            assert (freeze.limit, freeze.over.is_set()) == (300.0, False)
        late: list[Freeze] = []
        with lease.exchange(lambda: None, late.append):
            assert late == [freeze]  # also one that begins in the middle of it
        pool.switcher._policy.wanted = "a"  # type: ignore[attr-defined]
        other.finish.set()
        await freeze.over.wait()
        assert lease.freeze is None
        lease.release()


async def test_a_server_that_cannot_keep_requests_is_a_clear_error_and_nothing_is_disturbed() -> None:
    pool = Pool(OneByOne(), awake="a")
    pool.backends["a"].freezes = False
    async with running(pool) as runner:
        running_request = await runner.served("a")
        refused = runner.send("b")
        await refused.done.wait()
        assert isinstance(refused.error, PolicyError)
        assert "cannot keep requests" in str(refused.error)
        assert pool.switcher.statistics().active_model == "a"
        running_request.finish.set()
    assert not running_request.interrupted
    assert pool.gpu.events == []


@pytest.mark.parametrize("times", [1, 2])
async def test_when_the_server_refuses_the_freeze_its_requests_go_on(times: int) -> None:
    pool = Pool(OneByOne(), awake="a", backoff=(0.0, 0.0))
    pool.backends["a"].fail("sleep", FAILURE, times=times)
    async with running(pool) as runner:
        long = await runner.served("a")
        other = runner.send("b", finish=True)
        await other.done.wait()
        assert isinstance(other.error, SwitchError) == (times == 2)
        assert pool.switcher.statistics().in_flight["a"] == (1 if times == 2 else 0)
        assert (lease_of(long).freeze is None) == (times == 2)
        long.finish.set()
        await long.done.wait()
    assert not long.interrupted
    assert pool.gpu.events[:times] == ["freeze a"] * times


async def test_a_server_that_fell_asleep_over_an_unclear_freeze_has_kept_its_requests() -> None:
    """The call is not answered, and the server gives no clear answer; when it does, it sleeps."""
    policy = OneByOne()
    pool = Pool(policy, awake="a", backoff=(0.0, 0.0))
    a = pool.backends["a"]
    async with running(pool) as runner:
        long = await runner.served("a")
        a.fail("sleep", BackendTimeoutError("too late"), times=2)
        other = runner.send("b")
        await other.done.wait()
        assert isinstance(other.error, SwitchError)
        pool.gpu.doze_off()
        policy.wanted = "a"
        pool.switcher.distrust()
        await pool.switcher.reconcile()
        await until_frozen(pool, "a", 0)
        long.finish.set()
        await long.done.wait()
    assert not long.interrupted
    assert lease_of(long).freezes == 1


async def test_a_server_that_may_still_fall_asleep_over_an_unclear_freeze_is_frozen_before_anything_is_served() -> None:
    pool = Pool(OneByOne(), awake="a", backoff=(0.0, 0.0))
    pool.backends["a"].fail("sleep", BackendTimeoutError("too late"), times=2)
    async with running(pool) as runner:
        long = await runner.served("a")
        other = runner.send("b")
        await other.done.wait()
        assert isinstance(other.error, SwitchError)
        await until_frozen(pool, "a", 1)
        assert pool.gpu.events == ["freeze a", "freeze a", "freeze a", "asleep a"]
        pool.switcher._policy.wanted = "a"  # type: ignore[attr-defined]
        runner.send("c").scope.cancel()  # something changes: the policy is asked
        await until_frozen(pool, "a", 0)
        long.finish.set()
        await long.done.wait()
    assert not long.interrupted


async def test_when_the_target_does_not_wake_the_frozen_requests_go_on() -> None:
    policy = preempting()
    pool = Pool(policy, awake="a", backoff=(0.0, 0.0))
    pool.backends["b"].fail("wake", FAILURE, times=2)
    async with running(pool) as runner:
        long = await runner.served("a")
        other = runner.send("b")
        await other.done.wait()
        assert isinstance(other.error, SwitchError)
        while lease_of(long).freezes == 0 or lease_of(long).freeze is not None:
            await anyio.lowlevel.checkpoint()
        assert pool.switcher.statistics().active_model == "a"
        long.finish.set()
        await long.done.wait()
    assert not long.interrupted


@pytest.mark.parametrize("dies", [False, True])
async def test_when_their_model_does_not_wake_any_more_frozen_requests_are_told(dies: bool) -> None:
    policy = OneByOne()
    pool = Pool(policy, awake="a", backoff=(0.0, 0.0))
    told: list[LLMuxError | None] = []
    async with running(pool) as runner:
        lease = await pool.switcher.acquire("a")
        with lease.exchange(lambda: told.append(lease.error)):
            other = await runner.served("b")
            if dies:
                pool.backends["a"].die()
            else:
                pool.backends["a"].fail("wake", FAILURE, times=2)
            policy.wanted = "a"
            other.finish.set()
            while not told:
                await anyio.lowlevel.checkpoint()
            assert isinstance(told[0], SwitchError)
            assert ("nothing listens" if dies else "said no") in str(told[0])
            assert lease.interrupted
            assert pool.switcher.statistics().frozen["a"] == 0
        lease.release()


async def test_a_process_that_had_to_be_ended_has_interrupted_its_requests() -> None:
    pool = Pool(OneByOne(), awake="a", stoppable="a")
    pool.backends["a"].fail("sleep", FAILURE, times=2)
    async with running(pool) as runner:
        long = await runner.served("a")
        other = await runner.served("b")
        assert pool.switcher.statistics().frozen["a"] == 0
        long.finish.set()
        await long.done.wait()
        other.finish.set()
    assert long.interrupted
    assert lease_of(long).freezes == 0


async def test_closing_tells_frozen_requests() -> None:
    pool = Pool(OneByOne(), awake="a")
    told: list[LLMuxError | None] = []
    async with running(pool) as runner:
        lease = await pool.switcher.acquire("a")
        with lease.exchange(lambda: told.append(lease.error)):
            other = await runner.served("b")
            other.finish.set()
            await pool.switcher.aclose()
            assert str(told[0]) == "Switching to the model 'a' failed: the gateway is shutting down"
        lease.release()


async def test_somebody_else_who_wakes_a_frozen_model_does_no_harm() -> None:
    """It is put to sleep again in the same way, and its requests are still there."""
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        pool.gpu.awake.add("a")
        await pool.switcher.reconcile()
        assert pool.gpu.events[-2:] == ["freeze a", "asleep a"]
        assert pool.switcher.statistics().frozen["a"] == 1
        policy.wanted = "a"
        other.finish.set()
        await until_frozen(pool, "a", 0)
        frozen.finish.set()
        await frozen.done.wait()
    assert not frozen.interrupted


async def test_a_frozen_model_that_alone_is_awake_is_taken_over() -> None:
    pool = Pool(OneByOne(), awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        other.finish.set()
        await other.done.wait()
        pool.gpu.awake.clear()
        pool.gpu.awake.add("a")
        await pool.switcher.reconcile()
        statistics = pool.switcher.statistics()
        assert (statistics.active_model, statistics.in_flight["a"], statistics.frozen["a"]) == ("a", 1, 0)
        frozen.finish.set()
        await frozen.done.wait()
    assert not frozen.interrupted


async def test_another_servers_trouble_is_not_theirs() -> None:
    """The active model gives no clear answer: who waits in a queue is told, frozen requests go on when it does."""
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        pool.backends["b"].fail("state", BackendTimeoutError("too late"), times=2)
        pool.switcher.distrust()
        refused = runner.send("c")
        await refused.done.wait()
        assert isinstance(refused.error, SwitchError)
        assert pool.switcher.statistics().frozen["a"] == 1
        policy.wanted = "a"
        other.finish.set()
        pool.switcher.distrust()
        await until_frozen(pool, "a", 0)
        frozen.finish.set()
        await frozen.done.wait()
    assert not frozen.interrupted


async def test_twenty_alternations_lose_nobody() -> None:
    pool = Pool(preempting(max_freezes=100), awake="a")
    async with running(pool) as runner:
        requests = [await runner.served("ab"[number % 2]) for number in range(20)]
        for request in requests:
            request.finish.set()
        for request in requests:
            await request.done.wait()
    assert not any(request.interrupted or request.error for request in requests)


async def test_a_server_that_dies_over_the_freeze_has_interrupted_its_requests() -> None:
    pool = Pool(preempting(), awake="a")
    gate = pool.backends["a"].gate("sleep")
    async with running(pool) as runner:
        long, other = await runner.served("a"), runner.send("b")
        await gate.entered.wait()
        pool.backends["a"].die()
        gate.open.set()
        await other.granted.wait()
        for request in (long, other):
            request.finish.set()
        await long.done.wait()
    assert long.interrupted


async def test_a_bug_in_a_backend_does_not_cost_the_running_requests() -> None:
    pool = Pool(preempting(), awake="a", backoff=(0.0, 0.0))
    pool.backends["a"].fail("sleep", RuntimeError("bug"))
    async with running(pool) as runner:
        long, other = await runner.served("a"), runner.send("b")
        await other.done.wait()
        assert isinstance(other.error, SwitchError)
        long.finish.set()
        await long.done.wait()
    assert not long.interrupted


async def test_a_switch_that_finds_a_frozen_model_awake_freezes_it_again() -> None:
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        pool.gpu.awake.add("a")  # somebody else has woken it
        policy.wanted = "c"
        third = await runner.served("c")
        assert pool.gpu.events[4:6] == ["freeze a", "asleep a"]
        policy.wanted = "a"
        for request in (other, third):
            request.finish.set()
        await until_frozen(pool, "a", 0)
        frozen.finish.set()
        await frozen.done.wait()
    assert not frozen.interrupted


async def test_servers_that_give_no_clear_answer_are_not_asked_without_a_pause_for_frozen_requests() -> None:
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        b = pool.backends["b"]
        b.fail("state", BackendTimeoutError("too late"), times=1000)
        asked = b.asked
        pool.switcher.distrust()
        while b.asked == asked:
            await anyio.lowlevel.checkpoint()
        for _ in range(200):
            await anyio.lowlevel.checkpoint()
        assert b.asked == asked + 1
        b.faults.clear()
        policy.wanted = "a"
        other.finish.set()  # which is a change: they are asked again at once
        await until_frozen(pool, "a", 0)
        frozen.finish.set()


async def test_a_later_sleep_that_somebody_else_sent_is_no_freeze() -> None:
    """What a server was told by others aborts its requests."""
    policy = OneByOne()
    pool = Pool(policy, awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        pool.gpu.awake.clear()
        await pool.switcher.reconcile()
        assert (pool.switcher.statistics().frozen["b"], pool.switcher.statistics().frozen["a"]) == (0, 1)
        for request in (frozen, other):
            request.finish.set()
        await other.done.wait()
    assert other.interrupted
    assert not frozen.interrupted


async def test_a_request_that_was_granted_and_frozen_before_it_ran_leaves_in_order() -> None:
    """Its lease was granted, and its client left before it could take it."""
    pool = Pool(OneByOne(), awake="a")
    async with running(pool) as runner:
        frozen, other = await interrupt(runner)
        switcher = pool.switcher
        waiter = Waiter("a", 0.0)
        waiter.activation, waiter.status = lease_of(frozen)._activation, TicketStatus.GRANTED
        switcher._state._frozen["a"] += 1
        switcher._state._hold("a", 0.0)
        switcher._room.withdraw(waiter)
        assert switcher.statistics().frozen["a"] == 1
        for request in (frozen, other):
            request.finish.set()
