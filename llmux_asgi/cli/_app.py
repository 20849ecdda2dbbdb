"""The app that the commands belong to, and what they have in common: how they print, and how they fail."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from typing import Annotated, NoReturn

import msgspec
import typer
from rich.console import Console

__all__ = ["FAILED", "REMOTE", "SETUP", "TRY", "UNUSABLE", "app", "console", "fail", "print_json", "progress_console"]

FAILED = 1
"""Exit status: the command has run and did not succeed, or what it looked at is not as it should be."""
UNUSABLE = 2
"""Exit status: it cannot run: its arguments or the configuration are wrong. Nothing was done."""

SETUP = "Set up and run"
REMOTE = "A running gateway (by its admin API)"
TRY = "Try without a GPU"
"""Panels of the help."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve many vLLM models from one GPU.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"llmux-asgi {installed_version('llmux-asgi')}\n")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve many vLLM models from one GPU."""


def fail(message: str, status: int) -> NoReturn:
    """End the command with one line on standard error."""
    sys.stderr.write(message + "\n")
    raise SystemExit(status)


def console() -> Console:
    """What a person reads, on standard output. In a pipe nothing is cut off: there is no terminal that is too narrow."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def progress_console() -> Console:
    """Where progress is shown: standard error. Rich shows it on a terminal only."""
    return Console(stderr=True)


def print_json(content: object) -> None:
    """Print for a machine, on standard output."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(content)).decode() + "\n")
