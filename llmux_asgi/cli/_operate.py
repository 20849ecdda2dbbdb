"""`llmux-asgi wake`, `sleep`, `stop`, `pin`, `unpin`, `drain`, `resume`, `reload`: what operators want of a running gateway."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
import typer

from ._app import FAILED, REMOTE, app, print_json
from ._remote import ConfigOption, Gateway, JsonOption, KeyFileOption, Options, UrlOption, ask, complete_model, decoded
from ._remote_status import GatewayStatus, ModelStatus
from ._remote_text import changes, doing, duration, printable

__all__ = ["drain", "pin", "reload", "resume", "sleep", "stop", "unpin", "wake"]

ModelArgument = Annotated[str, typer.Argument(help="A model's name, or an alias.", autocompletion=complete_model)]


@app.command(rich_help_panel=REMOTE)
def wake(
    model: ModelArgument,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Make a model the active one, as a request for it would, and wait until it is.

    Exit status: 0 it is active; 1 it is not, or the gateway cannot be reached; 2 unknown model, no admin API, or wrong key.
    """
    _operate("wake", model, (url, key_file, config), json, busy=f"waking {model}", done="active")


@app.command(rich_help_panel=REMOTE)
def sleep(
    model: ModelArgument,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Let a model's running requests finish, put it to sleep, and wait until it sleeps. Waiting requests stay in line.

    Exit status: 0 it sleeps; 1 it does not, or the gateway cannot be reached; 2 unknown model, no admin API, or wrong key.
    """
    _operate("sleep", model, (url, key_file, config), json, busy=f"putting {model} to sleep")


@app.command(rich_help_panel=REMOTE)
def stop(
    model: ModelArgument,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Let a model's running requests finish, and end its server's process, which the gateway must have started itself.

    Exit status: 0 it is stopped; 1 it is not, or the gateway cannot be reached; 2 unknown model, no admin API, or wrong key.
    """
    _operate("stop", model, (url, key_file, config), json, busy=f"stopping {model}")


@app.command(rich_help_panel=REMOTE)
def pin(
    model: ModelArgument,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Wake a model and keep it: requests for other models wait, or time out, until `unpin`.

    Exit status: 0 it is pinned; 1 it is not, or the gateway cannot be reached; 2 unknown model, no admin API, or wrong key.
    """
    _operate("pin", model, (url, key_file, config), json, busy=f"waking {model}", done="pinned")


@app.command(rich_help_panel=REMOTE)
def unpin(url: UrlOption = None, key_file: KeyFileOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Let go of the pinned model: others have their turn again.

    Exit status: 0 no model is pinned; 1 the gateway cannot be reached; 2 no admin API, or wrong key.
    """

    async def work(gateway: Gateway) -> str | None:
        pinned = (await gateway.status()).pinned
        if pinned is not None:
            await gateway.operate(pinned, "pin", method="DELETE")
        return pinned

    pinned = ask("unpin", (url, key_file, config), work)
    _say(json, {"unpinned": pinned}, "no model was pinned" if pinned is None else f"{pinned} is not pinned any more")


@app.command(rich_help_panel=REMOTE)
def drain(
    wait: Annotated[
        float | None, typer.Option(min=0, max=3600, metavar="SECONDS", help="Wait until all is done, for so long at most.")
    ] = None,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Refuse new requests (503) and let those that run or wait finish, until `resume`: before maintenance, say.

    Exit status: 0 it drains, with --wait: is drained; 1 with --wait: it is not yet, or the gateway cannot be reached; 2 no
    admin API, or wrong key.
    """

    async def work(gateway: Gateway) -> bytes:
        return await gateway.post("drain" if wait is None else f"drain?wait={wait:g}")

    status = _switch("drain", (url, key_file, config), json, work, "draining")
    if wait is not None and not status.drained:
        raise SystemExit(FAILED)


@app.command(rich_help_panel=REMOTE)
def resume(
    url: UrlOption = None, key_file: KeyFileOption = None, config: ConfigOption = None, json: JsonOption = False
) -> None:
    """Take requests again, after `drain`.

    Exit status: 0 it does; 1 the gateway cannot be reached; 2 no admin API, or wrong key.
    """

    async def work(gateway: Gateway) -> bytes:
        return await gateway.post("resume")

    _switch("resume", (url, key_file, config), json, work, "resuming")


@app.command(rich_help_panel=REMOTE)
def reload(
    url: UrlOption = None, key_file: KeyFileOption = None, config: ConfigOption = None, json: JsonOption = False
) -> None:
    """Have the gateway read its configuration file again. No request is lost; a file that cannot be used changes nothing.

    Exit status: 0 it is read; 1 the gateway cannot be reached; 2 the configuration cannot be used, no admin API, or wrong key.
    """

    async def work(gateway: Gateway) -> tuple[bytes, dict[str, list[str]]]:
        content = await gateway.post("reload")
        return content, decoded(content, dict[str, list[str]], gateway.url)

    content, changed = ask("reload", (url, key_file, config), work, "reloading")
    _say(json, msgspec.Raw(content), changes(changed))


def _operate(
    command: str,
    model: str,
    options: Options,
    json: bool,
    *,
    busy: str,
    done: str | None = None,
) -> None:
    """Have it done, and say how the model is then, or that it is `done`."""

    async def work(gateway: Gateway) -> tuple[bytes, ModelStatus]:
        content = await gateway.operate(model, command)
        return content, decoded(content, ModelStatus, gateway.url)

    began = time.monotonic()
    content, now = ask(command, options, work, printable(busy))
    _say(json, msgspec.Raw(content), f"{now.name} is {done or now.state}, after {duration(time.monotonic() - began)}")


def _switch(
    command: str, options: Options, json: bool, work: Callable[[Gateway], Awaitable[bytes]], busy: str
) -> GatewayStatus:
    """Have it done, and say what the gateway is doing then."""

    async def decoding(gateway: Gateway) -> tuple[bytes, GatewayStatus]:
        content = await work(gateway)
        return content, decoded(content, GatewayStatus, gateway.url)

    content, status = ask(command, options, decoding, busy)
    _say(json, msgspec.Raw(content), doing(status))
    return status


def _say(json: bool, content: object, line: str) -> None:
    if json:
        print_json(content)
    else:
        sys.stdout.write(printable(line) + "\n")
