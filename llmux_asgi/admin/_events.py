"""What happens, as server-sent events: the journal's entries, and the status whenever it has changed.

A client that comes back says which event it has seen last (`Last-Event-ID`) and gets those after it. If they are not kept any
more, the event `reset` says so. The status is looked at only while somebody follows.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence

import anyio
import msgspec
from starlette.types import Receive, Send

from .._journal import Journal, JournalEntry
from .._waiting import SendWatch
from ..exceptions import RateLimitError
from ._gateway import Gateway
from ._status import Status, status_of, without_clocks

__all__ = ["MOST_STREAMS", "EventStreams", "until_gone"]

logger = logging.getLogger("llmux_asgi.admin")

MOST_STREAMS = 32
"""Streams that may be open at a time, for all operators together."""
_STATUS_INTERVAL = 0.25
"""Seconds from one look at the status to the next."""
_HEARTBEAT = 10.0
"""Seconds after which a comment is sent, and the status even if only its clocks have moved on."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # or nginx would keep events until it has some kilobytes of them
    (b"x-content-type-options", b"nosniff"),
]
_BEGINNING = b"retry: 1000\n\n"
"""Milliseconds that a browser waits before it connects again."""


class EventStreams:
    """All event streams of one gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.feed = _StatusFeed(gateway)
        self.open: set[_Stream] = set()

    async def serve(self, key: str, last_event_id: str | None, receive: Receive, send: Send) -> None:
        """Send what happens after `last_event_id` until the client leaves, does not read, or `end` is called.

        `key` is the name of who asks. Raises `RateLimitError` if there are too many streams already.
        """
        if len(self.open) >= MOST_STREAMS:
            limit = f"{MOST_STREAMS} event streams at once, those of all keys together"
            raise RateLimitError(key, limit, retry_after=5.0)
        stream = _Stream(self, last_event_id, send)
        self.open.add(stream)
        try:
            await stream.run(receive)
        finally:
            self.open.discard(stream)

    def end(self) -> None:
        """Have all streams end that are open now. Does not wait for it."""
        for stream in self.open:
            stream.ended = True


class _Stream:
    """One client that follows."""

    def __init__(self, streams: EventStreams, last_event_id: str | None, send: Send) -> None:
        self.ended = False
        self._streams = streams
        self._journal = streams.gateway.switcher.journal
        self._position, self._is_reset = _position(self._journal, last_event_id)
        """The id of the last event that the client has; whether it has to be told that some are missing."""
        self._status = 0
        """The number of the status that it has."""
        self._tasks = anyio.create_task_group()
        write_timeout = streams.gateway.config.limits.write_timeout
        self._send = SendWatch(send, write_timeout, self._tasks.start_soon, self._drop)

    async def run(self, receive: Receive) -> None:
        async with self._tasks:
            self._tasks.start_soon(self._until_gone, receive)
            try:
                await self._follow()
            finally:
                self._send.end()
            self._tasks.cancel_scope.cancel()

    async def _until_gone(self, receive: Receive) -> None:
        await until_gone(receive)
        self._tasks.cancel_scope.cancel()

    def _drop(self) -> None:
        """The client does not read."""
        logger.warning("an operator's event stream is not read: it is dropped")
        self._streams.open.discard(self)  # at once: there are servers that shield the send that it hangs in
        self._tasks.cancel_scope.cancel()

    async def _follow(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        beat = time.monotonic()
        pending = [_BEGINNING]
        while not self.ended and not _host_is_stopping():
            pending += self._news()
            if (now := time.monotonic()) - beat >= _HEARTBEAT:
                beat = now
                pending.append(b": \n\n")
            if pending:
                await self._send({"type": "http.response.body", "body": b"".join(pending), "more_body": True})
                pending = []
            with anyio.move_on_after(_STATUS_INTERVAL):
                await self._journal.wait(self._position)
        await self._send({"type": "http.response.body", "body": b""})

    def _news(self) -> Iterator[bytes]:
        """What the client does not have yet."""
        entries, complete = self._journal.since(self._position)
        if self._is_reset or (self._position and not complete):
            self._is_reset = False
            yield b"event: reset\ndata: {}\n\n"
        number, status = self._streams.feed.latest()
        if number != self._status:
            self._status = number
            yield status
        if entries:
            self._position = entries[-1].id
            yield _encoded(self._journal.epoch, entries)


class _StatusFeed:
    """The status as an event, looked at anew after `_STATUS_INTERVAL`, however many follow."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._looked = self._encoded = float("-inf")
        self._number = 0
        self._seen: Status | None = None
        self._event = b""

    def latest(self) -> tuple[int, bytes]:
        """Return the status as an event, and its number, which grows when it has changed."""
        now = time.monotonic()
        if now - self._looked >= _STATUS_INTERVAL:
            self._looked = now
            status = status_of(self._gateway)
            seen = without_clocks(status)
            if seen != self._seen or now - self._encoded >= _HEARTBEAT:
                self._number, self._seen, self._encoded = self._number + 1, seen, now
                self._event = b"event: status\ndata: " + msgspec.json.encode(status) + b"\n\n"
        return self._number, self._event


async def until_gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _position(journal: Journal, last_event_id: str | None) -> tuple[int, bool]:
    """Where to go on after an event, and whether events are missing that came after it."""
    if not last_event_id:
        return 0, False
    epoch, _, number = last_event_id.rpartition("-")
    if epoch == journal.epoch and number.isascii() and number.isdecimal() and len(number) < 16:
        after = int(number)
        if journal.since(after)[1]:
            return after, False
    return 0, True


def _encoded(epoch: str, entries: Sequence[JournalEntry]) -> bytes:
    return b"".join(
        b"id: %b-%d\nevent: %b\ndata: %b\n\n"
        % (epoch.encode(), each.id, each.kind.encode(), msgspec.json.encode({"time": each.time, **each.data}))
        for each in entries
    )


def _host_is_stopping() -> bool:
    """Say whether uvicorn has been told to stop.

    It waits for all answers to end, and tells an app nothing before they have. An event stream has no end of its own. While it
    runs, its server object is behind the handler of SIGTERM.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False) is True
