"""The longest wait that each policy's docstring allows, for a load."""

from __future__ import annotations

from collections.abc import Mapping

from llmux_asgi import ModelCosts
from llmux_asgi.policy import FifoPolicy, GatedQuantumPolicy, PressurePolicy, SwitchPolicy, ThroughputPolicy
from llmux_asgi.simulate import Workload

__all__ = ["bound", "lone_bound"]


def bound(policy: SwitchPolicy, workload: Workload, costs: Mapping[str, ModelCosts]) -> float:
    """The formula, with the number of models, the dearest switch and the longest answer (D) of the load. In seconds."""
    n, cost, drain = _figures(workload, costs)
    least = policy.min_active_duration
    match policy:
        case FifoPolicy():
            return n * (least + drain + cost)
        case GatedQuantumPolicy(quantum=quantum):
            return drain + (n - 1) * (cost + max(quantum * cost, least) + drain) + cost
        case PressurePolicy(quantum=quantum, max_wait=max_wait):
            return max_wait + n * (max(quantum * cost, least) + drain + cost)
        case ThroughputPolicy(max_wait=max_wait):
            return max_wait + n * (least + drain + cost)
    raise TypeError(f"{type(policy).__name__} has no formula here")


def lone_bound(policy: SwitchPolicy, workload: Workload, costs: Mapping[str, ModelCosts]) -> float:
    """The same for one request that meets endless traffic of one other model: what is left of a turn, a drain and a switch."""
    _, cost, drain = _figures(workload, costs)
    match policy:
        case ThroughputPolicy(max_wait=turn):
            pass
        case GatedQuantumPolicy(quantum=quantum) | PressurePolicy(quantum=quantum):
            turn = max(quantum * cost, policy.min_active_duration)
        case _:
            turn = policy.min_active_duration
    return turn + drain + cost


def _figures(workload: Workload, costs: Mapping[str, ModelCosts]) -> tuple[int, float, float]:
    models = workload.models
    dearest = max((costs[i].sleep or 0) + (costs[j].wake or 0) for i in models for j in models if len(models) == 1 or i != j)
    longest = max(arrival.service for script in workload.scripts for part in script.rounds for arrival in part)
    return len(models), dearest, longest
