"""What was measured and predicted, as it is written to JSON, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

from tests.benchmarks.pages import encode

__all__ = ["DEFAULT", "Hour", "Report", "Row", "Seeded", "Verdict", "read", "verdicts", "write"]

DEFAULT = "gated_quantum"
"""The policy that is judged."""
AGREEMENT = 0.15
"""How far measurement and prediction may be apart, as a share of the prediction."""
BEST = 1.3
"""The default's mean wait by that of the best policy, at most, over an hour of the trace."""
ELSEWHERE = 1.1
"""The default's mean wait by FIFO's, at most, where it need not be shorter."""


class Seeded(msgspec.Struct, frozen=True):
    """One run: what the gateway did, and what the simulator says of the same load. Times are in seconds."""

    seed: int
    requests: int
    mean_wait: float
    p99_wait: float
    longest_wait: float
    switches: int
    not_switching: float
    """The share of the time, from the first request to the last answer, in which no model was put to sleep or woken."""
    seconds: float
    late: float
    """The most that a request was sent after its time."""
    predicted_mean_wait: float
    predicted_longest_wait: float
    predicted_switches: int


class Row(msgspec.Struct, frozen=True):
    """One load by one policy, with all its seeds."""

    load: str
    policy: str
    beats: bool
    bounded_only: bool
    bound: float
    """No request waits longer, says the policy's docstring."""
    lone_bound: float | None
    """Where one request meets endless traffic: a turn, a switch and a drain."""
    runs: Sequence[Seeded]

    def median(self, field: str) -> float:
        """Of a field of `Seeded`, over the seeds."""
        return float(statistics.median(getattr(run, field) for run in self.runs))

    def spread(self, field: str) -> tuple[float, float]:
        """The smallest and the largest value of a field of `Seeded`."""
        values = [float(getattr(run, field)) for run in self.runs]
        return min(values), max(values)

    def deviation(self, field: str) -> float:
        """Measured median by predicted median of `mean_wait`, `longest_wait` or `switches`, less 1."""
        return self.median(field) / self.median(f"predicted_{field}") - 1.0

    @property
    def longest(self) -> float:
        """The longest wait of all runs."""
        return max(run.longest_wait for run in self.runs)


class Hour(msgspec.Struct, frozen=True):
    """An hour of the trace, simulated by every policy. Times are in seconds."""

    models: int
    every: int
    """One of so many requests of the trace was taken."""
    seed: int
    requests: int
    mean_waits: dict[str, float]
    longest_waits: dict[str, float]
    bounds: dict[str, float]
    clairvoyant: float
    """No schedule has a shorter mean wait, not even one that knows the future and switches ahead."""
    non_anticipating: float
    """Nor one that knows the future and, as the gateway, wakes no model before somebody waits for it."""

    @property
    def by_best(self) -> float:
        """The default's mean wait by the best policy's."""
        return self.mean_waits[DEFAULT] / min(self.mean_waits.values())

    @property
    def by_bounds(self) -> tuple[float, float]:
        """The default's mean wait by each of the two lower bounds."""
        mean = self.mean_waits[DEFAULT]
        return mean / self.clairvoyant, mean / self.non_anticipating


class Report(msgspec.Struct):
    """All of it."""

    factor: float = 0.0
    """What all times were divided by for the measurement; half of it for bursts."""
    machine: str = ""
    seconds: float = 0.0
    """How long the measurement took, in real seconds."""
    rows: list[Row] = []
    hours: list[Hour] = []

    def row(self, load: str, policy: str) -> Row | None:
        """The row of a load by a policy."""
        return next((row for row in self.rows if (row.load, row.policy) == (load, policy)), None)

    @property
    def loads(self) -> list[str]:
        """The loads, in order."""
        return list(dict.fromkeys(row.load for row in self.rows))

    @property
    def policies(self) -> list[str]:
        """The policies, in order."""
        names = [row.policy for row in self.rows] + [name for hour in self.hours for name in hour.mean_waits]
        return list(dict.fromkeys(names))


class Verdict(msgspec.Struct, frozen=True):
    """One thing that is asked of the default policy or of the simulator, and whether it is so."""

    asked: str
    found: str
    holds: bool


def verdicts(report: Report) -> list[Verdict]:
    """Judge what there is."""
    found: list[Verdict] = []
    pairs = [(row, fifo) for row in report.rows if row.policy == DEFAULT and (fifo := report.row(row.load, "fifo"))]
    ratios = {row.load: row.median("mean_wait") / fifo.median("mean_wait") for row, fifo in pairs}
    must_beat = [row.load for row, _ in pairs if row.beats]
    others = [row.load for row, _ in pairs if not row.beats and not row.bounded_only]
    for asked, loads, limit in (
        ("shorter mean wait than FIFO", must_beat, 1.0),
        ("mean wait at most 10 % above FIFO's", others, ELSEWHERE),
    ):
        if loads:
            text = ", ".join(f"{load} {ratios[load]:.2f}" for load in loads)
            found.append(Verdict(asked, f"by FIFO's: {text}", all(ratios[load] < limit for load in loads)))
    if report.rows:
        over = [f"{row.load} by {row.policy}" for row in report.rows if row.longest > row.bound]
        nearest = max(report.rows, key=lambda row: row.longest / row.bound)
        near = f"nearest to it is {nearest.load} by {nearest.policy}: {nearest.longest:.1f} of {nearest.bound:.1f} s"
        text = f"exceeded: {', '.join(over) or 'none'}; {near}"
        found.append(Verdict("no wait longer than its policy's bound", text, not over))
        far = [
            f"{row.load} by {row.policy} ({field.replace('_', ' ')} {row.deviation(field):+.0%})"
            for row in report.rows
            for field in ("mean_wait", "switches")
            if abs(row.deviation(field)) > AGREEMENT
        ]
        worst = max(abs(row.deviation(field)) for row in report.rows for field in ("mean_wait", "switches"))
        text = f"the farthest apart: {worst:.1%}" if not far else ", ".join(far)
        found.append(Verdict("measured and predicted mean wait and switches within 15 %", text, not far))
    for row, _ in pairs:
        if row.lone_bound is not None:
            text = f"{row.longest:.1f} of {row.lone_bound:.1f} s"
            what = "a switch" if "preempted" in row.load else "a switch and the drain"
            found.append(Verdict(f"{row.load}: served within κ·C, {what}", text, row.longest <= row.lone_bound))
    if report.hours:
        most = max(report.hours, key=lambda hour: hour.by_best)
        text = f"at most {most.by_best:.2f} ({most.models} models, 1 of {most.every}, seed {most.seed})"
        found.append(Verdict("trace set: mean wait at most 1.3 times the best policy's", text, most.by_best <= BEST))
        over = [name for hour in report.hours for name, longest in hour.longest_waits.items() if longest > hour.bounds[name]]
        found.append(Verdict("trace set: no wait longer than its policy's bound", f"exceeded: {len(over)}", not over))
    return found


def read(data: bytes) -> Report:
    """Take in what `write` has written. Raises `msgspec.ValidationError` if it is something else."""
    return msgspec.json.decode(data, type=Report)


def write(report: Report) -> bytes:
    """As JSON, readable. Figures are kept to a thousandth."""
    return encode(report, 3)
