"""Priority classes and queue limits through the switcher. On asyncio and on trio."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import (
    FifoPolicy,
    GatedQuantumPolicy,
    InvalidRequestError,
    LLMuxError,
    ModelCosts,
    Phase,
    PolicyContext,
    PolicyDecision,
    QueueFullError,
    QueueTimeoutError,
    Stay,
    SwitchContext,
    SwitchPolicy,
)
from tests.support.clock import Clock
from tests.support.pool import Pool, Request, Runner, running, until_phase, until_waiting

pytestmark = pytest.mark.anyio

PRIORITIES = {"interactive": 30.0, "batch": 0.0}
COSTS = {name: ModelCosts(1.0, 4.0) for name in "abc"}
"""A turn of the gated quantum lasts for 20 s."""


def pool_of(clock: Clock, policy: SwitchPolicy | None = None, **options: object) -> Pool:
    policy = policy or GatedQuantumPolicy(request_timeout=None)
    return Pool(policy, clock=clock, priorities=PRIORITIES, costs=COSTS, **options)  # type: ignore[arg-type]


async def quiet() -> None:
    """Let every other task run as far as it comes by itself."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


async def turn_begins(pool: Pool, run: Runner, *, priority: str | None = None) -> Request:
    """Wake a in a pool of which nobody is awake, so that its turn begins now, and have it serve a request of this class."""
    request = run.send("a", priority=priority)
    await request.granted.wait()
    assert pool.switcher.statistics().active_model == "a"
    return request


async def looked_again(pool: Pool) -> None:
    """Have the policy asked, as its own timer would."""
    pool.switcher._room.changed.set()
    await quiet()


async def test_a_higher_class_comes_first_and_passes_a_lower_one_by_its_head_start_only() -> None:
    clock = Clock()
    pool = pool_of(clock, FifoPolicy(min_active_duration=0, request_timeout=None))
    async with running(pool) as run:
        first = await turn_begins(pool, run)
        trigger = run.send("c")
        await until_phase(pool, Phase.DRAIN)
        low = run.send("b", finish=True, priority="batch")
        await until_waiting(pool, "b", 1)
        clock.now += 29.0
        high = run.send("a", priority="interactive")
        await until_waiting(pool, "a", 1)
        first.finish.set()
        await trigger.granted.wait()
        clock.now += 2.0
        trigger.finish.set()
        await high.granted.wait()
        late = run.send("c", finish=True, priority="interactive")  # behind it, although its head start is larger
        await until_waiting(pool, "c", 1)
        assert not low.done.is_set()
        high.finish.set()
        await low.done.wait()
        await late.done.wait()
    assert [event for event in pool.gpu.events if event.startswith("awake")] == [f"awake {model}" for model in "acabc"]


@pytest.mark.parametrize(
    ("serving", "waiting", "cut"),
    [
        ("batch", "interactive", True),
        (None, "interactive", True),
        ("interactive", "interactive", False),
        ("batch", "batch", False),
        ("interactive", "batch", False),
    ],
)
async def test_a_turn_is_cut_across_classes_and_never_within_one(serving: str | None, waiting: str, cut: bool) -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        request = await turn_begins(pool, run, priority=serving)
        other = run.send("b", finish=True, priority=waiting)
        await until_waiting(pool, "b", 1)
        await quiet()
        assert (pool.switcher.statistics().phase is Phase.DRAIN) is cut
        clock.now += 20.0
        await looked_again(pool)
        assert pool.switcher.statistics().phase is Phase.DRAIN
        request.finish.set()
        await other.done.wait()


async def test_between_two_requests_of_a_client_its_class_is_still_there() -> None:
    clock = Clock()
    pool = pool_of(clock)
    async with running(pool) as run:
        batch = await turn_begins(pool, run, priority="batch")
        chat = run.send("a", priority="interactive", finish=True)
        await chat.done.wait()
        other = run.send("b", finish=True, priority="interactive")
        await until_waiting(pool, "b", 1)
        clock.now += 0.25
        again = run.send("a", priority="interactive", finish=True)
        await again.done.wait()
        clock.now += 0.25
        await looked_again(pool)
        assert pool.switcher.statistics().phase is None
        clock.now += 0.25
        await looked_again(pool)
        assert pool.switcher.statistics().phase is Phase.DRAIN
        batch.finish.set()
        await other.done.wait()


async def test_the_least_time_of_a_turn_holds_for_a_higher_class_too() -> None:
    clock = Clock()
    pool = pool_of(clock, GatedQuantumPolicy(request_timeout=None, min_active_duration=3600))
    async with running(pool) as run:
        batch = run.send("a", priority="batch")
        await batch.granted.wait()
        other = run.send("b", priority="interactive")
        await until_phase(pool, Phase.COOLDOWN)
        await quiet()
        assert pool.switcher.statistics().phase is Phase.COOLDOWN
        other.scope.cancel()
        batch.finish.set()


async def test_who_waited_without_a_head_start_is_told_the_real_wait() -> None:
    clock = Clock()
    pool = pool_of(clock)
    pool.backends["a"].gate("wake")
    gate = pool.backends["a"].gates["wake"][0]
    async with running(pool) as run:

        async def ask() -> None:
            async with pool.switcher.lease("a", priority="interactive") as lease:
                assert lease.waited == 7.0

        run._tasks.start_soon(ask)
        await until_phase(pool, Phase.WAKE)
        clock.now += 7.0
        gate.open.set()


async def test_a_models_class_is_that_of_its_requests_and_a_wrong_one_is_an_error_also_if_it_is_active() -> None:
    pool = pool_of(Clock(), default_priorities={"a": "interactive"}, aliases={"x": "a"}, awake="a")
    async with running(pool) as run:
        (await run.served("a")).finish.set()
        assert pool.switcher.priority("x") == "interactive"
        assert pool.switcher.priority("x", "batch") == "batch"
        async with pool.switcher.lease("x") as lease:
            assert lease.head_start == 30.0
        for attempt in (pool.switcher.lease("a", priority="urgent"), pool.switcher.lease("b", priority="urgent")):
            with pytest.raises(InvalidRequestError, match="one of interactive, batch"):
                await attempt.__aenter__()
        with pytest.raises(InvalidRequestError):
            pool.switcher.try_acquire("a", priority="urgent")


# Limits


async def refused(pool: Pool, model: str) -> LLMuxError:
    try:
        async with pool.switcher.lease(model):
            raise AssertionError("it was admitted")
    except LLMuxError as exc:
        return exc


@pytest.mark.parametrize(("options", "places"), [({"max_waiting": 3}, 3), ({"max_waiting": None, "queue_limits": {"b": 2}}, 2)])
async def test_of_many_at_once_no_more_wait_than_may(options: dict[str, object], places: int) -> None:
    pool = pool_of(Clock(), **options)  # type: ignore[arg-type]
    async with running(pool) as run:
        active = await turn_begins(pool, run, priority="interactive")
        requests = [run.send("b", priority="interactive" if n % 2 else None) for n in range(10)]
        await until_waiting(pool, "b", places)
        errors = [request.error for request in requests if request.done.is_set()]
        while len(errors) < 10 - places:
            await anyio.lowlevel.checkpoint()
            errors = [request.error for request in requests if request.done.is_set()]
        assert all(isinstance(error, QueueFullError) for error in errors)
        assert pool.switcher.statistics().waiting["b"] == places
        (await run.served("a")).finish.set()  # who is admitted at once meets no limit
        for request in requests:
            request.scope.cancel()
        active.finish.set()


async def test_who_leaves_gives_up_or_is_served_frees_a_place() -> None:
    clock = Clock()
    pool = pool_of(clock, max_waiting=1)
    async with running(pool) as run:
        active = await turn_begins(pool, run)
        leaving = run.send("b")
        await until_waiting(pool, "b", 1)
        assert isinstance(await refused(pool, "c"), QueueFullError)
        leaving.scope.cancel()
        await leaving.done.wait()
        impatient = run.send("b", timeout=0.01)
        await impatient.done.wait()
        assert isinstance(impatient.error, QueueTimeoutError)
        patient = run.send("b", finish=True)
        await until_waiting(pool, "b", 1)
        assert isinstance(await refused(pool, "b"), QueueFullError)
        clock.now += 20.0
        active.finish.set()
        await patient.done.wait()
        last = run.send("c", finish=True)
        await until_waiting(pool, "c", 1)
        clock.now += 20.0
        await looked_again(pool)
        await last.done.wait()


async def test_a_limit_of_one_model_leaves_the_others_alone() -> None:
    pool = pool_of(Clock(), queue_limits={"b": 1})
    async with running(pool) as run:
        active = await turn_begins(pool, run)
        requests = [run.send(model) for model in "bcc"]
        await until_waiting(pool, "b", 1)
        await until_waiting(pool, "c", 2)
        error = await refused(pool, "b")
        assert "queue for the model 'b' is full: 1 requests wait for it" in str(error)
        for request in requests:
            request.scope.cancel()
        active.finish.set()


async def test_a_refused_request_and_one_that_gives_up_are_told_when_to_come_back() -> None:
    clock = Clock()
    pool = pool_of(clock, max_waiting=1)
    async with running(pool) as run:
        active = await turn_begins(pool, run)
        first = run.send("b")
        await until_waiting(pool, "b", 1)
        clock.now += 4.0
        error = await refused(pool, "b")
        assert isinstance(error, QueueFullError)
        assert error.retry_after == pytest.approx(4 * 5.0 - 4.0 + 5.0)
        first.scope.cancel()
        await first.done.wait()
        second = run.send("b", timeout=0.0)
        await second.done.wait()
        assert isinstance(second.error, QueueTimeoutError)
        assert second.error.retry_after == pytest.approx(4 * 5.0 - 4.0 + 5.0)
        active.finish.set()


class Raises(GatedQuantumPolicy):
    def expected_turn(self, switch_cost: float) -> float:
        raise RuntimeError("bug")


class Small:
    """A policy that is no subclass, and knows the small vocabulary only."""

    sleep_level = 1
    request_timeout = None
    min_active_duration = 7.0

    def on_pending_request(self, context: PolicyContext) -> PolicyDecision:
        return Stay()

    async def prepare_switch(self, context: SwitchContext) -> None: ...


@pytest.mark.parametrize("policy", [Raises(request_timeout=None), Small()])
async def test_a_policy_that_cannot_say_how_long_a_turn_is_costs_no_place(policy: SwitchPolicy) -> None:
    pool = pool_of(Clock(), policy, awake="a")
    async with running(pool) as run:
        active = await run.served("a")
        request = run.send("b", timeout=0.0)
        await request.done.wait()
        assert isinstance(request.error, QueueTimeoutError)
        assert request.error.retry_after >= 1.0
        active.finish.set()
