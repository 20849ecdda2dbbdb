"""The same load through the real switcher, on trio's clock that jumps from event to event."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import anyio
import trio
import trio.testing

from llmux_asgi import Lease, ModelCosts, ModelSwitcher, QueueFullError, QueueTimeoutError, SwitchPolicy
from llmux_asgi._lease import Freeze
from llmux_asgi.simulate import Arrival, Outcome, RequestRecord, Script, Workload
from tests.support.fakes import GPU, FakeBackend


class TimedBackend(FakeBackend):
    """A server in memory whose sleep and wake take their time.

    As vLLM does, it aborts what runs when it is told to sleep, or keeps it and goes on with nothing.
    """

    def __init__(self, name: str, gpu: GPU, costs: ModelCosts, *, awake: bool) -> None:
        super().__init__(name, gpu, awake=awake)
        self.costs = costs
        self.keeps = False
        """Whether the last sleep call was one that keeps what runs."""
        self.running: set[trio.CancelScope] = set()

    async def sleep(self, level: int) -> None:
        await self._stop(keep=False)
        await super().sleep(level)

    async def freeze(self, level: int) -> None:
        await self._stop(keep=True)
        await super().freeze(level)

    async def _stop(self, *, keep: bool) -> None:
        self.keeps = keep
        for scope in self.running:
            scope.cancel()
        await anyio.sleep(self.costs.sleep or 0.0)

    async def wake(self) -> None:
        await anyio.sleep(self.costs.wake or 0.0)
        await super().wake()


class Replay:
    """One run: `requests` and `wakes` as the simulator would tell them."""

    def __init__(
        self,
        workload: Workload,
        policy: SwitchPolicy,
        costs: Mapping[str, ModelCosts],
        *,
        active: str | None = None,
        seeds: Mapping[str, ModelCosts] | None = None,
        priorities: Mapping[str, float] | None = None,
        default_priorities: Mapping[str, str] | None = None,
        max_waiting: int | None = None,
        queue_limits: Mapping[str, int] | None = None,
        recompute: float = 0.0,
    ) -> None:
        self.requests: list[RequestRecord] = []
        self.gpu = GPU()
        self._workload = workload
        self._backends = {name: TimedBackend(name, self.gpu, each, awake=name == active) for name, each in costs.items()}
        self._recompute = recompute
        self._make = partial(
            ModelSwitcher,
            self._backends,
            policy,
            costs=seeds,
            priorities=priorities,
            default_priorities=default_priorities,
            max_waiting=max_waiting,
            queue_limits=queue_limits,
        )
        trio.run(self._run, clock=trio.testing.MockClock(autojump_threshold=0))
        self.requests.sort(key=lambda request: request.arrival)
        assert self.gpu.violations == []

    async def _run(self) -> None:
        self._begun = trio.current_time()
        self._switcher = self._make(clock=trio.current_time)
        async with trio.open_nursery() as nursery:
            for script in self._workload.scripts:
                nursery.start_soon(self._play, script)
        await self._switcher.aclose()

    async def _play(self, script: Script) -> None:
        await trio.sleep(script.start)
        for index, arrivals in enumerate(script.rounds):
            if index:
                await trio.sleep(script.pause)
            async with trio.open_nursery() as nursery:
                for arrival in arrivals:
                    nursery.start_soon(self._request, arrival)

    async def _request(self, arrival: Arrival) -> None:
        await trio.sleep(arrival.offset)
        came = trio.current_time()
        priority = self._switcher.priority(arrival.model, arrival.priority)
        wait, outcome, freezes, frozen = math.nan, Outcome.ANSWERED, 0, 0.0
        try:
            async with self._switcher.lease(arrival.model, priority=arrival.priority) as lease:
                self._backends[arrival.model].forward()
                wait = trio.current_time() - came
                outcome, unfinished = await self._serve(lease, arrival.service)
                freezes, frozen = lease.freezes, lease.frozen_time + unfinished
        except QueueFullError:
            wait, outcome = 0.0, Outcome.REFUSED
        except QueueTimeoutError:
            wait, outcome = trio.current_time() - came, Outcome.LOST
        now = trio.current_time() - self._begun
        self.requests.append(RequestRecord(arrival.model, came - self._begun, wait, now, outcome, priority, freezes, frozen))

    async def _serve(self, lease: Lease, service: float) -> tuple[Outcome, float]:
        """Be served. Returns what became of it, and for how long it was in a freeze that was not over."""
        backend, first, remaining = self._backends[lease.model], 0.0, service
        while True:
            freezes: list[Freeze] = []
            noticed = trio.Event()

            def freeze(it: Freeze, freezes: list[Freeze] = freezes, noticed: trio.Event = noticed) -> None:
                freezes.append(it)
                noticed.set()

            with lease.exchange(lambda: None, freeze):
                begun = trio.current_time()
                with trio.CancelScope() as scope:
                    backend.running.add(scope)
                    await trio.sleep(first + remaining)
                backend.running.discard(scope)
                if not scope.cancelled_caught:
                    return Outcome.ANSWERED, 0.0
                if not backend.keeps:
                    return Outcome.CUT, 0.0
                remaining = min(remaining, first + remaining - (trio.current_time() - begun))
                first = self._recompute
                await noticed.wait()
                with trio.move_on_after(freezes[0].limit) as limited:
                    await freezes[0].over.wait()
                if limited.cancelled_caught:
                    return Outcome.EXPIRED, freezes[0].limit
