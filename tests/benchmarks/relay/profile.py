"""Where a candidate in Python spends its time: `python -m tests.benchmarks.relay.profile [--kind burst] [--native]`.

py-spy looks at it 400 times a second while it is under load. A function's share of the samples times the CPU time of a request,
measured in the same run, is what the function costs a request.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import cast

from tests.benchmarks.relay.candidates import CANDIDATES
from tests.benchmarks.relay.environment import py_spy
from tests.benchmarks.relay.load import Result
from tests.benchmarks.relay.measure import FULL, load_command, run_load, running, upstream
from tests.benchmarks.relay.processes import cores, many_files, pinned
from tests.benchmarks.relay.wire import Kind

__all__ = ["main", "ranked"]

_RATE = 400


def main() -> None:
    """Profile one candidate and print its functions, the costliest first."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay.profile")
    parser.add_argument("--candidate", choices=["gateway", "gateway-sdk", "httpx"], default="gateway")
    parser.add_argument("--kind", choices=["plain", "burst"], default="plain")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=6)
    parser.add_argument("--top", type=int, default=45)
    parser.add_argument("--native", action="store_true", help="C functions too")
    parser.add_argument("--lines", action="store_true", help="by line in place of function")
    given = parser.parse_args()
    kind = cast("Kind", given.kind)
    many_files()
    program = py_spy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stacks = folder / "stacks"
        with upstream(FULL, folder) as port, running(CANDIDATES[given.candidate], port, folder) as target:
            size = dataclasses.replace(FULL, seconds=3.0)
            undisturbed = run_load(target, kind, given.connections, size)  # being looked at takes time
            longer = dataclasses.replace(size, seconds=given.seconds + 2.0)
            load = subprocess.Popen(load_command(target, kind, given.connections, longer), stdout=subprocess.PIPE)
            spy = [program, "record", "--pid", str(target.pid), "--rate", str(_RATE), "--duration", str(given.seconds)]
            spy += ["--format", "raw", "--output", str(stacks), *(["--native"] if given.native else [])]
            spy += [] if given.lines else ["--function"]
            subprocess.run(pinned(spy, cores()[0]), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            load.communicate()
        lines = stacks.read_text().splitlines()
    _print(undisturbed, lines, given.top)


def ranked(lines: list[str]) -> tuple[int, Counter[str], Counter[str]]:
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
    print(f"{rate:,.0f} requests/s, {cost:.0f} µs of CPU a request, {sum(result.errors.values())} errors; {samples} samples")
    for title, counts in (("own time", own), ("with what it calls", total)):
        print(f"\n{title}, µs a request")
        for frame, count in counts.most_common(top):
            print(f"{cost * count / samples:8.1f}  {_short(frame)}")


def _short(frame: str) -> str:
    return frame.replace(str(Path(sys.prefix)), "").replace(str(Path(__file__).resolve().parents[3]), "")


if __name__ == "__main__":
    main()
