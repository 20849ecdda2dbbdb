"""The report as tables."""

from __future__ import annotations

from collections.abc import Sequence

from tests.benchmarks.relay.candidates import CANDIDATES
from tests.benchmarks.relay.report import ROUTER, Report, verdicts

__all__ = ["BLOCKS"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        return " | ".join(cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in places)

    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join(f"| {line(cells)} |" for cells in (head, rule, *rows))


def _verdicts(report: Report) -> str:
    words = {True: "reached", False: "**missed**", None: "not measured"}
    rows = [[each.asked, each.found, words[each.reached]] for each in verdicts(report)]
    return _table(["asked", "found", ""], rows, 3)


def _ratios(report: Report) -> str:
    head = ["by vllm-router's", "requests/s at 1", "32", "256", "added p50", "CPU a request", "events/s", "memory"]
    rows = []
    for name in report.candidates:
        pairs = [(report.rate(name, f"plain {count}"), report.rate(ROUTER, f"plain {count}")) for count in (1, 32, 256)]
        if name != "direct":
            pairs += [
                (report.added(name), report.added(ROUTER)),
                (report.cpu(name, "plain 32"), report.cpu(ROUTER, "plain 32")),
            ]
        else:
            pairs += [(None, None), (None, None)]
        pairs.append((report.events(name, "burst"), report.events(ROUTER, "burst")))
        known = name != "direct" and ROUTER in report.candidates
        pairs.append((report.memory(name)[1], report.memory(ROUTER)[1]) if known else (None, None))
        rows.append([name, *(f"{mine / theirs:.2f}" if mine is not None and theirs else "" for mine, theirs in pairs)])
    return _table(head, rows)


def _measured(report: Report) -> str:
    head = ["", "requests/s at 1", "32", "256", "p50 / p99 at 1, µs", "at 32, ms", "at 256, ms", "added p50, µs"]
    head += ["CPU a request, µs", "MB"]
    rows = []
    for name in report.candidates:
        loads = [f"plain {count}" for count in (1, 32, 256)]
        row = [name, *(_count(report, name, load) for load in loads), _times(report, name, loads[0], 1e6, ".0f")]
        row += [_times(report, name, load, 1e3, ".2f") for load in loads[1:]]
        if name == "direct":
            row += ["", "", ""]
        else:
            row += [
                _figure(report.added(name), 1e6),
                _figure(report.cpu(name, "plain 32"), 1e6),
                f"{report.memory(name)[0]:.0f}",
            ]
        rows.append(row)
    return _table(head, rows)


def _streams(report: Report) -> str:
    head = ["", "events/s in bursts", "first event, p50 / p99, µs", "slow streams: errors", "events lost", "first event, ms"]
    head += ["CPU, share of a core", "peak MB"]
    rows = []
    for name in report.candidates:
        slow = report.of(name, "slow")
        first = _times(report, name, "stream 1", 1e6, ".0f", "first_")
        row = [name, _count(report, name, "burst", events=True), first]
        row += [str(report.errors(name, "slow")), str(sum(result.lost for result in slow))] if slow else ["", ""]
        row.append(_times(report, name, "slow", 1e3, ".1f", "first_"))
        row += (
            ["", ""] if name == "direct" else [_figure(report.share(name, "slow"), 1, ".2f"), f"{report.memory(name)[1]:.0f}"]
        )
        rows.append(row)
    return _table(head, rows)


def _conditions(report: Report) -> str:
    rounds = max((len(report.of(name, "burst")) for name in report.candidates), default=0)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    left_out = "".join(f" Left out: {name}, because {why}." for name, why in report.left_out.items())
    others, most = report.others
    return (
        f"Measured on {report.machine}, in {rounds} rounds and {report.seconds / 60:.0f} minutes, with {versions}. What had no "
        f"part in it took {others:.2f} of the cores meanwhile (median of all loads; at most {most:.2f}).{left_out}"
    )


def _candidates(report: Report) -> str:
    return _table(["", "what it is"], [[name, CANDIDATES[name].what] for name in report.candidates], 2)


def _count(report: Report, name: str, load: str, *, events: bool = False) -> str:
    value = report.events(name, load) if events else report.rate(name, load)
    errors = report.errors(name, load)
    return _figure(value, 1, ",.0f") + (f" ({errors:,} errors)" if errors else "")


def _times(report: Report, name: str, load: str, factor: float, form: str, prefix: str = "") -> str:
    values = [report.time(name, load, f"{prefix}{quantile}") for quantile in ("p50", "p99")]
    return " / ".join(_figure(value, factor, form) for value in values) if None not in values else ""


def _figure(value: float | None, factor: float, form: str = ",.0f") -> str:
    return "" if value is None else format(value * factor, form)


BLOCKS = {
    "conditions": _conditions,
    "verdicts": _verdicts,
    "ratios": _ratios,
    "measured": _measured,
    "streams": _streams,
    "candidates": _candidates,
}
