"""Backends in memory, with gates to stop them in the middle of a step."""

from __future__ import annotations

from collections import deque

import anyio

from llmux_asgi import BackendState


class Gate:
    """Stops who passes it: `entered` tells that somebody stands in it, `open` lets them go on."""

    def __init__(self) -> None:
        self.entered = anyio.Event()
        self.open = anyio.Event()

    async def pass_through(self) -> None:
        self.entered.set()
        await self.open.wait()


class GPU:
    """Keeps account of who is awake, in which order things happened, and of what must never happen."""

    def __init__(self) -> None:
        self.awake: set[str] = set()
        self.events: list[str] = []
        self.violations: list[str] = []

    def wake(self, name: str) -> None:
        """Note that a wake was sent, which must not be while another model holds memory."""
        self.events.append(f"wake {name}")
        if others := self.awake - {name}:
            self.violations.append(f"{name} is woken while {sorted(others)} are awake")


class FakeBackend:
    """A server in memory. `gates` and `faults` are used up in turn, by the name of the step: state, sleep, wake, ready."""

    def __init__(self, name: str, gpu: GPU, *, awake: bool = False) -> None:
        self.name = name
        self.gpu = gpu
        self.reachable = True
        self.gates: dict[str, deque[Gate]] = {}
        self.faults: dict[str, deque[Exception]] = {}
        self.in_flight = 0
        self.levels: list[int] = []
        self.closed = 0
        if awake:
            gpu.awake.add(name)

    def __str__(self) -> str:
        return f"fake://{self.name}"

    def gate(self, step: str) -> Gate:
        gate = Gate()
        self.gates.setdefault(step, deque()).append(gate)
        return gate

    def fail(self, step: str, exc: Exception) -> None:
        self.faults.setdefault(step, deque()).append(exc)

    async def _step(self, step: str) -> None:
        if gates := self.gates.get(step):
            await gates.popleft().pass_through()
        if faults := self.faults.get(step):
            raise faults.popleft()

    async def state(self) -> BackendState:
        await self._step("state")
        if not self.reachable:
            return BackendState.UNREACHABLE
        return BackendState.AWAKE if self.name in self.gpu.awake else BackendState.ASLEEP

    async def sleep(self, level: int) -> None:
        self.gpu.events.append(f"sleep {self.name}")
        await self._step("sleep")
        self.levels.append(level)
        self.gpu.awake.discard(self.name)
        self.gpu.events.append(f"asleep {self.name}")

    async def wake(self) -> None:
        self.gpu.wake(self.name)
        await self._step("wake")
        self.gpu.awake.add(self.name)
        self.gpu.events.append(f"awake {self.name}")

    async def ready(self) -> None:
        await self._step("ready")

    async def aclose(self) -> None:
        self.closed += 1

    def forward(self) -> None:
        """Stand for a request that reaches the server."""
        if self.name not in self.gpu.awake:
            self.gpu.violations.append(f"a request reached {self.name}, which sleeps")
