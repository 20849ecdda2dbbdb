"""One soak: warm up, load and faults, a look at what is left."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from llmux_asgi.sim import GpuLedger
from tests.soak.books import audit
from tests.soak.faults import Injector
from tests.soak.fleet import MODELS, Fleet
from tests.soak.proc import Usage, is_listening, marked_processes, open_files, usage
from tests.soak.traffic import LIMIT, Judge, Order, Plan, send
from tests.support.gateway_process import CLOSE, GatewayProcess, gateway_process
from tests.support.serve import EventLoop

__all__ = ["Report", "Size", "soak"]

_SAMPLE_SECONDS = 0.2
_SETTLE_SECONDS = 30.0
"""For every model to answer again, and for descriptors and threads to be back at their level, after the last fault."""
_END_SECONDS = 30.0
_GROWTH = 1.10
"""The last quarter's memory by the second's, at most."""
_IN_THE_LOG = ("Traceback", "unexpected error", "Exception in ASGI", "never retrieved", "never awaited", "ResourceWarning")


@dataclass(frozen=True)
class Size:
    """How much is done in one soak."""

    requests: int
    switches: int
    faults: int
    concurrency: int = 24
    minutes: float = 9.5
    """After which the load ends, and the soak has failed."""
    preempts: bool = False
    """Whether a switch freezes the running requests (`drain: preempt`)."""
    memory_is_judged: bool = True
    """Not in a short one: the gateway's memory still settles."""


@dataclass
class Report:
    """What happened."""

    violations: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    paused: int = 0
    """Streams that were frozen for so long that a comment came."""
    statistics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)
    """Mean memory in MiB of the gateway in each quarter of the load."""
    before: Usage | None = None
    after: Usage | None = None
    restarts: int = 0
    log: str = ""


class _Watch:
    """Samples the gateway from outside while it is under load."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self._gateway = gateway
        self._client = httpx.AsyncClient(base_url=gateway.url, trust_env=False)
        self.statistics: dict[str, Any] = gateway.statistics()
        self.rss: list[float] = []
        self.switches_before = self.statistics["switches"]

    def switches(self) -> int:
        switches: int = self.statistics["switches"] - self.switches_before
        return switches

    async def run(self) -> None:
        while True:
            self.rss.append(usage(self._gateway.pid).rss_mib)
            self.statistics = (await self._client.get("/statistics", timeout=30)).json()
            await asyncio.sleep(_SAMPLE_SECONDS)

    async def aclose(self) -> None:
        await self._client.aclose()

    def quarters(self) -> list[float]:
        length = max(1, len(self.rss) // 4)
        parts = [self.rss[start : start + length] for start in range(0, 4 * length, length)]
        return [sum(part) / len(part) for part in parts if part]


async def soak(size: Size, loop: EventLoop, seed: int) -> Report:
    """Run one soak. What must not be is in the report's `violations`."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder, "gpu"), size.preempts)
        async with fleet.running():
            with gateway_process(fleet.config(), loop, fleet.gpu) as gateway:
                try:
                    await _soak(size, seed, fleet, gateway, report)
                finally:
                    report.log = gateway.log
        report.restarts = fleet.restarts
        report.violations += audit(GpuLedger(fleet.gpu).events(), fleet.by_hand)
    for line in report.log.splitlines():
        report.violations += [f"in the gateway's log: {line}" for sign in _IN_THE_LOG if sign in line]
    return report


async def _soak(size: Size, seed: int, fleet: Fleet, gateway: GatewayProcess, report: Report) -> None:
    judge = Judge(fleet)
    # Idle connections are closed before the gateway's server does it: a request must not meet that.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=size.concurrency, keepalive_expiry=2.0)
    base = gateway.url + "/llm"
    report.violations += await _until_all_answer(base, fleet)
    await asyncio.sleep(0.5)
    report.before = usage(gateway.pid)

    watch, injector = _Watch(gateway), Injector(seed, fleet, gateway.pid)
    plan = Plan(seed, size.requests, size.switches, watch.switches)
    begun = time.monotonic()
    watcher = asyncio.create_task(watch.run())
    async with httpx.AsyncClient(base_url=base, limits=limits, trust_env=False, timeout=LIMIT) as client:
        try:
            await _load(size, seed, client, plan, judge, injector, begun + 60 * size.minutes)
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])
            await watch.aclose()
            report.seconds = time.monotonic() - begun
            report.faults, report.outcomes, report.latencies = injector.committed, judge.outcomes, judge.seconds
            report.paused = judge.paused
            report.memory = watch.quarters()
        await injector.end()
    if not watcher.cancelled():
        report.violations.append(f"the gateway could not be watched to the end: {watcher.exception()!r}")
    report.violations += judge.violations
    if plan.issued < size.requests or watch.switches() < size.switches:
        report.violations.append(f"only {plan.issued} requests and {watch.switches()} switches in {size.minutes:.3g} minutes")
    if size.memory_is_judged and report.memory[3] > _GROWTH * report.memory[1]:
        report.violations.append(f"the gateway's memory grows: {report.memory} MiB by quarter")
    await _look_back(base, fleet, gateway, report)
    await asyncio.to_thread(_end, fleet, gateway, report)


async def _load(
    size: Size, seed: int, client: httpx.AsyncClient, plan: Plan, judge: Judge, injector: Injector, deadline: float
) -> None:
    """Send all requests, and commit a fault each time that some have been sent."""
    gaps = random.Random(f"gaps {seed}")
    mean = size.requests / max(1, size.faults)

    async def inject() -> None:
        due = 0.0
        while True:
            due += gaps.uniform(0.2 * mean, 1.8 * mean)
            while plan.issued < due:  # noqa: ASYNC110 (a count, not an event)
                await asyncio.sleep(0.005)
            await injector.commit()

    async def work() -> None:
        while time.monotonic() < deadline and (order := plan.next()) is not None:
            await send(client, order, judge)

    injecting = asyncio.create_task(inject())
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(size.concurrency):
                tasks.create_task(work())
    finally:
        injecting.cancel()
        await asyncio.wait([injecting])
    if not injecting.cancelled():
        injecting.result()


async def _until_all_answer(base: str, fleet: Fleet) -> list[str]:
    """Ask the models one after the other until each has answered; returns what went wrong.

    The model whose server is stopped when it sleeps comes first, so that the same processes run each time when this returns.
    """
    deadline = time.monotonic() + _SETTLE_SECONDS
    async with httpx.AsyncClient(base_url=base, headers=CLOSE, trust_env=False, timeout=LIMIT) as client:
        for number, model in enumerate(MODELS):
            while True:
                judge = Judge(fleet)
                order = Order(-number, model.name, model.name, chat=False, stream=False, prompt="are you there?", tokens=8)
                await send(client, order, judge)
                if judge.outcomes["whole answer"]:
                    break
                if judge.violations or time.monotonic() > deadline:
                    return [f"the model {model.name!r} does not answer: {dict(judge.outcomes)} {judge.violations}"]
                await asyncio.sleep(0.1)
    return []


async def _look_back(base: str, fleet: Fleet, gateway: GatewayProcess, report: Report) -> None:
    """No fault is left: all models answer, nobody is counted, nothing is open that was not before."""
    report.violations += await _until_all_answer(base, fleet)
    assert report.before is not None
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        report.after = usage(gateway.pid)
        descriptors = report.after.descriptors - report.before.descriptors
        threads = report.after.threads - report.before.threads
        if (descriptors <= 0 and threads <= 0) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.1)
    if descriptors > 0 or threads > 0:
        report.violations.append(f"left over: {descriptors} file descriptors, {threads} threads; {open_files(gateway.pid)}")
    found = report.statistics = await asyncio.to_thread(gateway.statistics)
    if found["mode"] != "active" or any(any(found[counts].values()) for counts in ("in_flight", "waiting", "frozen")):
        report.violations.append(f"the gateway is not at rest: {found}")


def _end(fleet: Fleet, gateway: GatewayProcess, report: Report) -> None:
    """Stop the gateway as a service manager does, and look for what it leaves behind."""
    ports = [int(gateway.url.rpartition(":")[2]), *(fleet.ports[model.name] for model in MODELS if model.name != "url")]
    gateway.kill(signal.SIGTERM)
    try:
        status = gateway.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        report.violations.append(f"SIGTERM did not end the gateway in {_END_SECONDS} s")
        return
    if status:
        report.violations.append(f"the gateway ended with the exit status {status}")
    report.violations += [f"left over: {process}" for process in marked_processes(gateway.pid)]
    report.violations += [f"left over: something listens on port {port}" for port in ports if is_listening(port)]
