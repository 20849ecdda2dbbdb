"""A server whose process belongs to the gateway: waking starts it if it does not run, and what cannot sleep can be ended."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

import anyio

from .._process import ServerProcess, clear_leftovers
from ..config import TimeoutsConfig
from ..exceptions import (
    BackendDeadError,
    BackendError,
    BackendStartError,
    BackendUnreachableError,
    BackendUnsupportedError,
)
from ._http import POLL_FIRST, POLL_LONGEST
from ._protocol import STOP_LEVEL, Backend, BackendState, FreezingBackend, TunableBackend

__all__ = ["ManagedBackend"]

logger = logging.getLogger(__name__)

_GONE = (BackendDeadError, BackendUnreachableError)
"""The engine, or the process that listens, is gone. The rest of the processes may live on and hold memory."""


class ManagedBackend:
    """Runs `command` and controls the server in it by `server`, the backend for what listens at `url`.

    `{port}` in the command and the environment stands for the port of `url`.
    """

    def __init__(
        self,
        model: str,
        server: Backend,
        url: str,
        command: tuple[str, ...],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeouts: TimeoutsConfig | None = None,
    ) -> None:
        self._server = server
        self._timeouts = timeouts or TimeoutsConfig()
        parts = urlsplit(url)
        self._address = (str(parts.hostname), parts.port or 80)
        port = str(self._address[1])
        self._process = ServerProcess(
            model,
            [each.replace("{port}", port) for each in command],
            env={name: value.replace("{port}", port) for name, value in (env or {}).items()},
            cwd=cwd,
            grace=self._timeouts.stop,
        )
        self._leftovers_cleared = False
        self._stops = 0
        """How often it was told to stop: a start that is under way must not come after it."""

    def __str__(self) -> str:
        return str(self._server)

    async def state(self) -> BackendState:
        """Ask the server. If its process does not run, or its engine has died, what is left of it is ended: STOPPED."""
        if not self._leftovers_cleared:
            await clear_leftovers(self._timeouts.stop)
            self._leftovers_cleared = True
        if not self._process.running:
            await self._process.stop()
            return BackendState.STOPPED
        try:
            state = await self._server.state()
        except BackendDeadError:
            state = BackendState.UNREACHABLE
        if state is BackendState.UNREACHABLE:  # its engine, or the process that listens, is gone: the rest is of no use
            await self._process.kill()
            return BackendState.STOPPED
        return state

    async def sleep(self, level: int) -> None:
        """Put the server to sleep; at level 3, end its process."""
        await self._put_to_sleep(level, self._server.sleep)

    async def require_freezing(self) -> None:
        """Ask the server, if its process runs: it is asked when it starts, too."""
        if not isinstance(self._server, FreezingBackend):
            raise BackendUnsupportedError(f"{self}: this kind of server cannot keep its requests while it sleeps")
        if self._process.running:
            await self._server.require_freezing()

    async def freeze(self, level: int) -> None:
        """Put the server to sleep as `sleep` does; it keeps its requests, unless its process is ended."""
        server = self._server
        await self._put_to_sleep(level, server.freeze if isinstance(server, FreezingBackend) else server.sleep)

    async def _put_to_sleep(self, level: int, put_to_sleep: Callable[[int], Awaitable[None]]) -> None:
        if level >= STOP_LEVEL:
            await self.stop()
        elif self._process.running:
            try:
                await put_to_sleep(level)
            except _GONE as exc:
                logger.warning(
                    "the model %r does not fall asleep any more, what is left of it is ended: %s", self._process.model, exc
                )
                await self._process.kill()
        else:
            await self.stop()

    async def wake(self) -> None:
        """Wake the server, or start its process. Raises `BackendStartError` if that does not come up.

        A server that turns out to be gone is ended; the next call starts it.
        """
        if self._process.running:
            try:
                await self._server.wake()
            except _GONE:
                await self._process.kill()
                raise
        else:
            await self._start()

    async def ready(self) -> None:
        """Return as soon as the server takes requests."""
        await self._server.ready()

    async def stop(self) -> None:
        """End the process and all that it has started, by SIGTERM and after `timeouts.stop` by SIGKILL."""
        self._stops += 1
        await self._process.stop()
        await self._server.aclose()

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts
        self._process.grace = timeouts.stop
        if isinstance(self._server, TunableBackend):
            self._server.retune(timeouts, freezes=freezes)

    async def aclose(self) -> None:
        """End the process and close connections."""
        await self.stop()

    async def _start(self) -> None:
        stops = self._stops
        await self._process.stop()  # what is left of the one before
        if await self._somebody_listens():
            raise BackendStartError(
                f"{self}: the process of the model {self._process.model!r} is not started, because another one listens there "
                "already. End that, or choose another port."
            )
        if self._stops != stops:
            raise BackendStartError(
                f"{self}: the process of the model {self._process.model!r} was stopped before it was started"
            )
        self._process.start()
        try:
            with anyio.fail_after(self._timeouts.start):
                await self._come_up()
        except TimeoutError:
            what = f"was not ready in {self._timeouts.start:.3g} s"
        except BackendUnsupportedError:
            await self._process.stop()
            raise
        except BackendUnreachableError:
            what = "ended before it was ready"
        except BackendDeadError:
            what = "has lost its engine before it was ready"
        except BaseException:
            await self._process.kill()
            raise
        else:
            return
        await self._process.read_to_the_end()
        ending = self._process.how_it_ended()
        await self._process.kill()
        raise BackendStartError(f"{self}: the process of the model {self._process.model!r} {what}: {ending}")

    async def _come_up(self) -> None:
        pause = POLL_FIRST
        while True:
            if not self._process.running:
                raise BackendUnreachableError(f"{self}: the process has ended")
            try:
                state = await self._server.state()
            except (BackendUnsupportedError, BackendDeadError):
                raise
            except BackendError:
                state = BackendState.UNREACHABLE  # not up yet
            if state is BackendState.AWAKE and self._process.running:
                return
            if state is BackendState.ASLEEP:  # a command may start it asleep
                await self._server.wake()
                return
            await anyio.sleep(pause)
            pause = min(2 * pause, POLL_LONGEST)

    async def _somebody_listens(self) -> bool:
        host, port = self._address
        try:
            with anyio.fail_after(self._timeouts.connect):
                async with await anyio.connect_tcp(host, port):
                    return True
        except (OSError, TimeoutError):
            return False
