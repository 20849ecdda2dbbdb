"""`llmux-asgi events`: what a running gateway has done, and does."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any

import anyio
import msgspec
import typer

from ._app import REMOTE, UNUSABLE, app
from ._remote import ConfigOption, Gateway, KeyFileOption, RemoteError, UrlOption, ask
from ._remote_text import clock, described
from ._sse import Event

__all__ = ["data_of", "events", "follow_events"]

PAUSES = (1.0, 2.0, 5.0)
"""Seconds before the first, second and each further attempt to get a lost stream back."""


@app.command(rich_help_panel=REMOTE)
def events(
    since: Annotated[
        str | None, typer.Option("--since", metavar="ID", help="Only those after the event with this id, as --json tells it.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on with those to come, until Ctrl-C.")] = True,
    url: UrlOption = None,
    key_file: KeyFileOption = None,
    config: ConfigOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each event.")] = False,
) -> None:
    """Print what a running gateway has done, as far back as it remembers, and follow it: switches, phases, errors, pins.

    When the connection is lost it is made anew, and no event is missed or told twice unless the gateway was started again.
    Exit status: 0 ended by Ctrl-C, or all are told; 1 the gateway cannot be reached; 2 no admin API there, or wrong key.
    """
    write = _write_json if json else _write_line

    async def work(gateway: Gateway) -> None:
        await _follow(gateway, since, follow, write)

    try:
        ask("events", (url, key_file, config), work)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # as of `events | head`: what is still to be flushed must not fail at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def _follow(gateway: Gateway, since: str | None, follow: bool, write: Callable[[Event], None]) -> None:
    last: int | None = None
    if not follow:
        status = await gateway.status()
        last = status.last_event
        if not last or (since is not None and since.startswith(f"{status.epoch}-") and _number(since) >= last):
            return
    async with aclosing(follow_events(gateway, since, _tell_lost)) as stream:
        async for event in stream:
            if event.kind == "status":
                continue
            write(event)
            if last is not None and event.id is not None and _number(event.id) >= last:
                return


async def follow_events(
    gateway: Gateway, after: str | None, lost: Callable[[RemoteError], None]
) -> AsyncGenerator[Event, None]:
    """Events after the one with this id, and those to come; status objects between them.

    A connection that is lost is made anew; `lost` is told why. Raises `RemoteError` if there never was one, or if the gateway
    that is there now has no admin API, or refuses the key.
    """
    connected, pauses = False, iter(PAUSES)
    while True:
        try:
            async with aclosing(gateway.events(after)) as stream:
                async for event in stream:
                    after = event.id or after
                    connected, pauses = True, iter(PAUSES)
                    yield event
        except RemoteError as error:
            if not connected or error.status == UNUSABLE:
                raise
            lost(error)
        await anyio.sleep(next(pauses, PAUSES[-1]))


def data_of(event: Event) -> dict[str, Any]:
    """What an event says."""
    try:
        return msgspec.json.decode(event.data, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def _number(event_id: str) -> int:
    digits = event_id.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _tell_lost(error: RemoteError) -> None:
    sys.stderr.write(f"events: {error}; trying again\n")


def _write_json(event: Event) -> None:
    line = msgspec.json.encode({"id": event.id, "event": event.kind, **data_of(event)})
    sys.stdout.write(line.decode() + "\n")
    sys.stdout.flush()


def _write_line(event: Event) -> None:
    data = data_of(event)
    when = clock(data["time"]) if isinstance(data.get("time"), (int, float)) else " " * 8
    sys.stdout.write(f"{when} {described(event.kind, data)}\n")
    sys.stdout.flush()
