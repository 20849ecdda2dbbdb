"""`llmux-asgi schema`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..config import json_schema
from ._app import SETUP, app, print_json

__all__ = ["schema"]


@app.command(rich_help_panel=SETUP)
def schema(
    json: Annotated[bool, typer.Option("--json", help="Changes nothing: it always is JSON.")] = False,
) -> None:
    """Print the JSON schema of the configuration file, for an editor. Exit status: 0."""
    print_json(json_schema())
