"""Ten thousand random steps against the switcher, on each event loop: no request ever reaches a sleeping server.

Clients come, finish and leave; steps of a switch are held up and let go; sleeps and wakes fail, once or for good; servers die
and come back; time limits pass; an operator has models woken, put to sleep and stopped, pins them and drains. After every step
the invariants are checked, and at the end everything must be whole again.
"""

from __future__ import annotations

import random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import BackendError, BackendTimeoutError, FifoPolicy, LLMuxError, Mode, Phase, QueueFullError
from tests.support.fakes import Gate
from tests.support.pool import Pool, Request

pytestmark = pytest.mark.anyio

STEPS = 10_000
MAX_WAITING = 8
ADMISSION: dict[str, Any] = {
    "priorities": {"high": 1.0, "low": 0.1},
    "default_priorities": {"a": "low"},
    "max_waiting": MAX_WAITING,
}


class Walk:
    """One seeded walk of `steps` steps."""

    def __init__(self, seed: int, steps: int, stoppable: str = "") -> None:
        self.random = random.Random(seed)
        self.steps = steps
        self.now = 0.0
        policy = FifoPolicy(min_active_duration=0, request_timeout=None)
        self.pool = Pool(policy, clock=lambda: self.now, backoff=(1.0, 4.0), stoppable=stoppable, **ADMISSION)
        self.requests: list[Request] = []
        self.gates: list[Gate] = []
        self.served = self.failed = self.refused = 0
        self.orders = self.obeyed = self.refused_orders = 0

    async def client(self, request: Request, model: str, priority: str | None) -> None:
        await self.pool.request(request, model, priority=priority)
        self.requests.remove(request)
        if request.error is None:
            self.served += 1
        elif isinstance(request.error, QueueFullError):
            self.refused += 1
        else:
            assert isinstance(request.error, LLMuxError)
            self.failed += 1

    async def operator(self, operation: str, model: str) -> None:
        switcher = self.pool.switcher
        with anyio.move_on_after(self.random.choice([0.001, 60])):
            try:
                await {"sleep": switcher.sleep, "stop": switcher.stop, "wake": switcher.wake}[operation](model)
            except LLMuxError:
                self.refused_orders += 1
            else:
                self.obeyed += 1
        self.orders -= 1

    def step(self, tasks: anyio.abc.TaskGroup) -> None:
        models = list(self.pool.backends)
        backend = self.pool.backends[self.random.choice(models)]
        self.now += self.random.random() / 10
        match self.random.choices(
            [
                "arrive",
                "finish",
                "leave",
                "hold",
                "open",
                "fail",
                "give_up",
                "doze_off",
                "die",
                "return",
                "distrust",
                "time",
                "order",
                "pin",
                "unpin",
                "drain",
                "resume",
            ],
            [30, 28, 6, 8, 16, 2, 1, 1, 1, 3, 1, 9, 2, 0.5, 1.5, 0.3, 2],
        )[0]:
            case "arrive" if len(self.requests) < 12:
                request = Request()
                self.requests.append(request)
                priority = self.random.choice(["high", "low", None])
                tasks.start_soon(self.client, request, self.random.choice(models), priority)
            case "finish" if running := [r for r in self.requests if r.granted.is_set() and not r.finish.is_set()]:
                self.random.choice(running).finish.set()
            case "leave" if self.requests:
                self.random.choice(self.requests).scope.cancel()
            case "hold" if len(self.gates) < 2:
                self.gates.append(backend.gate(self.random.choice(["sleep", "wake", "ready", "state"])))
            case "open" if self.gates:
                self.gates.pop(0).open.set()
            case "fail" if not any(backend.faults.values()):
                step = self.random.choice(["sleep", "wake", "ready", "state", "stop"])
                backend.fail(step, BackendError("injected"), times=self.random.randint(1, 3))
            case "give_up" if not any(backend.faults.values()):
                step = self.random.choice(["sleep", "wake", "ready"])
                backend.fail(step, BackendTimeoutError("injected"), times=self.random.randint(1, 3))
            case "doze_off":
                self.pool.gpu.doze_off()
            case "die" if backend.reachable:
                backend.die()
                self.pool.switcher.distrust()
            case "return" if not backend.reachable and self.pool.switcher.statistics().mode is not Mode.SWITCHING:
                backend.come_back(awake=self.random.random() < 0.5)
            case "distrust":
                self.pool.switcher.distrust()
            case "time":
                self.now += 1.0
            case "order" if self.orders < 3:
                self.orders += 1
                tasks.start_soon(self.operator, self.random.choice(["sleep", "stop", "wake"]), backend.name)
            case "pin":
                self.pool.switcher.pin(backend.name)
            case "unpin":
                self.pool.switcher.unpin()
            case "drain":
                self.pool.switcher.drain()
            case "resume":
                self.pool.switcher.resume()

    def check(self) -> None:
        gpu, statistics = self.pool.gpu, self.pool.switcher.statistics()
        assert gpu.violations == []
        assert sum(statistics.waiting.values()) <= MAX_WAITING
        assert abs(sum(statistics.shares.values()) - self.now) < 1e-6
        shares, switching = self.pool.switcher._room.shares, statistics.phase not in (None, Phase.COOLDOWN)
        assert shares.switching is switching
        assert shares.idle is (not switching and not statistics.in_flight.get(statistics.active_model or "", 0))
        if statistics.mode is Mode.ACTIVE:
            active = self.pool.backends[statistics.active_model or ""]
            assert active.name in gpu.awake or not active.reachable
            assert statistics.waiting[statistics.active_model or ""] == 0

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(self.steps):
                self.step(tasks)
                for _ in range(self.random.randrange(4)):
                    await anyio.lowlevel.checkpoint()
                self.check()
            for backend in self.pool.backends.values():
                backend.come_back(awake=False)
                backend.faults.clear()
                for gates in backend.gates.values():
                    for gate in gates:
                        gate.open.set()
            for gate in self.gates:
                gate.open.set()
            self.pool.switcher.unpin()
            self.pool.switcher.resume()
            while self.requests or self.orders:
                for request in self.requests:
                    request.finish.set()
                await anyio.lowlevel.checkpoint()
        await self.pool.switcher.aclose()
        self.pool.check()


@pytest.mark.no_cover
@pytest.mark.parametrize(("seed", "stoppable"), [(1, ""), (2, ""), (3, "ab")])
async def test_no_request_reaches_a_sleeping_server_in_ten_thousand_random_steps(seed: int, stoppable: str) -> None:
    walk = Walk(seed, STEPS, stoppable)
    with anyio.fail_after(120):
        await walk.run()
    statistics = walk.pool.switcher.statistics()
    # The walk must have gone everywhere, else it proves nothing.
    assert walk.served > STEPS / 20
    assert walk.failed > 0
    assert walk.refused > 0
    assert walk.obeyed > 10
    assert walk.refused_orders > 10
    assert statistics.switches > 100
    assert statistics.abandoned > 10
    assert statistics.failures > 10
    assert {f"stopped {model}" for model in stoppable} <= set(walk.pool.gpu.events)
