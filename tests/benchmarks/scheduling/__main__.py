"""`python -m tests.benchmarks.scheduling`: measure, simulate, and write the figures in `docs/` anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

from llmux_asgi.config import PolicyName
from tests.benchmarks.scheduling.hours import simulate_hours
from tests.benchmarks.scheduling.loads import LOADS
from tests.benchmarks.scheduling.picture import draw
from tests.benchmarks.scheduling.report import Report, read, verdicts, write
from tests.benchmarks.scheduling.run import POLICIES, measure
from tests.benchmarks.scheduling.tables import BLOCKS, PAGES, fill

DOCS = Path(__file__).resolve().parents[3] / "docs"
JSON, SVG = Path("benchmarks/scheduling.json"), Path("benchmarks/scheduling.svg")
PARTS = ("measure", "trace", "page")


def main(arguments: list[str] | None = None) -> int:
    """Run with the arguments of the command line; return 1 if something that is asked does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scheduling", description="Measure and simulate.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="measure, trace (simulated hours), page; default: all three")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--factor", type=float, default=10.0, help="what all times are divided by; half of it for bursts")
    parser.add_argument(
        "--loads",
        nargs="+",
        choices=[load.name for load in LOADS],
        default=[load.name for load in LOADS],
        help="measure these alone, and keep the other rows",
    )
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder whose page and files are written")
    given = parser.parse_args(arguments)
    if wrong := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(wrong))}; there are {', '.join(PARTS)}")
    parts, policies = given.parts or PARTS, cast("list[PolicyName]", list(given.policies))

    report = read((given.docs / JSON).read_bytes()) if (given.docs / JSON).exists() else Report()
    if "measure" in parts:
        measured = measure([load for load in LOADS if load.name in given.loads], policies, given.seeds, given.factor, tell)
        report = replaced(report, measured)
    if "trace" in parts:
        report.hours = simulate_hours(policies, given.seeds, tell)
    (given.docs / JSON).parent.mkdir(parents=True, exist_ok=True)
    (given.docs / JSON).write_bytes(write(report))
    report = read((given.docs / JSON).read_bytes())  # the page shows what the file says
    print("\n\n".join(table(report) for table in BLOCKS.values()))
    if "page" in parts:
        (given.docs / SVG).write_text(draw(report))
        for name, blocks in PAGES.items():
            page = given.docs / name
            page.write_text(fill(page.read_text(), blocks, report))
    return 0 if all(each.holds for each in verdicts(report)) else 1


def replaced(report: Report, measured: Report) -> Report:
    """`measured`, with the loads of `report` that were not measured again, and its hours."""
    rows = {(row.load, row.policy): row for row in (*report.rows, *measured.rows)}
    order = {load.name: place for place, load in enumerate(LOADS)}
    seconds = measured.seconds + (report.seconds if len(rows) > len(measured.rows) else 0.0)
    kept = sorted(rows.values(), key=lambda row: order[row.load])
    return Report(measured.factor, measured.machine, seconds, kept, report.hours)


def tell(what: str) -> None:
    """To standard error, so that standard output has the tables alone."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
