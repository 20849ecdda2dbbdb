"""What has happened, for who operates the gateway: a bounded list of entries that can be followed.

Nothing on the way of a request to the active model is noted here.

    switch     a switch has begun: {switch, from, to, waiting, in_flight}; `to` is null where a model is only put to sleep
    phase      one of its phases has begun, and the one before has ended: {switch, phase, model}
    switched   it is over: {switch, from, to, outcome, duration, phases, served, longest_wait}
    model      what is known of a server has changed: {model, state}
    error      something went wrong: {model, kind, message}
    pin        a model is pinned, or none any more (null): {model}
    drain      new requests are refused from now on, or admitted again: {draining}
    config     the configuration was read again: {added, changed, removed}

All durations are in seconds. `model` is a configured name, or null where an error belongs to none.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import anyio

from ._errors import for_clients
from ._statistics import ErrorRecord

__all__ = ["Journal", "JournalEntry"]

_ERRORS = 20


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One thing that has happened. Its data can be written as JSON."""

    id: int
    """1 for the first one of the process, and one more for each further one."""
    time: float
    """Unix time in seconds."""
    kind: str
    data: dict[str, Any]


class Journal:
    """The last `size` entries. `clock` gives Unix time in seconds."""

    def __init__(self, size: int = 1000, *, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.started = clock()
        """When it was begun, in Unix time."""
        self.epoch = secrets.token_hex(4)
        """Tells the ids of this process from those of another one."""
        self.last_id = 0
        """The id of the newest entry, 0 if there has been none."""
        self._entries: deque[JournalEntry] = deque(maxlen=size)
        self._errors: deque[ErrorRecord] = deque(maxlen=_ERRORS)
        self._last_errors: dict[str, ErrorRecord] = {}
        self._written: anyio.Event | None = None

    def write(self, kind: str, /, **data: Any) -> JournalEntry:
        """Add an entry and wake those who wait for one."""
        self.last_id += 1
        entry = JournalEntry(self.last_id, self.clock(), kind, data)
        self._entries.append(entry)
        if self._written is not None:
            self._written.set()
            self._written = None
        return entry

    def error(self, model: str | None, kind: str, message: str) -> None:
        """Add an entry of the kind `error`. Addresses of servers in the message, and all lines but the first, are left out."""
        message = for_clients(message)
        entry = self.write("error", model=model, kind=kind, message=message)
        record = ErrorRecord(entry.time, model, kind, message)
        self._errors.appendleft(record)
        if model is not None:
            self._last_errors[model] = record

    def since(self, after: int) -> tuple[list[JournalEntry], bool]:
        """Return the entries after the id `after`, and whether those are all: older ones are dropped in time."""
        first = self._entries[0].id if self._entries else self.last_id + 1
        complete = first - 1 <= after <= self.last_id
        skip = max(0, after + 1 - first) if after <= self.last_id else 0
        return list(islice(self._entries, skip, None)), complete

    async def wait(self, after: int) -> None:
        """Return as soon as there is an entry after the id `after`. May be cancelled at any time."""
        while self.last_id <= after:
            if self._written is None:
                self._written = anyio.Event()
            await self._written.wait()

    @property
    def errors(self) -> tuple[ErrorRecord, ...]:
        """The last errors, the newest first."""
        return tuple(self._errors)

    @property
    def last_errors(self) -> dict[str, ErrorRecord]:
        """The last error by model."""
        return dict(self._last_errors)
