"""The report as tables: in Markdown for the page, which reads well enough on a terminal too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tests.benchmarks import pages
from tests.benchmarks.pages import table
from tests.benchmarks.scheduling.loads import LOADS
from tests.benchmarks.scheduling.report import DEFAULT, Report, Row, verdicts

__all__ = ["BLOCKS", "PAGES", "fill"]


def _conditions(report: Report) -> str:
    seeds = len(report.rows[0].runs) if report.rows else 0
    late = max((run.late for row in report.rows for run in row.runs), default=0.0)
    return (
        f"Measured on {report.machine}, in {report.seconds / 60:.0f} minutes, with {seeds} seeds. All times were divided by "
        f"{report.factor:g}, those of the bursts (single, bursty, dominant, interleave) by {report.factor / 2:g}, and are "
        f"shown multiplied by it again. No request was sent more than {late:.2f} s (on this scale) after its time."
    )


def _loads(report: Report) -> str:
    return table(["load", "what it is"], [[load.name, load.what] for load in LOADS if load.name in report.loads], 2)


def _measured(report: Report) -> str:
    head = [
        "load",
        "policy",
        "mean wait",
        "spread",
        "predicted",
        "off by",
        "p99",
        "longest",
        "bound",
        "switches",
        "predicted",
        "not switching",
    ]
    return table(head, [_row(row) for row in report.rows], 2)


def _row(row: Row) -> list[str]:
    low, high = row.spread("mean_wait")
    return [
        row.load,
        row.policy,
        f"{row.median('mean_wait'):.2f} s",
        f"{low:.2f} to {high:.2f}",
        f"{row.median('predicted_mean_wait'):.2f} s",
        f"{row.deviation('mean_wait'):+.1%}",
        f"{row.median('p99_wait'):.1f} s",
        f"{row.longest:.1f} s",
        f"{row.bound:.0f} s",
        f"{row.median('switches'):.0f}",
        f"{row.median('predicted_switches'):.0f}",
        f"{row.median('not_switching'):.0%}",
    ]


def _verdicts(report: Report) -> str:
    rows = [[each.asked, each.found, "yes" if each.holds else "**no**"] for each in verdicts(report)]
    return table([f"what is asked of `{DEFAULT}`", "found", "holds"], rows, 3)


def _hours(report: Report) -> str:
    head = ["models", "1 of", "seed", "requests", *report.policies, "by the best", "clairvoyant", "by it", "not ahead", "by it"]
    rows = []
    for hour in report.hours:
        which = [str(each) for each in (hour.models, hour.every, hour.seed, hour.requests)]
        waits = [f"{hour.mean_waits[name]:.2f}" for name in report.policies]
        ratios = [f"{ratio:.1f}" for ratio in hour.by_bounds]
        floors = [f"{hour.clairvoyant:.2f}", ratios[0], f"{hour.non_anticipating:.2f}", ratios[1]]
        rows.append([*which, *waits, f"{hour.by_best:.2f}", *floors])
    return table(head, rows, 0)


def _defaults(report: Report) -> str:
    """The mean waits alone, for the page that tells which policy to choose."""
    head = ["mean wait in seconds", *(f"`{name}`" for name in report.policies)]
    rows = []
    for load in report.loads:
        found = [report.row(load, name) for name in report.policies]
        rows.append([load, *(f"{row.median('mean_wait'):.1f}" if row else "" for row in found)])
    return table(head, rows, 1)


BLOCKS: Mapping[str, Callable[[Report], str]] = {
    "conditions": _conditions,
    "loads": _loads,
    "measured": _measured,
    "verdicts": _verdicts,
    "hours": _hours,
    "mean waits": _defaults,
}
PAGES: Mapping[str, Sequence[str]] = {
    "scheduling.md": ("conditions", "loads", "measured", "verdicts", "hours"),
    "policies.md": ("mean waits",),
}
"""Which blocks stand on which page."""


def fill(page: str, blocks: Sequence[str], report: Report) -> str:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`, for each block of a page.

    Raises `ValueError` if the page lacks one.
    """
    return pages.fill(page, {name: BLOCKS[name](report) for name in blocks})
