"""`python -m tests.soak`: run a soak, print what happened, exit with 1 if something must not have."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from tests.soak.run import Report, Size, soak

_SHOWN = 30


def main() -> int:
    """Run with the arguments of the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Requests, switches and faults in thousands.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--switches", type=int, default=2_000)
    parser.add_argument("--faults", type=int, help="default: one for each 100 requests")
    parser.add_argument("--concurrency", type=int, default=24, help="requests under way at once")
    parser.add_argument("--minutes", type=float, default=9.5, help="longest time for the load")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of requests and faults; default: the time")
    parser.add_argument("--loop", choices=["asyncio", "trio"], default="asyncio", help="of the gateway")
    drains = ["wait", "preempt"]
    parser.add_argument("--drain", choices=drains, help="what a switch does with running requests; default: by the seed")
    parser.add_argument("--log", type=Path, help="where to write the gateway's log")
    given = parser.parse_args()
    faults = given.requests // 100 if given.faults is None else given.faults
    drain = given.drain or drains[given.seed % 2]
    size = Size(given.requests, given.switches, faults, given.concurrency, given.minutes, drain == "preempt")
    numbers = f"{size.requests} requests, {size.switches} switches, {faults} faults"
    print(f"{numbers} on {given.loop}, drain {drain}, seed {given.seed}", flush=True)
    report = asyncio.run(soak(size, given.loop, given.seed))
    if given.log:
        given.log.write_text(report.log)
    print(describe(report))
    return 1 if report.violations else 0


def describe(report: Report) -> str:
    """The summary."""
    requests = sum(report.outcomes.values())
    found = report.statistics
    lines = [
        f"{requests} requests in {report.seconds:.0f} s, {requests / max(1e-9, report.seconds):.0f} a second",
        "half of them took at most {:.3f} s, 99 % {:.2f} s, the longest {:.2f} s".format(*_quantiles(report.latencies)),
        *_table(report.outcomes),
        f"{report.paused} streams paused while they were frozen",
        f"{found.get('switches')} switches, {found.get('failures')} failed, {found.get('abandoned')} given up",
        f"{sum(report.faults.values())} faults; the server by URL was restarted {report.restarts} times",
        *_table(report.faults),
        "memory of the gateway by quarter: " + ", ".join(f"{mean:.1f}" for mean in report.memory) + " MiB",
    ]
    if report.before and report.after:
        lines.append(
            f"at rest, before and after: {report.before.descriptors} and {report.after.descriptors} file descriptors, "
            f"{report.before.threads} and {report.after.threads} threads"
        )
    lines.append(f"{len(report.violations)} violations" if report.violations else "no violation")
    lines += [f"  {violation}" for violation in report.violations[:_SHOWN]]
    if len(report.violations) > _SHOWN:
        lines.append(f"  … and {len(report.violations) - _SHOWN} more")
    return "\n".join(lines)


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values) or [0.0]
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100], ordered[-1]


def _table(counts: dict[str, int]) -> list[str]:
    return [f"{count:8}  {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1])]


if __name__ == "__main__":
    raise SystemExit(main())
