"""No policy lets anybody wait for longer than its docstring says: through the switcher, with time that the test makes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import FifoPolicy, GatedQuantumPolicy, ModelCosts, PressurePolicy, SwitchPolicy, ThroughputPolicy
from tests.support.clock import Clock, slowly
from tests.support.pool import LIMIT, Pool

pytestmark = pytest.mark.anyio

SLEEP, WAKE, COST = 1.0, 2.0, 3.0
DRAIN = 2.0
"""The longest answer, in seconds."""
TICK = 0.25

POLICIES: dict[str, tuple[Callable[[], SwitchPolicy], Callable[[int], float]]] = {
    # Its cooldown is not on this clock.
    "fifo": (lambda: FifoPolicy(min_active_duration=0), lambda n: n * (DRAIN + COST)),
    "gated_quantum": (GatedQuantumPolicy, lambda n: DRAIN + (n - 1) * (COST + 4 * COST + DRAIN) + COST),
    "pressure": (lambda: PressurePolicy(max_wait=20), lambda n: 20 + n * (4 * COST + DRAIN + COST)),
    "throughput": (lambda: ThroughputPolicy(max_wait=20), lambda n: 20 + n * (DRAIN + COST)),
}


class World:
    """Requests that come and end as the test says, tick by tick."""

    def __init__(self, policy: SwitchPolicy, **options: Any) -> None:
        policy.request_timeout = None
        self.clock = Clock()
        costs = dict.fromkeys("abc", ModelCosts(SLEEP, WAKE))
        self.pool = Pool(policy, clock=self.clock, costs=costs, awake="a", **options)
        slowly(self.pool, self.clock, sleep=SLEEP, wake=WAKE)
        self.waits: dict[str, list[float]] = {"a": [], "b": [], "c": []}
        self.waits_of: dict[str | None, list[float]] = {"interactive": [], "batch": [], None: []}
        """The same by class."""
        self.running: list[tuple[float, anyio.Event]] = []
        self.pending = 0

    async def request(self, model: str, duration: float, priority: str | None = None) -> None:
        self.pending += 1
        async with self.pool.switcher.lease(model, priority=priority) as lease:
            self.waits[model].append(lease.waited)
            self.waits_of[priority].append(lease.waited)
            over = anyio.Event()
            self.running.append((self.clock.now + duration, over))
            await over.wait()
        self.pending -= 1

    async def tick(self) -> None:
        """Let time pass: whose end has come ends, and whoever wants to be asked again by now is."""
        self.clock.now += TICK
        ended = [each for each in self.running if each[0] <= self.clock.now]
        self.running = [each for each in self.running if each[0] > self.clock.now]
        for _, over in ended:
            over.set()
        self.pool.switcher._room.changed.set()
        for _ in range(12):
            await anyio.lowlevel.checkpoint()
        assert self.pool.gpu.violations == []


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "fifo"])
async def test_a_lone_request_is_served_in_the_midst_of_two_endless_loops(name: str) -> None:
    make, bound = POLICIES[name]
    world = World(make())
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:

            async def loop() -> None:
                while not world.waits["b"]:
                    await world.request("a", DRAIN)

            # Found awake, a would owe no turn: it is left and woken again.
            tasks.start_soon(world.request, "c", 0.0)
            while not world.waits["c"] or world.pending:
                await world.tick()
            tasks.start_soon(loop)
            while not world.waits["a"]:
                await world.tick()
            for _ in range(round(DRAIN / 2 / TICK)):
                await world.tick()
            tasks.start_soon(loop)  # half-way through the other one's request: never are both between two
            tasks.start_soon(world.request, "b", 0.0)
            while not world.waits["b"] or world.pending:
                await world.tick()
        await world.pool.switcher.aclose()
    (waited,) = world.waits["b"]
    turn = 20.0 if name == "throughput" else 4 * COST - DRAIN / 2
    assert turn - 2 * TICK <= waited <= turn + DRAIN + COST + 2 * TICK
    assert waited <= bound(2)


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("name", POLICIES)
async def test_no_wait_exceeds_the_bound_under_random_load_on_three_models(name: str, seed: int) -> None:
    make, bound = POLICIES[name]
    world, chance = World(make()), random.Random(seed)
    weights = {"a": 0.8, "b": 0.2, "c": 0.02}
    with anyio.fail_after(6 * LIMIT):
        async with anyio.create_task_group() as tasks:
            for _ in range(1200):
                for model, weight in weights.items():
                    if chance.random() < weight:
                        tasks.start_soon(world.request, model, chance.uniform(0.1, DRAIN - TICK))
                await world.tick()
            while world.pending:
                await world.tick()
        await world.pool.switcher.aclose()
    assert all(world.waits.values())
    longest = max(max(waits) for waits in world.waits.values())
    assert longest <= bound(3) + 2 * TICK  # time goes on in ticks


# With priorities

HEAD_START = 15.0
PRIORITIES = {"interactive": HEAD_START, "batch": 0.0}


def longest_wait(name: str, models: int, head_start: float) -> float:
    """The documented bound for a request with this head start."""
    if name == "pressure":  # its `max_wait`, here 20 s, takes in the head start
        return max(20.0, HEAD_START) - head_start + models * (4 * COST + DRAIN + COST)
    return POLICIES[name][1](models) + HEAD_START - head_start


@pytest.mark.no_cover
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "fifo"])
async def test_a_batch_request_is_served_in_the_midst_of_steady_interactive_ones(name: str) -> None:
    """Those for c pass it, and those for a keep their turn: until its wait has made up for their head start."""
    world = World(POLICIES[name][0](), priorities=PRIORITIES)
    with anyio.fail_after(3 * LIMIT):
        async with anyio.create_task_group() as tasks:

            async def loop(model: str) -> None:
                while not world.waits["b"]:
                    await world.request(model, DRAIN, "interactive")

            for model in "acac":
                tasks.start_soon(loop, model)
                for _ in range(round(DRAIN / 2 / TICK)):
                    await world.tick()
            while len(world.waits["c"]) < 3:
                await world.tick()
            tasks.start_soon(world.request, "b", 0.0, "batch")
            while not world.waits["b"] or world.pending:
                await world.tick()
        await world.pool.switcher.aclose()
    (waited,) = world.waits["b"]
    assert HEAD_START <= waited <= longest_wait(name, 3, 0.0) + 2 * TICK


async def test_an_interactive_request_need_not_wait_for_the_turn_of_a_batch_to_end() -> None:
    waits = {}
    for priority in ("batch", "interactive"):
        world = World(GatedQuantumPolicy(), priorities=PRIORITIES)
        with anyio.fail_after(LIMIT):
            async with anyio.create_task_group() as tasks:

                async def loop(world: World = world) -> None:
                    while not world.waits["b"]:
                        await world.request("a", DRAIN, "batch")

                tasks.start_soon(world.request, "c", 0.0)
                while not world.waits["c"] or world.pending:
                    await world.tick()
                for _ in range(2):
                    tasks.start_soon(loop)
                    for _ in range(round(DRAIN / 2 / TICK)):
                        await world.tick()
                while not world.waits["a"]:
                    await world.tick()
                tasks.start_soon(world.request, "b", 0.0, priority)
                while not world.waits["b"] or world.pending:
                    await world.tick()
            await world.pool.switcher.aclose()
        (waits[priority],) = world.waits["b"]
    assert waits["interactive"] <= DRAIN + COST + 2 * TICK
    assert waits["batch"] >= 4 * COST - DRAIN


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", [3])
@pytest.mark.parametrize("name", POLICIES)
async def test_no_wait_exceeds_the_bound_of_its_class_under_random_load(name: str, seed: int) -> None:
    world, chance = World(POLICIES[name][0](), priorities=PRIORITIES), random.Random(seed)
    weights = {"a": 0.8, "b": 0.3, "c": 0.1}
    with anyio.fail_after(6 * LIMIT):
        async with anyio.create_task_group() as tasks:
            for _ in range(1200):
                for model, weight in weights.items():
                    if chance.random() < weight:
                        priority = "batch" if chance.random() < (0.1, 0.5)[model == "a"] else "interactive"
                        tasks.start_soon(world.request, model, chance.uniform(0.1, DRAIN - TICK), priority)
                await world.tick()
            while world.pending:
                await world.tick()
        await world.pool.switcher.aclose()
    for priority, head_start in PRIORITIES.items():
        assert max(world.waits_of[priority]) <= longest_wait(name, 3, head_start) + 2 * TICK, priority
