"""The queue of one model: requests in order of arrival, one line for each head start that waits. Pure.

A request with a head start of H seconds counts as having waited for H seconds when it comes: it is passed by nobody who comes
later with the same head start, and by one with a larger one, H', only if that comes within H' - H seconds. What is asked of a
queue costs the number of head starts, whatever its length.
"""

from __future__ import annotations

import enum
import heapq
from collections import OrderedDict
from collections.abc import Iterator

__all__ = ["Ticket", "TicketQueue", "TicketStatus"]


class TicketStatus(enum.Enum):
    """What became of a waiting request."""

    WAITING = "waiting"
    GRANTED = "granted"
    REFUSED = "refused"
    LEFT = "left"


class Ticket:
    """A request's place in the queue of its model. It came at `since`, with a `head_start` in seconds."""

    __slots__ = ("counts_since", "head_start", "model", "since", "status")

    def __init__(self, model: str, since: float, head_start: float = 0.0) -> None:
        self.model = model
        self.since = since
        self.head_start = head_start
        self.counts_since = since - head_start
        """When it would have come if it had waited for its head start: the order of all queues goes by that."""
        self.status = TicketStatus.WAITING


class TicketQueue:
    """Those who wait for one model. They have to be added in order of arrival."""

    def __init__(self) -> None:
        # A line keeps its order when one in the middle leaves, in O(1); there is none that is empty.
        self._lines: dict[float, OrderedDict[Ticket, None]] = {}
        self._length = 0
        self._sum = 0.0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Ticket]:
        """Go through it, the longest wait first, head starts included."""
        return heapq.merge(*self._lines.values(), key=lambda ticket: ticket.counts_since)

    def add(self, ticket: Ticket) -> None:
        """Put a ticket behind those of the same head start."""
        self._lines.setdefault(ticket.head_start, OrderedDict())[ticket] = None
        self._length += 1
        self._sum += ticket.counts_since

    def remove(self, ticket: Ticket) -> None:
        """Take out a ticket that is in it."""
        line = self._lines[ticket.head_start]
        del line[ticket]
        if not line:
            del self._lines[ticket.head_start]
        self._length -= 1
        # Set back when it is empty, so that what rounding leaves does not add up.
        self._sum = self._sum - ticket.counts_since if self._length else 0.0

    def clear(self) -> list[Ticket]:
        """Take out all, in order."""
        tickets = list(self)
        self._lines.clear()
        self._length, self._sum = 0, 0.0
        return tickets

    @property
    def counts_since(self) -> float:
        """Since when the longest of its waits counts, head start included. There must be one."""
        return min(next(iter(line)).counts_since for line in self._lines.values())

    @property
    def first_since(self) -> float:
        """When the first of them came. There must be one."""
        return min(next(iter(line)).since for line in self._lines.values())

    @property
    def head_start(self) -> float:
        """The largest head start that waits; 0.0 if nobody does."""
        return max(self._lines, default=0.0)

    def total_wait(self, now: float) -> float:
        """The sum of the waits in seconds, head starts included."""
        return max(0.0, self._length * now - self._sum)
