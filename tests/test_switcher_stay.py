"""`Stay(until)`: not now; asked again at that time at the latest, and whenever something changes. On asyncio and on trio."""

from __future__ import annotations

import math
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    BackendError,
    Defer,
    Phase,
    PolicyContext,
    PolicyDecision,
    Stay,
    SwitchError,
    SwitchNow,
    SwitchPolicy,
)
from llmux_asgi._decision import Decider
from llmux_asgi._state import SwitcherState, Ticket
from tests.support.pool import Pool, running, until_phase, until_waiting

pytestmark = pytest.mark.anyio


class Rule(SwitchPolicy):
    """Answers what `rule` says, and keeps what it was asked."""

    min_active_duration = 0.0
    request_timeout = None

    def __init__(self, rule: Callable[[PolicyContext], PolicyDecision]) -> None:
        self.rule = rule
        self.asked: list[str] = []

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        self.asked.append(context.target_model)
        return self.rule(context)

    async def until_asked(self, times: int) -> None:
        while len(self.asked) < times:
            await anyio.lowlevel.checkpoint()

    async def asked_again(self) -> None:
        await self.until_asked(len(self.asked) + 1)


def stay(context: PolicyContext) -> PolicyDecision:
    return Stay()


async def quiet() -> None:
    """Let every other task run as far as it comes by itself."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def test_without_a_change_and_without_a_time_it_is_not_asked_again() -> None:
    policy = Rule(stay)
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        second = run.send("b")
        await policy.until_asked(1)
        await quiet()
        before = len(policy.asked)
        await quiet()
        assert len(policy.asked) == before
        second.scope.cancel()
    assert pool.gpu.events == []


async def test_it_is_asked_again_at_the_time_it_named_although_nothing_changes() -> None:
    policy = Rule(lambda context: Stay(until=context.now + 0.01) if len(policy.asked) < 3 else SwitchNow())
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        second = run.send("b", finish=True)
        await second.done.wait()
    assert policy.asked == ["b"] * 3


@pytest.mark.parametrize("until", [-math.inf, 0.0])
async def test_a_time_that_is_past_asks_again_and_lets_others_run(until: float) -> None:
    go = False
    policy = Rule(lambda _: SwitchNow() if go else Stay(until=until))
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        second = run.send("b", finish=True)
        await policy.until_asked(3)
        go = True
        await second.done.wait()


async def test_it_is_asked_again_when_a_request_arrives() -> None:
    policy = Rule(lambda context: SwitchNow() if context.target_queue_depth == 2 else Stay(until=math.inf))
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        second = run.send("b", finish=True)
        await policy.until_asked(1)
        third = run.send("b", finish=True)
        await second.done.wait()
        await third.done.wait()


async def test_it_is_asked_again_when_a_request_is_over() -> None:
    policy = Rule(lambda context: Stay() if context.active_in_flight else SwitchNow())
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        first = await run.served("a")
        second = run.send("b", finish=True)
        await policy.until_asked(1)
        first.finish.set()
        await second.done.wait()


async def test_it_is_asked_again_when_one_of_several_leaves() -> None:
    policy = Rule(stay)
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        second, third = run.send("b"), run.send("b", finish=True)
        await until_waiting(pool, "b", 2)
        await policy.until_asked(1)
        await quiet()
        policy.rule = lambda context: SwitchNow() if context.target_queue_depth == 1 else Stay()
        second.scope.cancel()
        await third.done.wait()


async def test_it_is_asked_again_when_another_model_has_become_active() -> None:
    policy = Rule(lambda context: SwitchNow() if context.target_model == "b" or context.active_model == "b" else Stay())
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        third = run.send("c", finish=True)
        await policy.until_asked(1)
        second = run.send("b", finish=True)
        await second.done.wait()
        await third.done.wait()
    assert pool.gpu.awake == {"c"}


async def test_it_is_asked_again_when_a_switch_has_failed() -> None:
    policy = Rule(lambda context: Stay() if context.target_model == "c" and "b" not in policy.asked else SwitchNow())
    pool = Pool(policy, awake="a")
    pool.backends["b"].fail("wake", BackendError("no"), times=2)
    async with running(pool) as run:
        third = run.send("c", finish=True)
        await policy.until_asked(1)
        second = run.send("b", finish=True)
        await second.done.wait()
        assert isinstance(second.error, SwitchError)
        await third.done.wait()


async def test_staying_for_one_model_does_not_hold_up_another_or_its_deferral() -> None:
    go = anyio.Event()
    policy = Rule(lambda context: Defer(go.wait()) if context.target_model == "b" else Stay())
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        third = run.send("c")
        second = run.send("b", finish=True)
        await policy.until_asked(2)
        await quiet()
        assert policy.asked.count("b") == 1
        go.set()
        await second.done.wait()
        third.scope.cancel()


async def test_the_earliest_time_counts_and_only_as_of_the_last_answers() -> None:
    answers = {"a": Stay(until=7.0), "b": Stay(), "c": Stay(until=5.0)}
    policy = Rule(lambda context: answers[context.target_model])
    state = SwitcherState("abc")
    for model in "abc":
        state.enqueue(Ticket(model, 0.0))
    decider = Decider(policy, state, lambda: 1.0, lambda *_: None, lambda: None, lambda: ({}, {}))
    assert decider.ask_again_at == math.inf
    assert decider.choose() is None
    assert decider.ask_again_at == 5.0
    answers["a"] = answers["c"] = Stay()
    assert decider.choose() is None
    assert decider.ask_again_at == math.inf


async def test_nobody_is_asked_while_a_switch_is_under_way() -> None:
    policy = Rule(lambda _: SwitchNow())
    pool = Pool(policy, awake="a")
    async with running(pool) as run:
        gate = pool.backends["b"].gate("wake")
        second = run.send("b", finish=True)
        await gate.entered.wait()
        await until_phase(pool, Phase.WAKE)
        third = run.send("c", finish=True)
        await quiet()
        assert policy.asked == ["b"]
        gate.open.set()
        await second.done.wait()
        await third.done.wait()


# What the context holds


async def test_the_context_holds_the_whole_situation() -> None:
    now, seen = 100.0, list[PolicyContext]()

    def look(context: PolicyContext) -> PolicyDecision:
        seen.append(context)
        return SwitchNow() if context.active_model is None or go else Stay()

    go = False
    policy = Rule(look)
    pool = Pool(policy, clock=lambda: now)
    async with running(pool) as run:
        gate = pool.backends["a"].gate("wake")
        first, second = run.send("a"), run.send("a")
        await gate.entered.wait()
        gate.open.set()
        await first.granted.wait()
        await second.granted.wait()
        now = 101.0
        waiting = [run.send("c", finish=True)]
        await until_waiting(pool, "c", 1)
        now = 102.0
        waiting += [run.send("b", finish=True), run.send("b", finish=True)]
        await until_waiting(pool, "b", 2)
        first.finish.set()
        await first.done.wait()
        now = 104.0
        await quiet()
        assert seen[-1].idle_for == 0.0
        second.finish.set()
        await second.done.wait()
        await quiet()
        now = 107.0
        go = True
        waiting.append(run.send("c", finish=True))
        for request in waiting:
            await request.done.wait()
    context = next(each for each in seen if each.now == 107.0)
    assert (context.target_model, context.active_model, context.active_since) == ("c", "a", 100.0)
    assert (context.queued_at_activation, context.idle_for, context.active_in_flight) == (2, 3.0, 0)
    assert list(context.queue_depths.items()) == [("c", 2), ("b", 2)]
    assert list(context.oldest_waits.items()) == [("c", 6.0), ("b", 5.0)]
    assert list(context.total_waits.items()) == [("c", 6.0), ("b", 10.0)]


async def test_a_context_of_the_small_vocabulary_can_be_made_compared_and_hashed() -> None:
    small = PolicyContext(target_model="b", active_model="a", target_queue_depth=2, oldest_waiting=3.0, active_in_flight=1)
    full = PolicyContext("b", "a", 2, 3.0, 1, now=7.0, queue_depths={"b": 2})
    assert small == full
    assert hash(small) == hash(full)
    assert small != PolicyContext("b", "a", 3, 3.0, 1)


@pytest.mark.parametrize("depth", [1, 10_000])
async def test_a_decision_looks_at_no_request_but_the_oldest_of_each_model(depth: int) -> None:
    looked = 0

    class Counted(Ticket):
        def __getattribute__(self, name: str) -> object:
            nonlocal looked
            looked += 1
            return super().__getattribute__(name)

    state = SwitcherState("abc")
    for model in "bc":
        for _ in range(depth):
            state.enqueue(Counted(model, 0.0))
    decider = Decider(Rule(stay), state, lambda: 1.0, lambda *_: None, lambda: None, lambda: ({}, {}))
    looked = 0
    assert decider.choose() is None
    assert looked <= 3 * 2
