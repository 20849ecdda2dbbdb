"""All loads by all policies with all seeds, measured and predicted."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from llmux_asgi import PolicyConfig
from llmux_asgi.config import PolicyName
from llmux_asgi.policy import SwitchPolicy, build_policy
from llmux_asgi.simulate import Arrival, Result, Script, Workload, simulate
from tests.benchmarks.scheduling.bounds import bound, lone_bound
from tests.benchmarks.scheduling.loads import COSTS, Load, costs_of
from tests.benchmarks.scheduling.measure import Lane, Run, lane
from tests.benchmarks.scheduling.report import Report, Row, Seeded

__all__ = ["POLICIES", "measure", "policy_of", "predict"]

_WARM_UP = Workload("warm-up", [Script([[Arrival(0.0, model, 1.0) for model in COSTS]])])

POLICIES: tuple[PolicyName, ...] = ("fifo", "gated_quantum", "pressure", "throughput")


def policy_of(name: PolicyName) -> SwitchPolicy:
    """The policy with its defaults, and no limit on a wait."""
    return build_policy(PolicyConfig(name=name, request_timeout=None))


def predict(workload: Workload, name: PolicyName) -> Result:
    """Simulate the load. As the gateway that is measured, it knows the costs from the start."""
    costs = costs_of(workload)
    return simulate(workload, policy_of(name), costs, seeds=costs)


def measure(
    loads: Sequence[Load], policies: Sequence[PolicyName], seeds: Sequence[int], factor: float, tell: Callable[[str], None]
) -> Report:
    """Measure each load by each policy, seed by seed: what disturbs the machine disturbs all policies alike."""
    begun = time.monotonic()
    runs: dict[tuple[str, PolicyName], list[Seeded]] = {(load.name, name): [] for load in loads for name in policies}
    with _lanes(len(policies), factor) as lanes, lane(factor / 2) as alone:
        for each in (*lanes, alone):  # what a server does for the first time takes longer
            each.run(_WARM_UP, "throughput")
        for seed in seeds:
            for load in loads:
                tell(f"{time.monotonic() - begun:5.0f} s: {load.name}, seed {seed}")
                workload = load.make(seed)
                if load.burst:
                    measured = [alone.run(workload, name) for name in policies]
                else:
                    measured = _at_once(lanes, workload, policies)
                for name, run in zip(policies, measured, strict=True):
                    runs[load.name, name].append(_beside(run, predict(workload, name), seed))
    rows = [_row(load, name, seeds, runs[load.name, name]) for load in loads for name in policies]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return Report(factor, machine, time.monotonic() - begun, rows)


@contextmanager
def _lanes(count: int, factor: float) -> Iterator[list[Lane]]:
    with ExitStack() as stack:
        yield [stack.enter_context(lane(factor)) for _ in range(count)]


def _at_once(lanes: Sequence[Lane], workload: Workload, policies: Sequence[PolicyName]) -> list[Run]:
    with ThreadPoolExecutor(len(lanes)) as threads:
        return list(threads.map(lambda each, name: each.run(workload, name), lanes, policies))


def _beside(run: Run, predicted: Result, seed: int) -> Seeded:
    waits = sorted(wait for waits in run.waits.values() for wait in waits)
    figures = predicted.figures()
    return Seeded(
        seed=seed,
        requests=len(waits),
        mean_wait=sum(waits) / len(waits),
        p99_wait=waits[min(len(waits) - 1, int(0.99 * len(waits)))],
        longest_wait=waits[-1],
        switches=run.switches,
        not_switching=1.0 - run.switching / run.seconds,
        seconds=run.seconds,
        late=run.late,
        predicted_mean_wait=figures.mean_wait,
        predicted_longest_wait=figures.longest_wait,
        predicted_switches=figures.switches,
    )


def _row(load: Load, name: PolicyName, seeds: Sequence[int], runs: Sequence[Seeded]) -> Row:
    policy, drawn = policy_of(name), [load.make(seed) for seed in seeds]
    limits = [bound(policy, workload, COSTS) for workload in drawn]
    lone = max(lone_bound(policy, workload, COSTS) for workload in drawn) if load.bounded_only else None
    return Row(load.name, name, load.beats, load.bounded_only, max(limits), lone, tuple(runs))
