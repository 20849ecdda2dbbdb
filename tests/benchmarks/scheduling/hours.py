"""Hours of the Azure trace by every policy, in the simulator only: an hour takes it a moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from llmux_asgi import ModelCosts
from llmux_asgi.config import PolicyName
from llmux_asgi.simulate import lower_bound, simulate
from tests.benchmarks.scheduling.bounds import bound
from tests.benchmarks.scheduling.loads import COSTS
from tests.benchmarks.scheduling.report import Hour
from tests.benchmarks.scheduling.run import policy_of
from tests.benchmarks.scheduling.traces import replay

__all__ = ["simulate_hours"]

MODELS = ("ab", "abc", "abcde")
EVERY = (5, 20, 80)
"""One of so many requests of the trace: about 1 a second, 1 in 4 s, 1 in 15 s."""
ALL_COSTS = {**COSTS, "d": ModelCosts(2.0, 3.0), "e": ModelCosts(2.0, 5.0)}


def simulate_hours(policies: Sequence[PolicyName], seeds: Sequence[int], tell: Callable[[str], None]) -> list[Hour]:
    """Each number of models, each rate, each seed."""
    cases = [(models, every, seed) for models in MODELS for every in EVERY for seed in seeds]
    with ProcessPoolExecutor() as pool:
        under_way = [pool.submit(_hour, *case, policies) for case in cases]
        hours = []
        for (models, every, seed), future in zip(cases, under_way, strict=True):
            hours.append(future.result())
            tell(f"an hour of the trace: {len(models)} models, 1 of {every}, seed {seed}")
    return hours


def _hour(models: str, every: int, seed: int, policies: Sequence[PolicyName]) -> Hour:
    workload = replay("hour", models, seed, start=0.0, seconds=3600.0, every=every)
    costs = {model: ALL_COSTS[model] for model in models}
    figures = {name: simulate(workload, policy_of(name), costs, seeds=costs).figures() for name in policies}
    means: dict[str, float] = {name: each.mean_wait for name, each in figures.items()}
    floor = lower_bound(workload, costs)
    assert floor is not None  # it is an open load
    longest: dict[str, float] = {name: each.longest_wait for name, each in figures.items()}
    limits: dict[str, float] = {name: bound(policy_of(name), workload, costs) for name in policies}
    return Hour(len(models), every, seed, workload.size, means, longest, limits, floor.clairvoyant, floor.non_anticipating)
