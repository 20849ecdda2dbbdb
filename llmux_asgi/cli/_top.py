"""`llmux-asgi top`: a running gateway, live."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import anyio
import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from ._app import REMOTE, app, console
from ._events import data_of, follow_events
from ._inspect import show_status
from ._remote import ConfigOption, Gateway, JsonOption, KeyFileOption, RemoteError, UrlOption, ask
from ._remote_status import GatewayStatus
from ._remote_text import clock, described, doing, printable
from ._remote_view import load_table, summary
from ._sse import Event

__all__ = ["Screen", "top"]

_TICK = 0.1
"""Seconds between two looks at the keyboard, and at whether there is something new to show."""
_STALE = 1.0
"""Seconds after which the screen is drawn anew although nothing has come: times go on."""
_FEWEST = 3
"""Lines for events, however many models there are."""
_KEPT = 200
"""Events, more than a screen has lines."""


@app.command(rich_help_panel=REMOTE)
def top(url: UrlOption = None, key_file: KeyFileOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """Watch a running gateway: models, the switch under way, queues, the last events. q or Ctrl-C ends it.

    Where standard output is no terminal, and with --json, it prints the state once, as `status` does.
    Exit status: 0 ended; 1 the gateway cannot be reached; 2 no admin API there, or wrong key.
    """
    out = console()
    if json or not out.is_terminal or out.is_dumb_terminal:
        show_status("top", (url, key_file, config), json)
        return

    async def watch(gateway: Gateway) -> None:
        await _watch(gateway, out)

    try:
        with _keys_one_by_one():
            ask("top", (url, key_file, config), watch)
    except KeyboardInterrupt:
        pass


class Screen:
    """What is shown, of what the gateway has said so far."""

    def __init__(self, url: str, status: GatewayStatus) -> None:
        self._url = url
        self._events: deque[str] = deque(maxlen=_KEPT)
        self._trouble: str | None = None
        self._status = status
        self._ahead = status.time - time.monotonic()
        """What the gateway's clock is ahead of the monotonic one here. A status may be some seconds old when it comes."""
        self.drawn: float | None = None
        """When it was drawn last, by the monotonic clock, seconds; `None`: there is something new since then."""

    def take(self, event: Event) -> None:
        """The gateway has said something."""
        self._trouble = None
        self.drawn = None
        if event.kind == "status":
            status = msgspec.json.decode(event.data, type=GatewayStatus)
            ahead = status.time - time.monotonic()
            self._ahead = max(self._ahead, ahead) if status.epoch == self._status.epoch else ahead
            self._status = status
            return
        data = data_of(event)
        self._events.append(f"{clock(data.get('time', self._status.time))} {described(event.kind, data)}")

    def lost(self, error: RemoteError) -> None:
        """The connection is gone."""
        self._trouble = f"{error}; trying again"
        self.drawn = None

    def _now(self) -> GatewayStatus:
        """The status, with times that have gone on since it came."""
        passed = 0.0 if self._trouble else self._ahead + time.monotonic() - self._status.time
        models = [
            model if model.oldest_wait is None else msgspec.structs.replace(model, oldest_wait=model.oldest_wait + passed)
            for model in self._status.models
        ]
        return msgspec.structs.replace(self._status, time=self._status.time + passed, models=models)

    def __rich_console__(self, out: Console, options: ConsoleOptions) -> RenderResult:
        status, width = self._now(), options.max_width
        what = Text(doing(status), "bold yellow" if status.switch else "bold")
        title = Text(f"llmux-asgi {printable(status.version)} at {self._url}", "dim", no_wrap=True, overflow="ellipsis")
        head = Group(title, what, load_table(status.models, width), Text(summary(status), "dim"), Text())
        foot = Text("q ends it", "dim") if self._trouble is None else Text(printable(self._trouble), "bold red")
        natural = options.update(height=None)
        top, bottom = (out.render_lines(each, natural) for each in (head, foot))
        height = options.height or out.height
        top = top[: max(height - len(bottom) - _FEWEST, 1)]
        room = max(height - len(bottom) - len(top), 0)
        events = [Text(line, no_wrap=True, overflow="ellipsis") for line in list(self._events)[-room:]] if room else []
        middle = Group(*events, *[Text()] * (room - len(events)))
        for line in (*top, *(out.render_lines(middle, natural) if room else ()), *bottom):
            yield from line
            yield Segment.line()


async def _watch(gateway: Gateway, out: Console) -> None:
    screen = Screen(gateway.url, await gateway.status())  # what is wrong is told in a line, before there is a screen
    failure: list[RemoteError] = []

    async def read() -> None:
        try:
            async with aclosing(follow_events(gateway, None, screen.lost)) as stream:
                async for event in stream:
                    screen.take(event)
        except RemoteError as error:
            failure.append(error)

    async def end_by_signal() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:  # the terminal is to be left as it was
            async for _ in signals:
                tasks.cancel_scope.cancel()

    with Live(screen, console=out, screen=True, auto_refresh=False) as live:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(end_by_signal)
            while not failure and "q" not in _pressed():
                now = time.monotonic()
                if screen.drawn is None or now - screen.drawn >= _STALE:
                    screen.drawn = now
                    live.refresh()
                await anyio.sleep(_TICK)
            tasks.cancel_scope.cancel()
    if failure:
        raise failure[0]


def _pressed() -> str:
    """The keys pressed since the last look."""
    if not sys.stdin.isatty() or not select.select([sys.stdin], [], [], 0)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 64).decode(errors="replace").lower()


@contextmanager
def _keys_one_by_one() -> Iterator[None]:
    """Have the terminal hand over each key at once, and not show it."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
