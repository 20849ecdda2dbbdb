"""docs/moving.md: its tables are the converter's own, its example is what the command writes, its commands exist.

`UPDATE_MOVING=1 pytest tests/importing/test_moving_page.py` writes tables and example anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmux_asgi import load_config
from llmux_asgi.cli import app
from llmux_asgi.importing import FIELDS, Format

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "moving.md"
EXAMPLE = ROOT / "examples" / "moving"
BECAME = {"converted": "", "note": "note", "none": "no counterpart"}


def table(kind: Format) -> str:
    rows = [f"| `{field.key}` | {BECAME[field.status]} | {field.text} |" for field in FIELDS[kind]]
    return "\n".join(["| field | | where it goes, or what to do |", "| --- | --- | --- |", *rows])


@pytest.mark.parametrize("kind", FIELDS)
def test_the_tables_are_those_of_the_converter(kind: Format) -> None:
    text = PAGE.read_text()
    start, end = f"<!-- fields: {kind} -->\n", "<!-- end of fields -->"
    before, _, rest = text.partition(start)
    there, _, after = rest.partition(end)
    if os.environ.get("UPDATE_MOVING"):
        PAGE.write_text(f"{before}{start}\n{table(kind)}\n\n{end}{after}")
        return
    assert there.strip() == table(kind)
    assert not re.search(r"[^`]\|[^`]", "".join(field.text for field in FIELDS[kind]))


def test_the_example_is_what_the_command_writes() -> None:
    result = CliRunner().invoke(app, ["import", str(EXAMPLE / "llama-swap.yaml")], catch_exceptions=False)
    assert result.exit_code == 0
    if os.environ.get("UPDATE_MOVING"):
        (EXAMPLE / "llmux.yaml").write_text(result.stdout)
    assert (EXAMPLE / "llmux.yaml").read_text() == result.stdout
    assert set(load_config(EXAMPLE / "llmux.yaml").models) == {"qwen", "llama", "whisper"}
