"""The report as tables: in Markdown for the page, which reads well enough on a terminal too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.benchmarks.pages import table
from tests.benchmarks.relay.candidates import CANDIDATES
from tests.benchmarks.relay.report import BASE, METRICS, Report, verdicts

__all__ = ["BLOCKS"]

_COUNTS = (1, 32, 256)


def _conditions(report: Report) -> str:
    rounds = max((len(report.of(name, "burst")) for name in report.candidates), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    left_out = "".join(f" Left out: {name} ({why})." for name, why in report.left_out.items())
    others, most = report.others
    how_long = f"{rounds} round{'s' if rounds > 1 else ''} and {report.seconds / 60:.0f} minutes"
    return (
        f"Measured on {report.machine}, in {how_long}, with {versions}. What had no part in it took {others:.2f} of the cores "
        f"meanwhile (median of all loads; at most {most:.2f}).{left_out}"
    )


def _verdicts(report: Report) -> str:
    words = {True: "reached", False: "**missed**", None: ""}
    return table(["asked", "found", ""], [[each.asked, each.found, words[each.reached]] for each in verdicts(report)], 3)


def _ratios(report: Report) -> str:
    head = ["by vllm-router's", *(metric.title + (", less is better" if metric.less_is_better else "") for metric in METRICS)]
    rows = []
    for name in report.candidates:
        row = [name]
        for metric in METRICS:
            ratio = metric.ratio(report, name)
            form = ".2f" if ratio is None or ratio >= 0.1 else ".3f"
            row.append(
                _figure(ratio, 1, form) + (" (errors)" if ratio is not None and report.errors(name, metric.load) else "")
            )
        rows.append(row)
    return table(head, rows, 1)


def _measured(report: Report) -> str:
    head = ["", "requests/s at 1", "32", "256", "p50 / p99 at 1, µs", "at 32, ms", "at 256, ms", "added p50, µs"]
    head += ["CPU a request, µs", "MB"]
    rows = []
    for name in report.candidates:
        row = [
            name,
            *(_count(report, name, f"plain {count}") for count in _COUNTS),
            _times(report, name, "plain 1", 1e6, ".0f"),
        ]
        row += [_times(report, name, f"plain {count}", 1e3, ".2f") for count in _COUNTS[1:]]
        cpu = None if name == BASE else report.cpu(name, "plain 32")
        row += [_figure(report.added(name) or None, 1e6), _figure(cpu, 1e6), _figure(report.resident(name), 1)]
        rows.append(row)
    return table(head, rows, 1)


def _streams(report: Report) -> str:
    head = ["", "events/s in bursts", "first event, p50 / p99, µs", "slow streams: errors", "events lost", "first event, ms"]
    head += ["CPU, share of a core", "peak MB"]
    rows = []
    for name in report.candidates:
        slow = report.of(name, "slow")
        row = [name, _count(report, name, "burst", events=True), _times(report, name, "stream 1", 1e6, ".0f", "first_")]
        row += [f"{report.errors(name, 'slow'):,}", f"{sum(result.lost for result in slow):,}"] if slow else ["", ""]
        share = None if name == BASE else report.share(name, "slow")
        row += [_times(report, name, "slow", 1e3, ".1f", "first_"), _figure(share, 1, ".2f"), _figure(report.peak(name), 1)]
        rows.append(row)
    return table(head, rows, 1)


def _candidates(report: Report) -> str:
    return table(["", "what it is"], [[name, CANDIDATES[name].what] for name in report.candidates], 2)


def _count(report: Report, name: str, load: str, *, events: bool = False) -> str:
    value = report.events(name, load) if events else report.rate(name, load)
    errors = report.errors(name, load)
    return _figure(value, 1) + (f" ({errors:,} errors)" if errors else "")


def _times(report: Report, name: str, load: str, factor: float, form: str, prefix: str = "") -> str:
    values = [report.time(name, load, f"{prefix}{quantile}") for quantile in ("p50", "p99")]
    return "" if None in values else " / ".join(_figure(value, factor, form) for value in values)


def _figure(value: float | None, factor: float, form: str = ",.0f") -> str:
    return "" if value is None else format(value * factor, form)


BLOCKS: Mapping[str, Callable[[Report], str]] = {
    "conditions": _conditions,
    "verdicts": _verdicts,
    "ratios": _ratios,
    "measured": _measured,
    "streams": _streams,
    "candidates": _candidates,
}
