"""`llmux-asgi validate`: try sleeping and waking with a real server, before traffic depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import anyio
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from .._memory import MemoryGauge, NvmlGauge
from ..backends import STOP_LEVEL, with_ports
from ..config import Config, load_config
from ..exceptions import ConfigError
from ._app import FAILED, SETUP, UNUSABLE, app, console, fail, print_json, progress_console
from ._cycles import Validation, validate_model

__all__ = ["validate"]


@app.command(rich_help_panel=SETUP)
def validate(
    model: Annotated[str, typer.Argument(help="A model of the configuration, or an alias.")],
    config: Annotated[Path, typer.Option(help="The configuration: YAML, TOML or JSON.")],
    level: Annotated[list[int] | None, typer.Option(min=1, max=3, help="Level, may be repeated; default: 1 and 2.")] = None,
    cycles: Annotated[int, typer.Option(min=1, help="How many times at each level.")] = 2,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put a model's server to sleep and wake it, by level, and see that it answers as before. Leaves it as it was found.

    While this runs the model answers nobody else, and no gateway may use its server. Exit status: 0 all cycles are well;
    1 one is not, and further ones were not tried; 2 nothing was done.
    """
    try:
        loaded = with_ports(load_config(config))
    except ConfigError as error:
        fail(f"validate: {error}", UNUSABLE)
    name = loaded.aliases.get(model, model)
    if name not in loaded.models:
        fail(f"validate: {config} has no model {model!r}, but {', '.join(loaded.models)}", UNUSABLE)
    levels = _levels(loaded, name, level)
    if not yes:
        question = f"The model {name} will not answer meanwhile, and no gateway may use its server. Go on?"
        try:
            agreed = typer.confirm(question, err=True)
        except typer.Abort:
            agreed = False
        if not agreed:
            fail("validate: nothing was done; --yes goes on without asking", UNUSABLE)
    with progress_console().status("") as status:
        done = anyio.run(validate_model, loaded, name, levels, cycles, _gauge(loaded), status.update)
    if json:
        print_json(done)
    else:
        _print(console(), done)
    raise SystemExit(0 if done.passed and done.error is None else FAILED)


def _levels(config: Config, name: str, given: list[int] | None) -> list[int]:
    model = config.models[name]
    levels = list(dict.fromkeys(given or ([1, 2] if model.server == "vllm" and model.hooks is None else [1])))
    if STOP_LEVEL in levels and model.command is None and model.hooks is None:
        fail("validate: level 3 stops the server's process, which only one with a command has", UNUSABLE)
    return levels


def _gauge(config: Config) -> MemoryGauge | None:
    """What reads the GPU, if there is one that can be read: without it the cycles say less."""
    try:
        return NvmlGauge(config.memory.device)
    except ConfigError:
        return None


def _print(out: Console, done: Validation) -> None:
    measured = any(cycle.memory_awake is not None for cycle in done.cycles)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("level", "cycle", "sleep", "wake", *(["awake", "asleep"] if measured else []), "same answer"):
        table.add_column(column, justify="right", no_wrap=True)
    for cycle in done.cycles:
        times = ("-" if seconds is None else f"{seconds:.2f} s" for seconds in (cycle.sleep, cycle.wake))
        memory = ("-" if mib is None else f"{mib:,} MiB" for mib in (cycle.memory_awake, cycle.memory_asleep))
        same = {True: "yes", False: "no", None: "-"}[cycle.same_answer]
        table.add_row(str(cycle.level), str(cycle.cycle), *times, *(memory if measured else ()), same)
    if done.cycles:
        out.print(table)
    for error in (*(cycle.error for cycle in done.cycles), done.error):
        if error is not None:
            out.print(f"error: {error}", soft_wrap=True)
    verdict = "passed" if done.passed and done.error is None else "failed"
    out.print(f"{done.model}: {verdict}; found {done.found}, left {done.left}")
