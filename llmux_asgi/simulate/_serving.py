"""What the servers work on: the requests that run, and those that were stopped in the middle and go on later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ._agenda import FINISH, GIVE_UP, Agenda
from ._clients import Request

__all__ = ["Serving"]


class Serving:
    """The requests that were admitted and are not over.

    `answered` is called with each that has had its service, `expired` with each that was frozen for too long. `recompute` is
    what a request takes longer each time it goes on, in seconds.
    """

    def __init__(
        self,
        agenda: Agenda,
        models: Iterable[str],
        recompute: float,
        answered: Callable[[Request], None],
        expired: Callable[[Request], None],
    ) -> None:
        self._agenda = agenda
        self._recompute = recompute
        self._answered = answered
        self._expired = expired
        self._running: dict[str, dict[Request, None]] = {model: {} for model in models}
        self._stopped: dict[str, dict[Request, None]] = {model: {} for model in self._running}
        self._count = 0
        self._busy_since = 0.0
        self.seconds = 0.0
        """For how long any request has run, until the last time that none did."""

    def running(self, model: str) -> list[Request]:
        """The requests that `model` works on, in order of admission."""
        return list(self._running[model])

    def start(self, request: Request) -> None:
        """It is admitted."""
        request.wait = self._agenda.now - request.since
        self._run(request, 0.0)

    def end(self, request: Request) -> None:
        """It is over, whether it runs or is frozen."""
        if request in self._stopped[request.model]:
            del self._stopped[request.model][request]
            self._end_freeze(request)
        else:
            self._halt(request)

    def stop(self, model: str) -> None:
        """The sleep call is out: nothing of `model` goes on from now."""
        for request in self.running(model):
            # What was left of computing its KV cache anew is lost, and not saved for the next time.
            request.remaining = min(request.remaining, request.due - self._agenda.now)
            self._halt(request)
            self._stopped[model][request] = None

    def freeze(self, model: str, limit: float) -> None:
        """It is asleep: those that were stopped are frozen from now on, for `limit` seconds at most."""
        now = self._agenda.now
        for request in self._stopped[model]:
            request.freezes += 1
            request.frozen_since = now
            self._agenda.at(now + limit, GIVE_UP, self._expire, (request, now))

    def thaw(self, model: str) -> None:
        """It is awake: those that are frozen go on."""
        for request in self._stopped[model]:
            self._end_freeze(request)
            self._run(request, self._recompute)
        self._stopped[model].clear()

    def _end_freeze(self, request: Request) -> None:
        request.frozen += self._agenda.now - request.frozen_since
        request.frozen_since = math.nan

    def _run(self, request: Request, first: float) -> None:
        now = self._agenda.now
        if not self._count:
            self._busy_since = now
        self._count += 1
        self._running[request.model][request] = None
        request.due = now + first + request.remaining
        self._agenda.at(request.due, FINISH, self._finish, request)

    def _halt(self, request: Request) -> None:
        del self._running[request.model][request]
        request.due = math.inf
        self._count -= 1
        if not self._count:
            self.seconds += self._agenda.now - self._busy_since

    def _finish(self, request: Request) -> None:
        if request.due == self._agenda.now:  # else it was stopped or cut meanwhile
            self._answered(request)

    def _expire(self, freeze: tuple[Request, float]) -> None:
        request, since = freeze
        if request.frozen_since == since:  # else that freeze is over
            self._expired(request)
