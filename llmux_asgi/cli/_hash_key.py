"""`llmux-asgi hash-key`: API keys for the clients, and what the configuration has of them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..access import hash_key, new_key
from ._app import SETUP, app, print_json

__all__ = ["hash_one"]


@app.command("hash-key", rich_help_panel=SETUP)
def hash_one(
    stdin: Annotated[bool, typer.Option("--stdin", help="Hash the key that standard input holds, make none.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a random API key and its hash: the key is for the client, the hash for the gateway's configuration.

    Exit status: 0.
    """
    key = sys.stdin.read().strip() if stdin else new_key()
    if json:
        print_json({**({} if stdin else {"key": key}), "hash": hash_key(key)})
        return
    if not stdin:
        sys.stdout.write(f"key:  {key}\n")
    sys.stdout.write(f"hash: {hash_key(key)}\n")
