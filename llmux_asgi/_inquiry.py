"""Asking the servers how things stand, for callers that may leave before there is an answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

import anyio

from ._driver import Driver
from ._journal import Journal
from ._room import WaitingRoom
from ._servers import Servers
from ._spawn import spawn
from ._state import Mode
from .backends import BackendState
from .exceptions import BackendError, BackendTimeoutError, BackendUnreachableError

__all__ = ["Inquiry"]

logger = logging.getLogger("llmux_asgi.switcher")  # whose part this is


class Inquiry:
    """Asks, and has the driver adopt what the servers say."""

    def __init__(self, room: WaitingRoom, servers: Servers, driver: Driver, journal: Journal) -> None:
        self._room = room
        self._state = room.state
        self._servers = servers
        self._driver = driver
        self._journal = journal

    def distrust(self) -> None:
        """Have every server asked before the next request is admitted."""
        self._state.distrust()
        self._room.changed.set()

    async def reconcile(self) -> None:
        """Ask every server, and adopt what it says."""

        async def run() -> None:
            self.distrust()
            await self._driver.reconcile()

        await self._in_its_own_task(run)

    async def check(self) -> None:
        """Ask the active model's server, and if it is not awake all of them."""

        async def run() -> None:
            model = self._state.active
            if model is None or self._state.mode is not Mode.ACTIVE:
                return
            try:
                if await self._servers.look(model) is BackendState.AWAKE:
                    return
                what = f"the server of the active model {model!r} is not awake any more"
            except BackendTimeoutError:
                return
            except BackendError as exc:
                what = f"the server of the active model {model!r} does not say that it is awake: {exc}"
            logger.warning("%s", what)
            self._journal.error(model, "BackendError", what)
            self.distrust()
            await self._driver.reconcile()

        await self._in_its_own_task(run)

    async def require_freezing(self) -> None:
        """Ask those that answer whether they can keep their requests while they sleep."""
        for model in self._servers.models:
            with suppress(BackendUnreachableError, BackendTimeoutError):
                await self._servers.require_freezing(model)

    async def _in_its_own_task(self, function: Callable[[], Awaitable[None]]) -> None:
        done = anyio.Event()

        async def run() -> None:
            try:
                async with self._driver.exclusively():
                    await function()
            except Exception as exc:
                logger.exception("reconciling met an unexpected error")
                self._room.refuse_all(f"unexpected error: {exc!r}")
            finally:
                done.set()

        spawn(run, "llmux_asgi inquiry")
        await done.wait()
