"""Backends in memory, with gates to stop them in the middle of a step."""

from __future__ import annotations

from collections import deque

import anyio

from llmux_asgi import (
    BackendState,
    BackendTimeoutError,
    BackendUnreachableError,
    BackendUnsupportedError,
    TimeoutsConfig,
)
from llmux_asgi.exceptions import BackendStartError


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
        self.half_woken: set[str] = set()
        """Servers that a failed wake has left with a part of their memory: they say that they sleep."""
        self.dozing: set[str] = set()
        """Servers that are awake and have a sleep call before them whose answer nobody waits for any more."""
        self.events: list[str] = []
        self.violations: list[str] = []

    def wake(self, name: str) -> None:
        """Note that a wake was sent, which must not be while another model holds memory."""
        self.events.append(f"wake {name}")
        if others := (self.awake | self.half_woken) - {name}:
            self.violations.append(f"{name} is woken while {sorted(others)} hold memory")

    def doze_off(self) -> None:
        """Have every sleep call that was given up take effect."""
        self.awake -= self.dozing
        self.dozing.clear()


class FakeBackend:
    """A server in memory. `gates` and `faults`, by the step (the name of the method), are used up in turn."""

    def __init__(self, name: str, gpu: GPU, *, awake: bool = False) -> None:
        self.name = name
        self.gpu = gpu
        self.reachable = True
        self.gates: dict[str, deque[Gate]] = {}
        self.faults: dict[str, deque[Exception]] = {}
        self.freezes = True
        """Whether it can keep its requests while it sleeps."""
        self.in_flight = 0
        self.levels: list[int] = []
        self.closed = 0
        self.tuned: list[tuple[float, bool]] = []
        """The limits of a wake and whether it is to freeze requests, as it was told after it was built."""
        self.asked = 0
        if awake:
            gpu.awake.add(name)

    def __str__(self) -> str:
        return f"fake://{self.name}"

    def gate(self, step: str) -> Gate:
        gate = Gate()
        self.gates.setdefault(step, deque()).append(gate)
        return gate

    def fail(self, step: str, exc: Exception, *, times: int = 1) -> None:
        """Have the next `times` calls fail. It takes two for good: a sleep or a wake that has failed is tried once more."""
        self.faults.setdefault(step, deque()).extend([exc] * times)

    def die(self) -> None:
        """Have the process end, and its memory with it."""
        self.reachable = False
        self._release_memory()

    def come_back(self, *, awake: bool) -> None:
        """Have the process be started again, if it has died."""
        if not self.reachable:
            self.reachable = True
            if awake:
                self.gpu.awake.add(self.name)

    def _release_memory(self) -> None:
        for holders in (self.gpu.awake, self.gpu.half_woken, self.gpu.dozing):
            holders.discard(self.name)

    async def _step(self, step: str) -> None:
        if gates := self.gates.get(step):
            await gates.popleft().pass_through()
        if faults := self.faults.get(step):
            raise faults.popleft()
        if not self.reachable and step not in ("state", "stop", "aclose"):
            raise BackendUnreachableError(f"fake://{self.name}: nothing listens there")

    async def state(self) -> BackendState:
        self.asked += 1
        await self._step("state")
        if not self.reachable:
            return BackendState.UNREACHABLE
        return BackendState.AWAKE if self.name in self.gpu.awake else BackendState.ASLEEP

    async def require_freezing(self) -> None:
        if not self.freezes:
            raise BackendUnsupportedError(f"fake://{self.name}: it cannot keep requests")

    async def freeze(self, level: int) -> None:
        await self._put_to_sleep(level, "freeze")

    async def sleep(self, level: int) -> None:
        await self._put_to_sleep(level, "sleep")

    async def _put_to_sleep(self, level: int, how: str) -> None:
        self.gpu.events.append(f"{how} {self.name}")
        try:
            await self._step("sleep")
        except BackendTimeoutError:
            if self.reachable:  # a process that is gone does nothing more
                self.gpu.dozing.add(self.name)
            raise
        self.levels.append(level)
        self._release_memory()
        self.gpu.events.append(f"asleep {self.name}")

    async def wake(self) -> None:
        self.gpu.wake(self.name)
        if self.reachable:
            self.gpu.half_woken.add(self.name)
        await self._step("wake")
        self.gpu.half_woken.discard(self.name)
        self.gpu.awake.add(self.name)
        self.gpu.events.append(f"awake {self.name}")

    async def ready(self) -> None:
        await self._step("ready")

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        self.tuned.append((timeouts.wake, freezes))

    async def aclose(self) -> None:
        await self._step("aclose")
        self.closed += 1

    def forward(self) -> None:
        """Stand for a request that reaches the server."""
        if self.name not in self.gpu.awake and self.reachable:
            self.gpu.violations.append(f"a request reached {self.name}, which sleeps")
        if self.name in self.gpu.dozing:
            self.gpu.violations.append(f"a request reached {self.name}, which is about to fall asleep")


class StoppableFake(FakeBackend):
    """A server whose process is the gateway's own: `stop` ends it, and its memory with it; the next wake starts it."""

    async def state(self) -> BackendState:
        state = await super().state()
        return BackendState.STOPPED if state is BackendState.UNREACHABLE else state

    async def _put_to_sleep(self, level: int, how: str) -> None:
        if self.reachable:
            await super()._put_to_sleep(level, how)
        else:
            self.gpu.events.append(f"{how} {self.name}")  # nothing to do

    async def wake(self) -> None:
        self.reachable = True
        try:
            await super().wake()
        except BackendStartError:
            self.die()
            raise

    async def stop(self) -> None:
        self.gpu.events.append(f"stop {self.name}")
        await self._step("stop")
        self.die()
        self.gpu.events.append(f"stopped {self.name}")
