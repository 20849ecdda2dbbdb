"""`llmux-asgi status` and `models`: what a running gateway is doing."""

from __future__ import annotations

import msgspec

from ._app import REMOTE, app, console, print_json
from ._remote import ConfigOption, Gateway, JsonOption, KeyFileOption, Options, UrlOption, ask, decoded
from ._remote_status import GatewayStatus
from ._remote_text import clock, described, doing
from ._remote_view import load_table, models_table, summary

__all__ = ["models", "show_status", "status"]


@app.command(rich_help_panel=REMOTE)
def status(
    url: UrlOption = None, key_file: KeyFileOption = None, config: ConfigOption = None, json: JsonOption = False
) -> None:
    """Say what a running gateway is doing: which model is active, what runs and waits, the last errors.

    Exit status: 0 it has answered; 1 it cannot be reached; 2 it has no admin API there, or refuses the key.
    """

    show_status("status", (url, key_file, config), json)


@app.command(rich_help_panel=REMOTE)
def models(
    url: UrlOption = None, key_file: KeyFileOption = None, config: ConfigOption = None, json: JsonOption = False
) -> None:
    """List the models of a running gateway: state, aliases, server, sleep level, and what a sleep and a wake take.

    Exit status: 0 it has answered; 1 it cannot be reached; 2 it has no admin API there, or refuses the key.
    """

    async def work(gateway: Gateway) -> tuple[bytes, GatewayStatus]:
        return await gateway.get("models"), await gateway.status()

    content, now = ask("models", (url, key_file, config), work)
    if json:
        print_json(msgspec.Raw(content))
    else:
        out = console()
        out.print(models_table(now.models, out.width))


def show_status(command: str, options: Options, json: bool) -> None:
    """Ask the gateway what it is doing, and print it."""

    async def work(gateway: Gateway) -> tuple[bytes, GatewayStatus]:
        content = await gateway.get("status")
        return content, decoded(content, GatewayStatus, gateway.url)

    content, now = ask(command, options, work)
    if json:
        print_json(msgspec.Raw(content))
        return
    out = console()
    out.print(doing(now), soft_wrap=True)
    out.print(load_table(now.models, out.width))
    out.print(summary(now), soft_wrap=True)
    for error in now.errors[:5]:
        message = described("error", {"model": error.model, "kind": error.kind, "message": error.message})
        out.print(f"{clock(error.time)} {message}", soft_wrap=True)
