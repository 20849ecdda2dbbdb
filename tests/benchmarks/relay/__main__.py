"""`python -m tests.benchmarks.relay`: measure, print the tables, and write the figures in `docs/` anew."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tests.benchmarks.relay.candidates import CANDIDATES
from tests.benchmarks.relay.measure import FULL, QUICK, measure
from tests.benchmarks.relay.report import read, write
from tests.benchmarks.relay.tables import BLOCKS

DOCS = Path(__file__).resolve().parents[3] / "docs"
JSON = Path("benchmarks/relay.json")


def main(arguments: list[str] | None = None) -> int:
    """Run with the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay", description="What the relay costs.")
    parser.add_argument("--quick", action="store_true", help="about a minute, for tuning; nothing is written")
    parser.add_argument("--rounds", type=int, help="how often each candidate is measured")
    parser.add_argument("--candidates", help=f"separated by commas: {', '.join(CANDIDATES)}")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder whose page and files are written")
    given = parser.parse_args(arguments)
    names = given.candidates.split(",") if given.candidates else list(CANDIDATES)
    if wrong := set(names) - set(CANDIDATES):
        parser.error(f"no such candidate: {', '.join(sorted(wrong))}; there are {', '.join(CANDIDATES)}")
    size = QUICK if given.quick else FULL
    if given.rounds is not None:
        size = dataclasses.replace(size, rounds=given.rounds)
    report = measure([CANDIDATES[name] for name in CANDIDATES if name in names], size, tell)
    whole = not given.quick and not given.candidates
    if whole:
        (given.docs / JSON).parent.mkdir(parents=True, exist_ok=True)
        (given.docs / JSON).write_bytes(write(report))
        report = read((given.docs / JSON).read_bytes())  # the page shows what the file says
    print("\n\n".join(table(report) for table in BLOCKS.values()))
    return 0


def tell(what: str) -> None:
    """To standard error, so that standard output has the tables alone."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
