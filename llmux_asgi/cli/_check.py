"""`llmux-asgi check`: what is wrong with a configuration, this machine and the servers, and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config import load_config
from ..exceptions import ConfigError
from ._app import FAILED, SETUP, UNUSABLE, app, console, print_json, progress_console
from ._findings import Finding
from ._host import look_at_host
from ._mends import explain
from ._reach import ServerReport, look_at_servers

__all__ = ["check"]


class Checked(msgspec.Struct, kw_only=True):
    """What `--json` prints."""

    config: str
    status: int
    findings: list[Finding] = []
    servers: list[ServerReport] = []


@app.command(rich_help_panel=SETUP)
def check(
    config: Annotated[Path, typer.Argument(help="The configuration: YAML, TOML or JSON.")],
    offline: Annotated[bool, typer.Option("--offline", help="Look at the file alone, not at this machine or servers.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is wrong with a configuration and its servers, and how to mend it. Changes nothing.

    Exit status: 0 all is well, or there are warnings only; 1 a server, or something on this machine, is not as it should be;
    2 the configuration cannot be used.
    """
    checked = Checked(config=str(config), status=0)
    try:
        loaded = load_config(config)
    except ConfigError as error:
        checked.findings.append(explain(error, config))
        checked.status = UNUSABLE
    else:
        if not offline:
            checked.findings += look_at_host(loaded)
            with progress_console().status("") as status:
                left = list(loaded.models)

                def done(model: str | None = None) -> None:
                    left[:] = [name for name in left if name != model]
                    status.update(f"waiting for {', '.join(left)}")

                done()
                checked.servers = anyio.run(look_at_servers, loaded, done)
            checked.findings += [finding for report in checked.servers for finding in report.findings]
            checked.status = FAILED if any(finding.level == "error" for finding in checked.findings) else 0
    if json:
        print_json(checked)
    else:
        _print(console(), checked)
    raise SystemExit(checked.status)


def _print(out: Console, checked: Checked) -> None:
    if checked.servers:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("model", "server", "address", "state"):
            table.add_column(name, overflow="fold")
        for report in checked.servers:
            table.add_row(report.model, report.server, report.url or "a free port", report.state)
        out.print(table)
    for finding in checked.findings:
        style = "bold red" if finding.level == "error" else "bold yellow"
        out.print(Text.assemble((finding.level, style), f" {finding.where}: {finding.fault}"), soft_wrap=True)
        out.print(f"  mend: {finding.mend}", soft_wrap=True)
    errors = sum(finding.level == "error" for finding in checked.findings)
    warnings = len(checked.findings) - errors
    summary = "nothing is wrong" if not checked.findings else f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
    out.print(f"{checked.config}: {summary}", soft_wrap=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
