"""Where a candidate in Python spends its time: `python -m tests.benchmarks.relay.profile [--kind burst] [--lines]`.

A function's share of the samples times the CPU time of an answer, both of the same run, is what the function costs an answer.
What C functions take counts for the Python function that called them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.relay.candidates import CANDIDATES, Place
from tests.benchmarks.relay.load import Result
from tests.benchmarks.relay.measure import FULL, run_loads, running, upstream
from tests.benchmarks.relay.processes import many_files

__all__ = ["main", "ranked"]

_ROOT = Path(__file__).resolve().parents[3]


def main() -> None:
    """Profile one candidate and print its functions, the costliest first."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay.profile")
    parser.add_argument("--candidate", choices=["gateway", "gateway-sdk", "gateway-otel", "httpx"], default="gateway")
    parser.add_argument("--kind", choices=["plain", "burst"], default="plain")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--top", type=int, default=45)
    parser.add_argument("--lines", action="store_true", help="by line in place of function")
    given = parser.parse_args()
    many_files()
    candidate = CANDIDATES[given.candidate]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stacks = folder / "stacks"

        def command(place: Place) -> list[str]:
            assert candidate.command is not None
            return [*candidate.command(place), "--stacks", str(stacks)]

        profiled = dataclasses.replace(candidate, command=command)
        with upstream(FULL, folder) as server, running(profiled, server, folder) as target:
            assert target.pid is not None
            os.kill(target.pid, signal.SIGUSR1)
            size = dataclasses.replace(FULL, seconds=given.seconds, tries=1)
            result = run_loads(target, server, {"load": f"{given.kind}:{given.connections}"}, size)["load"]
        lines = stacks.read_text().splitlines()
    _print(result, lines if given.lines else [re.sub(r":\d+\)", ")", line) for line in lines], given.top)


def ranked(lines: Iterable[str]) -> tuple[int, Counter[str], Counter[str]]:
    """Of folded stacks: how many samples there are, and by function those of its own and those with what it called."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        samples += int(count)
        own[frames[-1]] += int(count)
        for frame in set(frames):
            total[frame] += int(count)
    return samples, own, total


def _print(result: Result, lines: list[str], top: int) -> None:
    samples, own, total = ranked(lines)
    cost = 1e6 * result.cpu / max(1, result.answers)
    rate = result.answers / result.seconds
    print(f"{rate:,.0f} answers/s, {cost:.0f} µs of CPU an answer, {sum(result.errors.values())} errors; {samples} samples")
    for title, counts in (("own time", own), ("with what it calls", total)):
        print(f"\n{title}, µs an answer")
        for frame, count in counts.most_common(top):
            print(f"{cost * count / samples:8.1f}  {_short(frame)}")


def _short(frame: str) -> str:
    for folder in (f"{sys.prefix}/lib/", f"{sys.base_prefix}/lib/", f"{_ROOT}/"):
        frame = frame.replace(folder, "")
    return re.sub(r"python[\d.]+/(site-packages/)?", "", frame)


if __name__ == "__main__":
    main()
