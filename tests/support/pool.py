"""A switcher over fake backends, and a request that uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from llmux_asgi import FifoPolicy, Lease, LLMuxError, Mode, ModelSwitcher, Phase, SwitchPolicy
from tests.support.fakes import GPU, FakeBackend, StoppableFake

LIMIT = 5.0
"""Seconds after which a test that waits for an event has failed."""


@dataclass
class Request:
    """One request: `granted` when it holds its lease, which it keeps until `finish` is set."""

    granted: anyio.Event = field(default_factory=anyio.Event)
    finish: anyio.Event = field(default_factory=anyio.Event)
    done: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    error: LLMuxError | None = None
    interrupted: bool = False
    lease: Lease | None = None
    server: str = ""


class Pool:
    """Models a, b, c over one fake GPU. The processes of those in `stoppable` are the gateway's own."""

    def __init__(self, policy: SwitchPolicy | None = None, *, awake: str = "", stoppable: str = "", **options: object) -> None:
        self.gpu = GPU()
        self.backends = {
            name: (StoppableFake if name in stoppable else FakeBackend)(name, self.gpu, awake=name in awake) for name in "abc"
        }
        self.switcher = ModelSwitcher(
            self.backends,
            policy or FifoPolicy(min_active_duration=0),
            **options,  # type: ignore[arg-type]
        )

    async def request(self, request: Request, model: str, timeout: float | None = None, priority: str | None = None) -> None:
        """Take a lease and hold it until the test says so."""
        with request.scope:
            try:
                async with self.switcher.lease(model, timeout=timeout, priority=priority) as lease:
                    request.lease = lease
                    self.backends[lease.model].forward()
                    request.granted.set()
                    await request.finish.wait()
                    request.interrupted = lease.interrupted
            except LLMuxError as exc:
                request.error = exc
        request.done.set()

    def check(self) -> None:
        """Nothing forbidden happened, and every count is back to zero."""
        assert self.gpu.violations == []
        statistics = self.switcher.statistics()
        assert not any(statistics.in_flight.values()), statistics
        assert not any(statistics.waiting.values()), statistics
        assert not any(statistics.frozen.values()), statistics
        assert not self.switcher._room.frozen


@asynccontextmanager
async def running(pool: Pool) -> AsyncIterator[Runner]:
    """Run requests in the background; at the end all of them must be over, and the books balanced."""
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            yield Runner(pool, tasks)
        events = list(pool.gpu.events)
        await pool.switcher.aclose()
        pool.gpu.events = events  # a test is about what came before its processes were ended
        pool.check()


class Runner:
    """Starts requests for a test."""

    def __init__(self, pool: Pool, tasks: anyio.abc.TaskGroup) -> None:
        self._pool = pool
        self._tasks = tasks

    def send(self, model: str, *, timeout: float | None = None, priority: str | None = None, finish: bool = False) -> Request:
        """Start a request; with `finish` it ends as soon as it is served."""
        request = Request()
        if finish:
            request.finish.set()
        self._tasks.start_soon(self._pool.request, request, model, timeout, priority)
        return request

    async def served(self, model: str) -> Request:
        """Start a request and return when it holds its lease."""
        request = self.send(model)
        await request.granted.wait()
        return request


async def until_phase(pool: Pool, phase: Phase) -> None:
    """Let other tasks run until the switch is in `phase`."""
    while pool.switcher.statistics().phase is not phase:
        await anyio.lowlevel.checkpoint()


async def until_waiting(pool: Pool, model: str, count: int) -> None:
    """Let other tasks run until `count` requests wait for `model`."""
    while pool.switcher.statistics().waiting[model] != count:
        await anyio.lowlevel.checkpoint()


async def until_frozen(pool: Pool, model: str, count: int) -> None:
    """Let other tasks run until `count` requests of `model` are frozen."""
    while pool.switcher.statistics().frozen[model] != count:
        await anyio.lowlevel.checkpoint()


async def until_settled(pool: Pool) -> None:
    """Let other tasks run until the servers have been asked how things stand."""
    while pool.switcher.statistics().mode in (Mode.UNKNOWN, Mode.SWITCHING):
        await anyio.lowlevel.checkpoint()
