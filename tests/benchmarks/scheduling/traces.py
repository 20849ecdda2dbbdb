"""Replays of the Azure trace, by the clock. Its source and licence stand in `tests/benchmarks/traces/README.md`."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from llmux_asgi.simulate import Arrival, Script, TraceOptions, Workload, read_workload

__all__ = ["replay"]

TRACE = Path(__file__).parents[1] / "traces" / "azure_llm_2023_conv.csv.gz"
TOKENS_PER_SECOND = 80.0
"""How fast each answer is generated."""


@cache
def _hour(models: str, seed: int) -> tuple[Arrival, ...]:
    """All of it. A request's model is drawn: the k-th has the weight 1/k."""
    options = TraceOptions(prefill=0.0, tokens_per_second=TOKENS_PER_SECOND, seed=seed)
    return tuple(read_workload(TRACE, list(models), options=options).scripts[0].rounds[0])


def replay(name: str, models: str, seed: int, *, start: float, seconds: float, every: int) -> Workload:
    """The requests of `seconds` seconds from `start` on, one of `every` drawn by the seed, each for one of `models`."""
    chance = random.Random(f"{name} {seed}")
    arrivals = [
        Arrival(each.offset - start, each.model, each.service)
        for each in _hour(models, seed)
        if start <= each.offset < start + seconds and chance.random() < 1 / every
    ]
    return Workload(name, [Script([arrivals])])
