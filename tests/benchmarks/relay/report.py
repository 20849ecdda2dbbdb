"""What was measured, as it is written to JSON, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import msgspec

from tests.benchmarks.pages import encode
from tests.benchmarks.relay.load import Result

__all__ = ["BASE", "GATEWAY", "METRICS", "ROUTER", "TRACED", "Metric", "Report", "Run", "Verdict", "read", "verdicts", "write"]

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
        shares = [result.disturbance for run in self.runs for result in run.loads.values()]
        return statistics.median(shares), max(shares)

    def resident(self, candidate: str) -> float | None:
        """Memory after the plain loads, in MB."""
        found = [run.resident for run in self.runs if run.candidate == candidate]
        return statistics.median(found) if any(found) else None

    def peak(self, candidate: str) -> float | None:
        """The most memory in any round, in MB."""
        return max((run.peak for run in self.runs if run.candidate == candidate), default=0.0) or None


class Metric(msgspec.Struct, frozen=True):
    """Something by which candidates are compared with vllm-router."""

    title: str
    load: str
    value: Callable[[Report, str], float | None]
    """Of a candidate; `None` if it was not measured, or has none."""
    asked: Mapping[str, float] = {}
    """By candidate: the ratio to vllm-router that is asked of it."""
    less_is_better: bool = False

    def ratio(self, report: Report, candidate: str) -> float | None:
        """The candidate's value by vllm-router's."""
        mine, theirs = self.value(report, candidate), self.value(report, ROUTER)
        return mine / theirs if mine and theirs and mine > 0 and theirs > 0 else None


def _requests(connections: int, asked: Mapping[str, float]) -> Metric:
    load = f"plain {connections}"
    title = f"requests/s, {connections} connection{'s' if connections > 1 else ''}"
    return Metric(title, load, lambda report, name: report.rate(name, load), asked)


METRICS = (
    _requests(1, {}),
    _requests(32, {GATEWAY: 0.8, TRACED: 0.5}),
    _requests(256, {GATEWAY: 0.8, TRACED: 0.5}),
    Metric("events/s in bursts", "burst", lambda report, name: report.events(name, "burst"), {GATEWAY: 3.0}),
    Metric("added latency p50, 1 connection", "plain 1", Report.added, {GATEWAY: 1.3}, less_is_better=True),
    Metric("CPU a request", "plain 32", lambda report, name: report.cpu(name, "plain 32"), less_is_better=True),
    Metric("CPU a burst", "burst", lambda report, name: report.cpu(name, "burst"), less_is_better=True),
    Metric("CPU of slow streams", "slow", lambda report, name: report.share(name, "slow"), less_is_better=True),
    Metric("memory, peak", "slow", Report.peak, less_is_better=True),
)


class Verdict(msgspec.Struct, frozen=True):
    """One thing that is asked of the gateway; `reached` is `None` if it was not measured."""

    asked: str
    found: str
    reached: bool | None


def verdicts(report: Report) -> list[Verdict]:
    """Judge what there is, by what issue 5 asks for."""
    found: list[Verdict] = []
    for metric in METRICS:
        for candidate, limit in metric.asked.items():
            ratio = metric.ratio(report, candidate)
            asked = (
                f"{candidate}: {metric.title}: at {'most' if metric.less_is_better else 'least'} {limit:g} times vllm-router's"
            )
            if ratio is None:
                found.append(Verdict(asked, "not measured", None))
                continue
            reached = ratio <= limit if metric.less_is_better else ratio >= limit
            errors = report.errors(candidate, metric.load)
            text = f"{ratio:.2f} times" + (f", {errors:,} errors" if errors else "")
            found.append(Verdict(asked, text, reached and not errors))
    slow = report.of(GATEWAY, "slow")
    asked = f"{GATEWAY}: {slow[0].connections if slow else 1000:,} slow streams without an error"
    errors, lost = report.errors(GATEWAY, "slow"), sum(result.lost for result in slow)
    text = f"{errors:,} errors, {lost:,} events lost" if slow else "not measured"
    found.append(Verdict(asked, text, errors == lost == 0 if slow else None))
    peak = report.peak(GATEWAY)
    text = "not measured" if peak is None else f"peak {peak:.0f} MB"
    found.append(Verdict(f"{GATEWAY}: at most {MEMORY_MB:.0f} MB of memory", text, None if peak is None else peak <= MEMORY_MB))
    return found


def read(data: bytes) -> Report:
    """Take in what `write` has written. Raises `msgspec.ValidationError` if it is something else."""
    return msgspec.json.decode(data, type=Report)


def write(report: Report) -> bytes:
    """As JSON, readable. Times are kept to a microsecond."""
    return encode(report, 6)


def _median(results: Sequence[Result], value: Callable[[Result], float]) -> float | None:
    return statistics.median(map(value, results)) if results else None
