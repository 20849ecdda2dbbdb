"""Replays of the Azure trace, by the clock.

The arrivals and lengths of a production chat service for one hour: Azure LLM inference trace 2023, conversation (Azure Public
Dataset, https://github.com/Azure/AzurePublicDataset), CC-BY-4.0. A request's model is drawn: the k-th has the weight 1/k.
"""

from __future__ import annotations

import csv
import gzip
import random
from datetime import datetime
from functools import cache
from pathlib import Path

from llmux_asgi.simulate import Arrival, Script, Workload

__all__ = ["TOKENS_PER_SECOND", "replay"]

TRACE = Path(__file__).parents[1] / "traces" / "azure_llm_2023_conv.csv.gz"
TOKENS_PER_SECOND = 80.0
"""How fast each answer is generated."""


@cache
def _rows() -> list[tuple[float, int]]:
    """When each request came, in seconds since the first, and how many tokens were generated for it."""
    with gzip.open(TRACE, "rt", newline="") as file:
        rows = [(datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return [((when - rows[0][0]).total_seconds(), tokens) for when, tokens in rows]


def replay(name: str, models: str, seed: int, *, start: float, seconds: float, every: int) -> Workload:
    """The requests of `seconds` seconds from `start` on, one of `every` drawn by the seed, each for one of `models`."""
    chance = random.Random(f"{name} {seed}")
    weights = [1 / rank for rank in range(1, len(models) + 1)]
    arrivals = [
        Arrival(when - start, chance.choices(models, weights)[0], max(1, tokens) / TOKENS_PER_SECOND)
        for when, tokens in _rows()
        if start <= when < start + seconds and chance.random() < 1 / every
    ]
    return Workload(name, [Script([arrivals])])
