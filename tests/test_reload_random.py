"""Random configurations, one after the other, under random requests: none is lost, and never are two servers in memory."""

from __future__ import annotations

import random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import BackendError, FifoPolicy, UnknownModelError
from llmux_asgi.config import DrainMode
from tests.support.fakes import FakeBackend, Gate
from tests.support.fleet import Fleet, until_settled
from tests.support.pool import Request

pytestmark = pytest.mark.anyio

MODELS, HOSTS = ("qwen", "llama", "phi", "gemma"), "abcde"


class Walk:
    """One seeded walk. Nobody asks for a model that is not configured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.models = self.some_models()
        stoppable = "".join(self.random.sample(HOSTS, 2))
        drain: DrainMode = self.random.choice(["wait", "preempt"])
        self.faults = self.random.random() < 0.5
        policy = FifoPolicy(min_active_duration=0, request_timeout=None, drain=drain, max_freezes=3)
        self.fleet = Fleet(monkeypatch, policy=policy, stoppable=stoppable, **self.models)
        self.requests: list[Request] = []
        self.gates: list[Gate] = []
        self.failed: set[FakeBackend] = set()
        self.served = self.refused = 0

    def some_models(self) -> dict[str, Any]:
        names = self.random.sample(MODELS, self.random.randint(1, len(MODELS)))
        hosts = self.random.sample(HOSTS, len(names))
        level = self.random.choice([1, 2])
        return {name: {"url": f"http://{host}", "sleep_level": level} for name, host in zip(names, hosts, strict=True)}

    async def client(self, request: Request, model: str) -> None:
        if self.fleet.switcher.resolve(model) is not None:  # else it was removed before this task has begun
            await self.fleet.request(request, model)
        self.requests.remove(request)
        self.served += request.granted.is_set()
        if not isinstance(request.error, UnknownModelError):
            assert request.error is None, request.error
        else:  # it was removed before its server came in, and that has gone back to another model
            self.refused += 1
        assert not request.interrupted

    async def step(self, tasks: anyio.abc.TaskGroup) -> None:
        match self.random.choices(["arrive", "finish", "leave", "reload", "hold", "open", "fail"], [30, 28, 3, 5, 8, 20, 2])[0]:
            case "arrive" if len(self.requests) < 12:
                request = Request()
                self.requests.append(request)
                tasks.start_soon(self.client, request, self.random.choice(list(self.models)))
            case "finish" if running := [each for each in self.requests if each.granted.is_set()]:
                self.random.choice(running).finish.set()
            case "leave" if self.requests:
                self.random.choice(self.requests).scope.cancel()
            case "reload":
                self.models = self.some_models() if self.random.random() < 0.8 else dict(self.models)
                await self.fleet.reload(**self.models)
            case "hold" if len(self.gates) < 2:
                backend = self.random.choice(self.fleet.built[-5:])
                self.gates.append(backend.gate(self.random.choice(["sleep", "wake", "ready", "state", "stop", "aclose"])))
            case "open" if self.gates:
                self.gates.pop(0).open.set()
            case "fail" if self.faults:
                backend = self.random.choice(self.fleet.built[-5:])
                if backend not in self.failed:  # two in a row are a switch that fails, and requests with it
                    self.failed.add(backend)
                    backend.fail("sleep", BackendError("once"))
        for _ in range(self.random.randint(0, 4)):
            await anyio.lowlevel.checkpoint()
        assert self.fleet.gpu.violations == []
        assert len(self.fleet.gpu.awake | self.fleet.gpu.half_woken) <= 1

    async def run(self, steps: int) -> None:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(steps):
                    await self.step(tasks)
                for backend in self.fleet.built:
                    for gates in backend.gates.values():
                        for gate in gates:
                            gate.open.set()
                for gate in self.gates:
                    gate.open.set()
                while self.requests:
                    for request in self.requests:
                        if request.granted.is_set():
                            request.finish.set()
                    await anyio.lowlevel.checkpoint()
            await until_settled(self.fleet)
        assert set(self.fleet.switcher.statistics().waiting) == set(self.models)
        assert {model: self.fleet.server(model).name for model in self.models} == {
            model: settings["url"].removeprefix("http://") for model, settings in self.models.items()
        }
        used = {self.fleet.server(model).name for model in self.models}
        assert self.fleet.gpu.awake <= used
        await self.fleet.switcher.aclose()
        assert self.fleet.gpu.violations == []


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(4))
async def test_no_request_is_lost_and_no_two_servers_are_in_memory(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("llmux_asgi._turnover._FIRST_PAUSE", 0.0)
    walk = Walk(monkeypatch, seed)
    await walk.run(400)
    assert walk.served > 50
    assert walk.refused < walk.served / 10
