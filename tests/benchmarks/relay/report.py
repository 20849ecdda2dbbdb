"""What was measured, as it is written to JSON, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import msgspec

from tests.benchmarks.relay.load import Result

__all__ = ["BASE", "GATEWAY", "ROUTER", "TRACED", "Report", "Run", "Verdict", "read", "verdicts", "write"]

BASE, ROUTER, GATEWAY, TRACED = "direct", "vllm-router", "gateway", "gateway-sdk"
MEMORY_MB = 70.0


class Run(msgspec.Struct, frozen=True):
    """One candidate in one round."""

    candidate: str
    loads: dict[str, Result]
    """By name: `plain 32` is plain requests over 32 connections; `stream 1` bursts over one, `burst` over many, `slow`."""
    resident: float
    """Memory after the plain loads, in MB (10^6 bytes)."""
    peak: float


class Report(msgspec.Struct):
    """All of it."""

    machine: str = ""
    versions: dict[str, str] = {}
    seconds: float = 0.0
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    """Candidates that could not be had, and why."""

    @property
    def candidates(self) -> list[str]:
        """Those that were measured, in order."""
        return list(dict.fromkeys(run.candidate for run in self.runs))

    def of(self, candidate: str, load: str) -> list[Result]:
        """All that a load found, a round each."""
        return [run.loads[load] for run in self.runs if run.candidate == candidate and load in run.loads]

    def errors(self, candidate: str, load: str) -> int:
        """Wrong, missing and broken answers in all rounds."""
        return sum(sum(result.errors.values()) for result in self.of(candidate, load))

    def rate(self, candidate: str, load: str) -> float | None:
        """Right answers a second."""
        return _median(self.of(candidate, load), lambda result: result.answers / result.seconds)

    def events(self, candidate: str, load: str) -> float | None:
        """Events a second."""
        return _median(self.of(candidate, load), lambda result: result.events / result.seconds)

    def cpu(self, candidate: str, load: str) -> float | None:
        """The candidate's seconds of CPU an answer."""
        return _median(self.of(candidate, load), lambda result: result.cpu / max(1, result.answers))

    def share(self, candidate: str, load: str) -> float | None:
        """The share of a core that the candidate took."""
        return _median(self.of(candidate, load), lambda result: result.cpu / result.seconds)

    def time(self, candidate: str, load: str, field: str) -> float | None:
        """Of a field of `Result`, in seconds."""
        return _median(self.of(candidate, load), lambda result: float(getattr(result, field)))

    def added(self, candidate: str) -> float | None:
        """What a request takes longer than directly, over one connection: the median, in seconds."""
        mine, base = self.time(candidate, "plain 1", "p50"), self.time(BASE, "plain 1", "p50")
        return mine - base if mine is not None and base is not None else None

    @property
    def others(self) -> tuple[float, float]:
        """What processes that have no part in this took meanwhile, in cores: the median of all loads, and the most."""
        shares = [result.others / result.seconds for run in self.runs for result in run.loads.values()]
        return statistics.median(shares), max(shares)

    def memory(self, candidate: str) -> tuple[float, float]:
        """In MB: after the plain loads (median), and the highest of all rounds."""
        runs = [run for run in self.runs if run.candidate == candidate]
        return statistics.median(run.resident for run in runs), max(run.peak for run in runs)


class Verdict(msgspec.Struct, frozen=True):
    """One thing that is asked of the gateway; `reached` is `None` if it was not measured."""

    asked: str
    found: str
    reached: bool | None


def verdicts(report: Report) -> list[Verdict]:
    """Judge what there is, by the acceptance of the issue."""
    found: list[Verdict] = []

    def by_router(what: str, value: Callable[[str], float | None], limit: float, candidate: str = GATEWAY) -> None:
        mine, theirs = value(candidate), value(ROUTER)
        most = what.startswith("added")
        asked = f"{candidate}: {what} at {'most' if most else 'least'} {limit:g} times vllm-router's"
        if mine is None or theirs is None or theirs <= 0:
            found.append(Verdict(asked, "not measured", None))
        else:
            ratio = mine / theirs
            found.append(Verdict(asked, f"{ratio:.2f} times", ratio <= limit if most else ratio >= limit))

    for count in (32, 256):
        by_router(f"requests/s over {count} connections", lambda name, n=count: report.rate(name, f"plain {n}"), 0.8)  # type: ignore[misc]
    by_router("added latency p50 over 1 connection", report.added, 1.3)
    by_router("events/s in bursts", lambda name: report.events(name, "burst"), 3.0)
    for count in (32, 256):
        by_router(f"requests/s over {count} connections", lambda name, n=count: report.rate(name, f"plain {n}"), 0.5, TRACED)  # type: ignore[misc]
    slow = report.of(GATEWAY, "slow")
    asked = f"{GATEWAY}: {slow[0].connections if slow else 1000:,} slow streams without an error"
    errors, lost = report.errors(GATEWAY, "slow"), sum(result.lost for result in slow)
    text = f"{errors} errors, {lost} events lost" if slow else "not measured"
    found.append(Verdict(asked, text, errors == lost == 0 if slow else None))
    if GATEWAY in report.candidates:
        peak = report.memory(GATEWAY)[1]
        found.append(Verdict(f"{GATEWAY}: at most {MEMORY_MB:.0f} MB of memory", f"peak {peak:.0f} MB", peak <= MEMORY_MB))
    return found


def read(data: bytes) -> Report:
    """Take in what `write` has written. Raises `msgspec.ValidationError` if it is something else."""
    return msgspec.json.decode(data, type=Report)


def write(report: Report) -> bytes:
    """As JSON, readable. Times are kept to a microsecond."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return round(value, 6)
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return [rounded(each) for each in value] if isinstance(value, list) else value

    return msgspec.json.format(msgspec.json.encode(rounded(msgspec.to_builtins(report)))) + b"\n"


def _median(results: Sequence[Result], value: Callable[[Result], float]) -> float | None:
    return statistics.median(map(value, results)) if results else None
