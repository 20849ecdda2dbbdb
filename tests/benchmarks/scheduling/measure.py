"""One run of one load through a real gateway, by one policy, over servers that are processes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from llmux_asgi import PolicyConfig
from llmux_asgi.config import POLICY_PARAMETERS, PolicyName
from llmux_asgi.policy import build_policy
from llmux_asgi.sim import SimOptions, SimProcess, start_sims
from llmux_asgi.simulate import Workload
from tests.benchmarks.scheduling.client import play
from tests.benchmarks.scheduling.host import FACTOR, Record
from tests.benchmarks.scheduling.loads import COSTS
from tests.support.gateway_process import gateway_process

__all__ = ["Lane", "Run", "lane"]

TOKENS_PER_SECOND = 1000.0
_PATIENCE = {"connect": 60, "probe": 60}  # a busy machine shows in the figures; it is no fault of the servers
_HOST = "tests.benchmarks.scheduling.host"


@dataclass(frozen=True)
class Run:
    """What was measured. Times are in seconds as a user would see them: multiplied by the factor."""

    waits: Mapping[str, list[float]]
    switches: int
    seconds: float
    """From the first request to the last answer."""
    switching: float
    """For how much of it a model was put to sleep or woken."""
    late: float
    """The most that a request was sent after its time."""


class Lane:
    """Servers, one a model. They outlive a run: each gateway finds all of them asleep."""

    def __init__(self, servers: list[SimProcess], factor: float) -> None:
        self._servers = servers
        self._factor = factor

    def run(self, workload: Workload, policy: PolicyName) -> Run:
        """Measure it on a new gateway. Raises `RuntimeError` if a request or a switch failed."""
        with httpx.Client(trust_env=False) as client:
            for server in self._servers:
                client.post(f"{server.url}/sleep", timeout=30).raise_for_status()
        environment = {FACTOR: str(self._factor)}
        with gateway_process(self._config(workload.models, policy), host=_HOST, environment=environment) as gateway:
            observed = asyncio.run(play(workload, f"{gateway.url}/llm", self._factor, TOKENS_PER_SECOND))
            answer = httpx.get(f"{gateway.url}/record", trust_env=False).raise_for_status()
            record = msgspec.json.decode(answer.content, type=Record)
        counted = sum(map(len, record.waits.values()))
        if record.failures or not counted == observed.answered == workload.size:
            raise RuntimeError(f"{workload.name}, {policy}: {counted} of {workload.size} requests, {gateway.log}")
        factor = self._factor
        return Run(
            {model: [wait * factor for wait in waits] for model, waits in record.waits.items()},
            record.switches,
            observed.seconds * factor,
            sum(record.phases.get(name, 0.0) for name in ("sleep", "wake", "ready")) * factor,
            observed.late * factor,
        )

    def _config(self, models: tuple[str, ...], policy: PolicyName) -> dict[str, Any]:
        factor, urls = self._factor, {server.name: server.url for server in self._servers}
        return {
            "models": {
                model: {
                    "url": urls[model],
                    "timeouts": _PATIENCE,
                    "costs": {"sleep": (COSTS[model].sleep or 0) / factor, "wake": (COSTS[model].wake or 0) / factor},
                }
                for model in models
            },
            "policy": {"name": policy, "request_timeout": None, **self._scaled_defaults(policy)},
            "limits": {"health_interval": None},
        }

    def _scaled_defaults(self, name: PolicyName) -> dict[str, float]:
        policy = build_policy(PolicyConfig(name=name))
        times = {"min_active_duration", *POLICY_PARAMETERS[name]} - {"quantum"}
        return {each: getattr(policy, each) / self._factor for each in times}


@contextmanager
def lane(factor: float) -> Iterator[Lane]:
    """Start the servers of a lane, and end them with the block."""
    options = [
        SimOptions(
            name=name,
            sleep_seconds=(costs.sleep or 0) / factor,
            wake_seconds=(costs.wake or 0) / factor,
            start_asleep=1,
            tokens_per_second=TOKENS_PER_SECOND,
        )
        for name, costs in COSTS.items()
    ]
    with start_sims(*options) as servers:
        yield Lane(servers, factor)
