"""The request log: one line of JSON for each request that named a known model, written when it is over.

    {"time": 1763900000.25, "model": "qwen", "waited": 1.5, "served": 4.0, "status": 200, "stream": true,
     "priority": null, "frozen": 0.0, "key": null}

Nothing of a prompt or an answer is in it. `llmux-asgi simulate` reads it.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec

__all__ = ["RequestEntry", "RequestLog", "RequestTimes"]

logger = logging.getLogger(__name__)


class RequestEntry(msgspec.Struct, frozen=True):
    """One line of the log. Durations are in seconds."""

    time: float
    """When the request had arrived whole, in seconds of Unix time."""
    model: str
    """The configured name."""
    waited: float
    """How long it waited for its model; if it was never admitted, until that was over."""
    served: float | None = None
    """From its admission to the last byte of its answer; `None`: it was never admitted."""
    status: int = 200
    """The HTTP status of the answer; 0: the client left before there was one."""
    stream: bool | None = None
    """Whether it asked for a stream; `None`: not known, the model was named by the header."""
    priority: str | None = None
    """Its priority class, the model's if it named none; `None`: it has none."""
    frozen: float = 0.0
    """For how much of `served` it was frozen, in all the freezes that were over."""
    key: str | None = None
    """The name of the client's key; `None`: there is no access control."""


class RequestTimes:
    """The clock of one request."""

    __slots__ = ("_admitted", "_arrived", "_ended", "_waited", "stream", "time")

    def __init__(self) -> None:
        self.stream: bool | None = None
        self.arrived()

    def arrived(self) -> None:
        """It is read whole."""
        self.time = time.time()
        self._arrived = time.monotonic()
        self._admitted: float | None = None
        self._ended: float | None = None
        self._waited = 0.0

    def admitted(self, waited: float) -> None:
        """It has a lease, after `waited` seconds in all. Of several times, the last counts."""
        self._admitted, self._waited = time.monotonic(), waited

    def ended(self) -> None:
        """The last byte of the answer is out."""
        self._ended = time.monotonic()

    def entry(
        self, model: str, status: int, *, priority: str | None = None, frozen: float = 0.0, key: str | None = None
    ) -> RequestEntry:
        """Sum it up, now that it is over. `frozen` is for how many seconds its last lease was."""
        end = time.monotonic() if self._ended is None else self._ended
        if self._admitted is None:
            return RequestEntry(self.time, model, end - self._arrived, None, status, self.stream, priority, key=key)
        served = end - self._admitted
        return RequestEntry(self.time, model, self._waited, served, status, self.stream, priority, frozen, key)


class RequestLog:
    """A JSONL file that is appended to. One that cannot be written is a warning and no more.

    It is opened for each line: there is nothing to close, and a file that was moved away (rotation) is followed by a new one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()
        self._failed = False

    def write(self, entry: RequestEntry) -> None:
        """Append a line, in one piece: several gateways may share the file."""
        line = msgspec.json.encode(entry) + b"\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as exc:
            if not self._failed:  # once, and not at each request
                logger.warning("the request log %s cannot be written: %s", self._path, exc)
            self._failed = True
        else:
            self._failed = False
