"""The command `llmux-asgi simulate`: reads the load and the configuration, prints the table. Needs rich (extra `cli`)."""

from __future__ import annotations

import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..config import load_config
from .comparison import Comparison, compare
from .errors import SimulationError
from .plot import render
from .traces import TraceOptions, read_workload

__all__ = ["run"]


def run(
    trace: Path,
    config_path: Path,
    options: TraceOptions,
    *,
    active: str | None,
    sleep_seconds: float | None,
    wake_seconds: float | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Simulate and print. Raises `SimulationError` or `ConfigError`."""
    config = load_config(config_path)
    workload = read_workload(trace, tuple(config.models), aliases=config.aliases, options=options)
    comparison = compare(workload, config, active=active, sleep_seconds=sleep_seconds, wake_seconds=wake_seconds)
    if plot is not None:
        try:
            plot.write_text(render(comparison), encoding="utf-8")
        except OSError as exc:
            raise SimulationError(f"{plot}: {exc.strerror or exc}") from None
    if as_json:
        sys.stdout.buffer.write(comparison.to_json() + b"\n")
    else:
        _print(comparison, workload.size)


def _print(comparison: Comparison, size: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in ("mean wait", "p50", "p99", "longest", "switches", "serving", "lost", "cut", "÷ bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in comparison.runs:
        f = each.figures
        table.add_row(
            each.label,
            *(f"{wait:.2f} s" for wait in (f.mean_wait, f.p50_wait, f.p99_wait, f.longest_wait)),
            f"{f.switches:,}",
            f"{100 * f.serving_share:.1f} %",
            f"{f.lost:,}",
            f"{f.cut:,}",
            "-" if each.ratio is None else f"{each.ratio:.2f}",
            style="bold" if each.configured else None,
        )
    # In a pipe nothing must be cut off either.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    models = ", ".join(f"{name} {each.sleep:g} + {each.wake:g} s" for name, each in comparison.costs.items())
    console.print(f"{comparison.load}: {size:,} requests. Sleep + wake: {models}.")
    console.print(table)
    console.print("* the configured policy; the others have their defaults.")
    if comparison.bound is None:
        console.print("There is no lower bound: with closed loops the arrivals depend on the policy.")
    else:
        bound = comparison.bound
        console.print(
            f"No schedule has a mean wait below {bound.non_anticipating:.2f} s ({bound.clairvoyant:.2f} s if it may switch "
            "before anybody waits); of the drains it counts a part only."
        )
