"""`llmux-asgi schema`."""

from __future__ import annotations

from ..config import json_schema
from ._app import app, print_json

__all__ = ["schema"]


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration file."""
    print_json(json_schema())
