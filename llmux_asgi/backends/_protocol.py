"""The seam between the switcher and an inference server."""

from __future__ import annotations

import enum
from typing import Protocol, runtime_checkable

from ..config import TimeoutsConfig

__all__ = ["STOP_LEVEL", "Backend", "BackendState", "FreezingBackend", "StoppableBackend", "TunableBackend"]

STOP_LEVEL = 3
"""The sleep level that ends the server's process."""


class BackendState(enum.Enum):
    """What a server says of itself."""

    AWAKE = "awake"
    """It answers requests and holds memory."""
    ASLEEP = "asleep"
    """It holds no memory; a request sent to it would hang."""
    UNREACHABLE = "unreachable"
    """Nothing listens at its address: the process is gone, and its memory with it."""
    STOPPED = "stopped"
    """Its process does not run and holds no memory; `wake` starts it."""


class Backend(Protocol):
    """One inference server. Implement it to switch something else than vLLM.

    Each method keeps its own time limit and raises `BackendError` with a message that says what to do. The switcher calls
    them one at a time, except `state`, which may be called for several servers at once, and never cancels `sleep` or `wake`.
    `str(backend)` names the server in error messages.
    """

    async def state(self) -> BackendState:
        """Ask the server whether it sleeps. Raises `BackendError` if it gives no clear answer: it is never guessed."""
        ...

    async def sleep(self, level: int) -> None:
        """Put the model to sleep at `level` (1: weights to CPU memory, 2: discarded). Returns once that is confirmed.

        After a `wake` that failed, or that no `ready` has confirmed, it may be called for a server that takes itself for
        asleep while a part of the model is in memory: that part has to be out of it too.
        """
        ...

    async def wake(self) -> None:
        """Bring the model back, weights included, whatever level it sleeps at. Returns when the server says it is done."""
        ...

    async def ready(self) -> None:
        """Return as soon as the woken server takes requests."""
        ...

    async def aclose(self) -> None:
        """Close connections. The backend may be used again afterwards."""
        ...


@runtime_checkable
class StoppableBackend(Backend, Protocol):
    """A server whose process is the gateway's own: what cannot be put to sleep can be ended."""

    async def stop(self) -> None:
        """End the process and all that it has started. Returns once they are gone. May be called again."""
        ...


@runtime_checkable
class TunableBackend(Backend, Protocol):
    """A server whose time limits may change while it is used."""

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on. `freezes`: its requests have to survive its sleep."""
        ...


@runtime_checkable
class FreezingBackend(Backend, Protocol):
    """A server that can keep the requests that it is serving while it sleeps."""

    async def require_freezing(self) -> None:
        """Raise `BackendUnsupportedError` if this server cannot do so, with what to do about it."""
        ...

    async def freeze(self, level: int) -> None:
        """Put the model to sleep as `sleep` does; requests that run stop where they are and go on after `wake`."""
        ...
