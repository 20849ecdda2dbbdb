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
from .result import ClassFigures, Figures
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
    recompute: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Simulate and print. Raises `SimulationError` or `ConfigError`."""
    config = load_config(config_path)
    workload = read_workload(trace, tuple(config.models), aliases=config.aliases, priorities=config.priorities, options=options)
    with Console(stderr=True).status(f"playing {workload.size:,} requests against every policy"):
        comparison = compare(
            workload, config, active=active, sleep_seconds=sleep_seconds, wake_seconds=wake_seconds, recompute=recompute
        )
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
    # In a pipe nothing must be cut off either.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    narrow = console.width < 110
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if narrow else (0, 1))
    table.add_column("policy", overflow="fold", min_width=13)  # it may go over two lines, so that no figure is cut off
    figures = [run.figures for run in comparison.runs]
    refuses, freezes = any(f.refused for f in figures), any(f.freezes for f in figures)
    extra = [*(["refused"] if refuses else []), *(["freezes", "mean frozen", "longest frozen"] if freezes else [])]
    for name in ("mean wait", "p50", "p99", "longest", "switches", "serving", "lost", "cut", *extra, "÷ bound"):
        table.add_column(name.replace(" ", "\n") if narrow else name, justify="right", no_wrap=True)
    for run in comparison.runs:
        f = run.figures
        style = "bold" if run.configured else None
        table.add_row(
            run.label,
            *_waits(f),
            f"{f.switches:,}",
            f"{100 * f.serving_share:.1f} %",
            f"{f.lost:,}",
            f"{f.cut:,}",
            *([f"{f.refused:,}"] if refuses else []),
            *([f"{f.freezes:,}", f"{f.mean_frozen:.2f} s", f"{f.longest_frozen:.2f} s"] if freezes else []),
            "-" if run.ratio is None else f"{run.ratio:.2f}",
            style=style,
        )
        for each in f.classes:
            table.add_row(f"    {each.priority or '(no class)'}", *_waits(each), style=style)
    models = ", ".join(f"{name} {each.sleep:g} + {each.wake:g} s" for name, each in comparison.costs.items())
    console.print(f"{comparison.load}: {size:,} requests. Sleep + wake: {models}.")
    console.print(table)
    console.print("* the configured policy; the others have their defaults.")
    if comparison.bound is None:
        console.print("There is no lower bound: with closed loops the arrivals depend on the policy.")
    else:
        bound = comparison.bound
        freely = ""
        if bound.clairvoyant < bound.non_anticipating:
            freely = f" ({bound.clairvoyant:.2f} s if it may switch before anybody waits)"
        console.print(
            f"No schedule has a mean wait below {bound.non_anticipating:.2f} s{freely}; of the drains it counts a part only."
        )


def _waits(figures: Figures | ClassFigures) -> list[str]:
    waits = (figures.mean_wait, figures.p50_wait, figures.p99_wait, figures.longest_wait)
    return [f"{wait:.2f} s" for wait in waits]
