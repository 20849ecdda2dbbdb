"""`llmux-asgi import`: configurations of llmux and llama-swap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..exceptions import LLMuxError
from ..importing import Program
from ..importing.command import run
from ._app import SETUP, UNUSABLE, app, fail

__all__ = ["import_"]


@app.command("import", rich_help_panel=SETUP)
def import_(
    file: Annotated[Path, typer.Argument(help="Configuration of llmux (JSON, YAML) or llama-swap (YAML).")],
    program: Annotated[Program | None, typer.Option("--from", help="Whose it is; default: told by its fields.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="YAML file to write; default: stdout.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print configuration and report as JSON.")] = False,
) -> None:
    """Import a configuration of llmux or llama-swap, and say of each field what became of it.

    Exit status: 0 written, with what has no counterpart told; 2 the file is neither program's, or the output is there already.
    """
    try:
        run(file, program, output, as_json=json)
    except LLMuxError as error:
        fail(f"import: {error}", UNUSABLE)
