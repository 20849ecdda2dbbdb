"""The same load through the real switcher, on trio's clock that jumps from event to event."""

from __future__ import annotations

import math
from collections.abc import Mapping

import anyio
import trio
import trio.testing

from llmux_asgi import LLMuxError, ModelCosts, ModelSwitcher, SwitchPolicy
from llmux_asgi.simulate import Arrival, Outcome, RequestRecord, Script, Workload
from tests.support.fakes import GPU, FakeBackend


class TimedBackend(FakeBackend):
    """A server in memory whose sleep and wake take their time. As vLLM does, it aborts what runs when it is told to sleep."""

    def __init__(self, name: str, gpu: GPU, costs: ModelCosts, *, awake: bool) -> None:
        super().__init__(name, gpu, awake=awake)
        self.costs = costs
        self.running: set[trio.CancelScope] = set()

    async def sleep(self, level: int) -> None:
        for scope in self.running:
            scope.cancel()
        await anyio.sleep(self.costs.sleep or 0.0)
        await super().sleep(level)

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
    ) -> None:
        self.requests: list[RequestRecord] = []
        self.gpu = GPU()
        self._workload = workload
        self._policy = policy
        self._backends = {name: TimedBackend(name, self.gpu, each, awake=name == active) for name, each in costs.items()}
        self._seeds = seeds
        trio.run(self._run, clock=trio.testing.MockClock(autojump_threshold=0))
        self.requests.sort(key=lambda request: request.arrival)
        assert self.gpu.violations == []

    async def _run(self) -> None:
        self._begun = trio.current_time()
        self._switcher = ModelSwitcher(self._backends, self._policy, costs=self._seeds, clock=trio.current_time)
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
        wait, outcome = math.nan, Outcome.ANSWERED
        try:
            async with self._switcher.lease(arrival.model):
                self._backends[arrival.model].forward()
                wait = trio.current_time() - came
                running = self._backends[arrival.model].running
                with trio.CancelScope() as scope:
                    running.add(scope)
                    await trio.sleep(arrival.service)
                running.discard(scope)
                if scope.cancelled_caught:
                    outcome = Outcome.CUT
        except LLMuxError:
            wait, outcome = trio.current_time() - came, Outcome.LOST
        now = trio.current_time() - self._begun
        self.requests.append(RequestRecord(arrival.model, came - self._begun, wait, now, outcome))
