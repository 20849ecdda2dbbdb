"""`python -m tests.benchmarks.relay`: measure, print the tables, and write the figures in `docs/` anew."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tests.benchmarks.pages import fill
from tests.benchmarks.relay.candidates import CANDIDATES
from tests.benchmarks.relay.measure import FULL, QUICK, measure
from tests.benchmarks.relay.picture import draw
from tests.benchmarks.relay.report import BASE, Report, read, write
from tests.benchmarks.relay.tables import BLOCKS

DOCS = Path(__file__).resolve().parents[3] / "docs"
JSON, SVG, PAGE = Path("benchmarks/relay.json"), Path("benchmarks/relay.svg"), Path("relay-benchmark.md")


def main(arguments: list[str] | None = None) -> int:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay", description="What the relay costs.")
    parser.add_argument("--quick", action="store_true", help="a minute or two, for tuning; nothing is written")
    parser.add_argument("--rounds", type=int, help="how often each candidate is measured")
    parser.add_argument("--candidates", help=f"besides direct: some of {', '.join(CANDIDATES)}; nothing is written")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the file of the last run")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder whose page and files are written")
    given = parser.parse_args(arguments)
    names = [BASE, *given.candidates.split(",")] if given.candidates else list(CANDIDATES)
    if wrong := set(names) - set(CANDIDATES):
        parser.error(f"no such candidate: {', '.join(sorted(wrong))}; there are {', '.join(CANDIDATES)}")
    if given.page:
        write_page(given.docs)
        return 0
    size = QUICK if given.quick else FULL
    if given.rounds is not None:
        size = dataclasses.replace(size, rounds=given.rounds)
    report = measure([CANDIDATES[name] for name in CANDIDATES if name in names], size, tell)
    if not (given.quick or given.candidates):
        (given.docs / JSON).parent.mkdir(parents=True, exist_ok=True)
        (given.docs / JSON).write_bytes(write(report))
        report = write_page(given.docs)
    print("\n\n".join(block(report) for block in BLOCKS.values()))
    return 0


def write_page(docs: Path) -> Report:
    """Page and picture show what the file says."""
    report = read((docs / JSON).read_bytes())
    (docs / SVG).write_text(draw(report))
    page = docs / PAGE
    page.write_text(fill(page.read_text(), {name: block(report) for name, block in BLOCKS.items()}))
    return report


def tell(what: str) -> None:
    """To standard error, so that standard output has the tables alone."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
