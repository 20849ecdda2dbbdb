"""What is written in one turn of the event loop goes out together, at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

__all__ = ["Turn"]


class Turn:
    """Runs functions when all is done that the event loop has to do at present.

    A write to a process that sleeps wakes it, which costs several times what the write does. Of writes in a row only the
    first one does; of writes with other work between them nearly each. Who is `alone` need not wait for others.
    """

    __slots__ = ("_due", "_loop", "_quiet", "alone")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # else it would be kept by what is kept for it
        self._due: list[Callable[[], None]] = []
        self._quiet = 0
        """In how many turns in a row there was one function, or none."""
        self.alone = False
        """Whether there has been but one function for a while, and is in this turn so far."""

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> Turn:
        """Return the one of an event loop."""
        turn = _TURNS.get(loop)
        if turn is None:
            turn = _TURNS[loop] = Turn(loop)
        return turn

    def at_end(self, function: Callable[[], None]) -> None:
        """Have `function` called, in the order of these calls."""
        if self._due:
            self.alone = False
        else:
            self._the_loop().call_soon(self._end)
        self._due.append(function)

    def _the_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop()
        assert loop is not None  # noqa: S101 (for the type: who calls runs in it)
        return loop

    def _end(self) -> None:
        due, self._due = self._due, []
        self._quiet = self._quiet + 1 if len(due) < 2 else 0
        self.alone = self._quiet >= _A_WHILE
        for function in due:
            try:
                function()
            except Exception as exc:  # noqa: BLE001 - what an event loop does: the others are not to suffer
                self._the_loop().call_exception_handler({"message": f"{function} failed", "exception": exc})


_A_WHILE = 8
"""Turns of the event loop in which something is written."""
_TURNS: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()
