"""Run the candidates in turn, round by round, each in a process of its own that begins anew."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.benchmarks.relay.candidates import Candidate, Place
from tests.benchmarks.relay.environment import Unavailable
from tests.benchmarks.relay.load import Result, Sizes
from tests.benchmarks.relay.processes import cores, free_port, many_files, memory, pinned, started, wait_ready
from tests.benchmarks.relay.report import Report, Run
from tests.benchmarks.relay.wire import EVENT_SECONDS

__all__ = ["FULL", "QUICK", "Running", "Size", "measure", "run_loads", "running", "upstream"]


@dataclass(frozen=True)
class Size:
    """How much is measured. Times are in seconds."""

    rounds: int
    seconds: float
    """Of each load, beside `warmup`."""
    warmup: float
    slow_rounds: int
    """In so many of the rounds there are slow streams too."""
    slow_streams: int
    slow_seconds: float
    connections: Sequence[int] = (1, 32, 256)
    burst_streams: int = 64
    tries: int = 1
    """How often a load is tried at most, if others are using the machine."""

    @property
    def slow_events(self) -> int:
        """What a slow stream consists of."""
        return round(self.slow_seconds / EVENT_SECONDS)


FULL = Size(rounds=5, seconds=2.0, warmup=0.5, slow_rounds=2, slow_streams=1000, slow_seconds=20.0, tries=2)
QUICK = Size(rounds=2, seconds=1.0, warmup=0.3, slow_rounds=1, slow_streams=1000, slow_seconds=3.0)


@dataclass(frozen=True)
class Running:
    """A candidate that answers; `pid` is `None` if it is the upstream itself."""

    port: int
    pid: int | None


@contextmanager
def upstream(size: Size, folder: Path) -> Iterator[Running]:
    """Run the upstream on its core."""
    port, log = free_port(), folder / "upstream.log"
    command = [sys.executable, "-m", "tests.benchmarks.relay.upstream", str(port), "--slow-events", str(size.slow_events)]
    with started(command, cores()[0], log) as pid:
        wait_ready(port, pid, log)
        yield Running(port, pid)


@contextmanager
def running(candidate: Candidate, server: Running, folder: Path) -> Iterator[Running]:
    """Run a candidate on its core until the block ends. Raises `Unavailable`, and `RuntimeError` if it does not answer."""
    if candidate.command is None:
        yield Running(server.port, None)
        return
    with tempfile.TemporaryDirectory(dir=folder) as own:
        place = Place(free_port(), server.port, Path(own))
        log = place.folder / "log"
        with started(candidate.command(place), cores()[1], log) as pid:
            wait_ready(place.port, pid, log)
            yield Running(place.port, pid)


def run_loads(target: Running, server: Running, jobs: Mapping[str, str], size: Size) -> dict[str, Result]:
    """Run loads on their core: names, and what they are (`plain:32`). `server` is the upstream."""
    assert server.pid is not None
    sizes = Sizes(size.seconds, size.warmup, size.slow_events, size.tries, server.pid, target.pid)
    arguments = [str(target.port), msgspec.json.encode(sizes).decode(), *jobs.values()]
    command = [sys.executable, "-m", "tests.benchmarks.relay.load", *arguments]
    done = subprocess.run(pinned(command, cores()[0]), stdout=subprocess.PIPE, check=True)
    return dict(zip(jobs, msgspec.json.decode(done.stdout, type=list[Result]), strict=True))


def measure(candidates: Sequence[Candidate], size: Size, tell: Callable[[str], None]) -> Report:
    """Measure all of `candidates` and tell how it goes."""
    many_files()
    begun = time.monotonic()
    report = Report(machine=_machine(), versions=_versions())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with upstream(size, folder) as server:
            for number in range(size.rounds):
                for candidate in candidates:
                    if candidate.name in report.left_out:
                        continue
                    try:
                        with running(candidate, server, folder) as target:
                            run = _one(candidate, target, server, size, slow=number < size.slow_rounds)
                    except (Unavailable, RuntimeError) as error:
                        report.left_out[candidate.name] = str(error)
                        tell(f"{candidate.name} is left out: {error}")
                        continue
                    report.runs.append(run)
                    tell(f"round {number + 1} of {size.rounds}, {candidate.name}: {_summary(run)}")
    report.seconds = time.monotonic() - begun
    return report


def _one(candidate: Candidate, target: Running, server: Running, size: Size, *, slow: bool) -> Run:
    loads = run_loads(target, server, {f"plain {count}": f"plain:{count}" for count in size.connections}, size)
    resident = memory(target.pid)[0] if target.pid is not None else 0.0
    streams = {"stream 1": "burst:1", "burst": f"burst:{size.burst_streams}"}
    loads |= run_loads(target, server, streams | ({"slow": f"slow:{size.slow_streams}"} if slow else {}), size)
    peak = memory(target.pid)[1] if target.pid is not None else 0.0
    return Run(candidate.name, loads, resident, peak)


def _summary(run: Run) -> str:
    rates = [f"{result.answers / result.seconds:,.0f}" for name, result in run.loads.items() if name.startswith("plain")]
    errors = sum(sum(result.errors.values()) for result in run.loads.values())
    burst = run.loads["burst"]
    others = max(result.disturbance for result in run.loads.values())
    disturbed = f"; others took up to {others:.0%} of a core" if others > 0.1 else ""
    return f"{' / '.join(rates)} requests/s, {burst.events / burst.seconds:,.0f} events/s, {errors} errors{disturbed}"


def _machine() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    one, other = cores()
    where = f"cores {one} and {other}" if one != other else "one core for all"
    return f"{names[0] if names else platform.machine()} ({where}), Python {platform.python_version()}"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("uvicorn", "uvloop", "httptools", "httpx", "starlette")}
