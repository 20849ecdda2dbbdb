"""What the gateway is asked, and what a switch costs: the same for the measurement and for the simulator.

The five profiles are those of llmux's benchmark. Endless loops end after `ROUNDS` rounds, so that a run ends.
All times are in seconds as a user would see them; the measurement divides them by its factor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llmux_asgi import ModelCosts
from llmux_asgi.simulate import Arrival, Script, Workload
from tests.benchmarks.scheduling.traces import replay

__all__ = ["COSTS", "LOADS", "SERVICE", "Load", "costs_of"]

COSTS = {"a": ModelCosts(2.0, 1.6), "b": ModelCosts(2.0, 7.0), "c": ModelCosts(2.0, 4.0)}
"""Sleep and wake of each model, warm. From b to a it takes 3.6 s, from a to b 9 s, as on the machine of llmux's benchmark."""

SERVICE = (1.0, 3.0)
"""Shortest and longest answer where the load does not say it; drawn evenly between them."""
ROUNDS = 50
"""Requests of each endless loop. Their end falls into the middle of a turn, with each policy: near the end of one, a
hair decides whether two more switches are needed."""
TRACE_SECONDS = 360.0
"""Length of the part of the trace that is replayed."""
TRACE_EVERY = 20
"""One of so many of its requests, drawn by the seed: about one in 4 s. The trace is of a service with many GPUs."""


def costs_of(workload: Workload) -> dict[str, ModelCosts]:
    """What a switch of each of its models costs."""
    return {model: COSTS[model] for model in workload.models}


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of load. `make` draws it by a seed."""

    name: str
    what: str
    """In words, for the page."""
    make: Callable[[int], Workload]
    beats: bool = False
    """Whether the default must have a shorter mean wait than FIFO here."""
    bounded_only: bool = False
    """Whether only the longest wait is judged: FIFO serves a lone request first, at the cost of all others."""
    burst: bool = False
    """Whether many requests come at once. The gateway's own work counts most there: such loads run alone, and at half the
    factor."""


def _requests(chance: random.Random, models: Iterable[tuple[float, str]]) -> tuple[Arrival, ...]:
    return tuple(Arrival(offset, model, chance.uniform(*SERVICE)) for offset, model in models)


def single(seed: int) -> Workload:
    chance = random.Random(f"single {seed}")
    return Workload("single", [Script([_requests(chance, [(0.0, "a")] * 40)])])


def balanced(seed: int) -> Workload:
    chance = random.Random(f"balanced {seed}")
    return Workload("balanced", [Script([_requests(chance, [(0.0, "a"), (0.1, "b")]) for _ in range(20)])])


def bursty(seed: int) -> Workload:
    chance = random.Random(f"bursty {seed}")
    return Workload("bursty", [Script([_requests(chance, [(0.0, model)] * 10) for model in "abab"])])


def dominant(seed: int) -> Workload:
    chance = random.Random(f"dominant {seed}")
    requests = [(0.05 * number, "b" if number % 5 == 4 else "a") for number in range(50)]
    return Workload("dominant", [Script([_requests(chance, requests)])])


def interleave(seed: int) -> Workload:
    chance = random.Random(f"interleave {seed}")
    return Workload("interleave", [Script([_requests(chance, [(0.0, "ab"[number % 2]) for number in range(60)])])])


def _loop(chance: random.Random, model: str, start: float, rounds: int = ROUNDS) -> Script:
    return Script([_requests(chance, [(0.0, model)]) for _ in range(rounds)], start)


def loops(seed: int) -> Workload:
    chance = random.Random(f"loops {seed}")
    return Workload("loops", [_loop(chance, "a", 0.0), _loop(chance, "b", 1.0)])


def overlapping(seed: int) -> Workload:
    chance = random.Random(f"overlapping {seed}")
    return Workload("overlapping", [_loop(chance, "a", 0.0), _loop(chance, "a", 1.0), _loop(chance, "b", 2.0)])


def starvation(seed: int) -> Workload:
    chance = random.Random(f"starvation {seed}")
    return Workload("starvation", [_loop(chance, "a", 0.0), _loop(chance, "a", 1.0), _loop(chance, "b", 6.0, rounds=1)])


def trace(models: str) -> Callable[[int], Workload]:
    def make(seed: int) -> Workload:
        return replay(f"trace {len(models)}", models, seed, start=600.0 * seed % 3000, seconds=TRACE_SECONDS, every=TRACE_EVERY)

    return make


LOADS = [
    Load("single", "40 requests for A at once", single, burst=True),
    Load("balanced", "20 rounds: one for A, 0.1 s later one for B, each round waits for both", balanced, beats=True),
    Load("bursty", "4 bursts of 10, for A, B, A, B, each waited for", bursty, burst=True),
    Load("dominant", "50 requests, 0.05 s apart, each fifth for B, the rest for A", dominant, beats=True, burst=True),
    Load("interleave", "30 for A and 30 for B at once", interleave, burst=True),
    Load("loops", f"two closed loops of {ROUNDS} requests, one on A and one on B", loops, beats=True),
    Load("overlapping", f"three closed loops of {ROUNDS} requests, two on A and one on B", overlapping, beats=True),
    Load(
        "starvation",
        f"two overlapping closed loops of {ROUNDS} requests on A, 6 s later one request for B",
        starvation,
        bounded_only=True,
    ),
    Load(
        "trace, 2 models",
        "6 minutes of the Azure trace, a twentieth of its requests; for A twice as often as for B",
        trace("ab"),
        beats=True,
    ),
    Load("trace, 3 models", "the same; for A, B and C in proportion to 1, 1/2 and 1/3", trace("abc"), beats=True),
]
