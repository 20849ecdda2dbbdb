"""The switcher under interleavings that the tests force with gates. On asyncio and on trio."""

from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    Defer,
    FifoPolicy,
    Mode,
    ModelSwitcher,
    Phase,
    PolicyContext,
    PolicyDecision,
    QueueTimeoutError,
    SwitchContext,
    SwitchError,
    SwitchNow,
    SwitchPolicy,
    UnknownModelError,
)
from tests.support.fakes import FakeBackend
from tests.support.pool import Pool, Request, running, until_phase, until_waiting

pytestmark = pytest.mark.anyio


async def test_the_first_request_wakes_its_model() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_model_found_awake_serves_without_any_switch() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
    assert pool.gpu.events == []


async def test_the_fast_path_neither_waits_nor_takes_the_lock() -> None:
    pool = Pool(awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        lease = pool.switcher.try_acquire("a")
        assert lease is not None
        assert pool.switcher.statistics().in_flight["a"] == 2
        lease.release()
        lease.release()
        assert pool.switcher.statistics().in_flight["a"] == 1
        first.finish.set()


async def test_a_switch_drains_then_sleeps_then_wakes() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        assert "sleep a" not in pool.gpu.events
        first.finish.set()
        await second.granted.wait()
        second.finish.set()
    assert pool.gpu.events[2:] == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_requests_for_the_outgoing_model_wait_from_the_drain_on_and_get_the_next_turn() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        late = run.send("a", finish=True)
        await until_waiting(pool, "a", 1)
        first.finish.set()
        await second.done.wait()
        await late.done.wait()
    assert [event for event in pool.gpu.events if event.startswith("awake")] == ["awake a", "awake b", "awake a"]


async def test_requests_for_the_outgoing_model_are_served_during_the_cooldown() -> None:
    pool = Pool(FifoPolicy(min_active_duration=60))
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await until_phase(pool, Phase.COOLDOWN)
        during = await run.served("a")
        during.finish.set()
        second.scope.cancel()


async def test_min_active_duration_is_kept() -> None:
    now = 100.0
    pool = Pool(FifoPolicy(min_active_duration=0.05), clock=lambda: now)
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        begun = anyio.current_time()
        now += 0.01
        second = await run.served("b")
        assert anyio.current_time() - begun >= 0.04
        second.finish.set()


async def test_all_waiters_are_granted_in_the_step_that_completes_the_switch() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        gate = pool.backends["b"].gate("ready")
        waiting = [run.send("b") for _ in range(50)]
        await gate.entered.wait()
        await until_waiting(pool, "b", 50)
        other = run.send("c", finish=True)  # wants to switch away at once: it must find a count of fifty
        await until_waiting(pool, "c", 1)
        gate.open.set()
        while pool.switcher.statistics().active_model != "b":
            await anyio.lowlevel.checkpoint()
        assert pool.switcher.statistics().in_flight["b"] == 50
        for request in waiting:
            await request.granted.wait()
            request.finish.set()
        await other.done.wait()


async def test_models_are_served_in_the_order_of_the_longest_wait() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        third = run.send("c", finish=True)
        await until_waiting(pool, "c", 1)
        fourth = run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        first.finish.set()
        for request in (second, third, fourth):
            await request.done.wait()
    assert [event for event in pool.gpu.events if event.startswith("awake")] == ["awake a", "awake b", "awake c"]


async def test_a_waiter_that_times_out_gets_an_error_that_says_why_and_leaves_the_queue() -> None:
    pool = Pool()
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", timeout=0.01)
        await second.done.wait()
        assert isinstance(second.error, QueueTimeoutError)
        assert "from 'a' (1 in flight), in the phase 'drain'" in str(second.error)
        assert pool.switcher.statistics().waiting["b"] == 0
        # Nobody waits any more: the switch is given up and a goes on, though its first request still runs.
        (await run.served("a")).finish.set()
        first.finish.set()
    assert "sleep a" not in pool.gpu.events
    assert pool.switcher.statistics().abandoned == 1


async def test_a_request_gets_its_timeout_in_time_while_a_step_is_on_the_wire() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["b"].gate("wake")
        first = run.send("b", timeout=0.01)
        await gate.entered.wait()
        await first.done.wait()  # although the wake that it caused is not over
        assert isinstance(first.error, QueueTimeoutError)
        gate.open.set()
        (await run.served("b")).finish.set()
    assert pool.gpu.events == ["wake b", "awake b"]


@pytest.mark.parametrize("phase", [Phase.COOLDOWN, Phase.DRAIN])
async def test_the_only_waiter_is_cancelled_before_the_point_of_no_return(phase: Phase) -> None:
    pool = Pool(FifoPolicy(min_active_duration=60 if phase is Phase.COOLDOWN else 0))
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b")
        await until_phase(pool, phase)
        second.scope.cancel()
        await second.done.wait()
        (await run.served("a")).finish.set()
        first.finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]
    assert pool.switcher.statistics().abandoned == 1


@pytest.mark.parametrize("step", ["sleep", "wake", "ready"])
async def test_the_request_that_began_the_switch_is_cancelled_while_a_step_is_on_the_wire(step: str) -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        gate = pool.backends["a" if step == "sleep" else "b"].gate(step)
        leader = run.send("b")
        await gate.entered.wait()
        follower = run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        leader.scope.cancel()
        await leader.done.wait()
        gate.open.set()
        await follower.done.wait()
    assert pool.gpu.events[2:] == ["sleep a", "asleep a", "wake b", "awake b"]


async def test_a_switch_that_everybody_left_during_the_sleep_does_not_wake() -> None:
    pool = Pool()
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        gate = pool.backends["a"].gate("sleep")
        second = run.send("b")
        await gate.entered.wait()
        second.scope.cancel()
        await second.done.wait()
        gate.open.set()
        third = run.send("a", finish=True)
        await third.done.wait()
    assert pool.gpu.events[2:] == ["sleep a", "asleep a", "wake a", "awake a"]


async def test_a_switch_that_everybody_left_during_the_wake_completes_and_leaves_the_model_active() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first = run.send("a")
        await gate.entered.wait()
        first.scope.cancel()
        gate.open.set()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_waiter_cancelled_at_the_instant_of_its_grant_gives_the_lease_back() -> None:
    pool = Pool()
    async with running(pool) as run:
        gate = pool.backends["a"].gate("ready")
        first = run.send("a")
        await gate.entered.wait()
        gate.open.set()
        while pool.switcher.statistics().mode is not Mode.ACTIVE:
            await anyio.lowlevel.checkpoint()
        first.scope.cancel()  # granted, and perhaps not even resumed yet
        await first.done.wait()
        assert pool.switcher.statistics().in_flight["a"] == 0


async def test_a_request_that_arrives_with_the_last_release_of_a_drain_is_not_admitted() -> None:
    pool = Pool()
    async with running(pool) as run:
        lease = await pool.switcher.acquire("a")
        second = run.send("b", finish=True)
        await until_phase(pool, Phase.DRAIN)
        lease.release()
        # The switcher has not run since: a gap between its two looks at the count would show here.
        assert pool.switcher.try_acquire("a") is None
        await second.done.wait()


async def test_the_only_waiter_leaves_with_the_last_release_of_a_drain() -> None:
    pool = Pool()
    async with running(pool) as run:
        lease = await pool.switcher.acquire("a")
        second = run.send("b")
        await until_phase(pool, Phase.DRAIN)
        second.scope.cancel()
        lease.release()
        await second.done.wait()
        third = run.send("b", finish=True)  # a new one, that a switch given up must not carry over the edge
        await third.done.wait()
    assert pool.gpu.violations == []


async def test_drain_off_interrupts_what_runs() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain=False))
    async with running(pool) as run:
        first = await run.served("a")
        second = await run.served("b")
        first.finish.set()
        second.finish.set()
    assert first.interrupted
    assert not second.interrupted


async def test_the_drain_deadline_interrupts_what_still_runs() -> None:
    pool = Pool(FifoPolicy(min_active_duration=0, drain_timeout=0.01))
    async with running(pool) as run:
        first = await run.served("a")
        second = await run.served("b")
        first.finish.set()
        second.finish.set()
        await first.done.wait()
        third = await run.served("a")  # awake again: a new activation
        third.finish.set()
    assert first.interrupted
    assert not third.interrupted


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


async def test_a_switcher_can_be_made_outside_an_event_loop_and_knows_its_models() -> None:
    switcher = ModelSwitcher({})
    assert switcher.models == ()
    assert switcher.statistics().mode is Mode.UNKNOWN


# Policies of one's own


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


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio has no other cancellation than the one tested above
async def test_natively_cancelled_hosts_do_not_reach_into_a_step() -> None:
    """asyncio's own cancellation passes through anyio's shields: the switch must not run in the request's task."""
    pool = Pool()
    gate = pool.backends["a"].gate("wake")
    request = Request()
    async with running(pool) as run:
        task = asyncio.get_running_loop().create_task(pool.request(request, "a"))
        await gate.entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open.set()
        (await run.served("a")).finish.set()
    assert pool.gpu.events == ["wake a", "awake a"]


async def test_a_backend_is_named_in_errors() -> None:
    pool = Pool()
    pool.backends["a"].reachable = False
    async with running(pool) as run:
        first = run.send("a")
        await first.done.wait()
    assert isinstance(first.error, SwitchError)
    assert str(FakeBackend("a", pool.gpu)) in str(first.error)
