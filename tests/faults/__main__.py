"""Writes the table of docs/faults.md anew: `python -m tests.faults`."""

from __future__ import annotations

from pathlib import Path

from . import clients, engines, freezing, frozen, processes, servers, sleeping, waking  # noqa: F401 (each registers its faults)
from .matrix import FAULTS

__all__ = ["PAGE", "table"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def table() -> str:
    """The table of all faults, in Markdown."""
    head = "| fault | what happens | what clients get | log and spans | state after it |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(fault.row + "\n" for fault in FAULTS.values())


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition("| fault |")[0] + table())
