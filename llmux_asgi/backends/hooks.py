"""Commands in place of a sleep API: for `docker start` and `docker stop`, systemd units, or a script of one's own."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO

import anyio

from ..config import HooksConfig, TimeoutsConfig
from ..exceptions import BackendError, BackendTimeoutError
from ._http import POLL_FIRST, POLL_LONGEST
from ._protocol import BackendState

__all__ = ["HooksBackend"]

_AWAKE, _ASLEEP = 0, 1
_ALIVE_PAUSE = 0.5
"""Longest pause in seconds between two runs of `alive`."""
_KILL_SECONDS = 5.0
"""How long a killed hook is waited for: one that hangs in a driver does not end even so."""
_TAIL_LINES, _TAIL_CHARS = 20, 2000


class HooksBackend:
    """Controls the server of `model` at `url` by the commands in `hooks`.

    A hook runs without a shell, in a process group of its own, with `LLMUX_MODEL`, `LLMUX_URL` and, for `sleep`,
    `LLMUX_SLEEP_LEVEL` in its environment and nothing to read. It is over when its process ends, whatever it has left
    running. One that exceeds its limit (`wake`, `sleep`, `probe` for `alive`) is killed with its process group.
    """

    def __init__(self, model: str, url: str, hooks: HooksConfig, timeouts: TimeoutsConfig | None = None) -> None:
        self.model = model
        self.url = url.rstrip("/")
        self._hooks = hooks
        self._timeouts = timeouts or TimeoutsConfig()

    def __str__(self) -> str:
        return self.url

    async def state(self) -> BackendState:
        """Run `alive`: exit status 0 is awake, 1 asleep. Raises `BackendError` for any other."""
        status, output = await self._alive()
        if status not in (_AWAKE, _ASLEEP):
            raise BackendError(self._unknown(status, output))
        return BackendState.AWAKE if status == _AWAKE else BackendState.ASLEEP

    async def sleep(self, level: int) -> None:
        """Run `sleep`, and `alive` to confirm it."""
        await self._run_to_success("sleep", self._hooks.sleep, self._timeouts.sleep, {"LLMUX_SLEEP_LEVEL": str(level)})
        if await self.state() is not BackendState.ASLEEP:
            raise BackendError(
                f"{self.url}: the hook 'sleep' exited with 0 but 'alive' exits with 0 too, which means awake. Let 'sleep' "
                "return when the model is out of memory, and 'alive' exit with 1 from then on."
            )

    async def wake(self) -> None:
        """Run `wake`."""
        await self._run_to_success("wake", self._hooks.wake, self._timeouts.wake)

    async def ready(self) -> None:
        """Run `alive` until it says awake. A status that means nothing is taken for "not yet"."""
        status, output = _ASLEEP, ""
        pause = POLL_LONGEST
        with anyio.move_on_after(self._timeouts.wake):
            while True:
                status, output = await self._alive()
                if status == _AWAKE:
                    return
                await anyio.sleep(pause)
                pause = min(2 * pause, _ALIVE_PAUSE)
        last = "it says asleep (exit status 1)" if status == _ASLEEP else self._unknown(status, output)
        raise BackendTimeoutError(
            f"{self.url}: the hook 'alive' did not say awake within {self._timeouts.wake:.3g} s of the wake: {last}"
        )

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts

    async def aclose(self) -> None:
        """Do nothing: no connection is kept."""

    async def _alive(self) -> tuple[int, str]:
        return await self._run("alive", self._hooks.alive, self._timeouts.probe, {})

    async def _run_to_success(
        self, name: str, command: tuple[str, ...], seconds: float, variables: dict[str, str] | None = None
    ) -> None:
        status, output = await self._run(name, command, seconds, variables or {})
        if status:
            raise BackendError(f"{self.url}: the hook {name!r} failed: {_describe(status, output)}")

    def _unknown(self, status: int, output: str) -> str:
        return f"{self.url}: the hook 'alive' gives no clear answer (0 is awake, 1 asleep): {_describe(status, output)}"

    async def _run(self, name: str, command: tuple[str, ...], seconds: float, variables: dict[str, str]) -> tuple[int, str]:
        """Run one hook and return its exit status and the end of what it wrote."""
        environment = {**os.environ, "LLMUX_MODEL": self.model, "LLMUX_URL": self.url, **variables}
        # Into a file, not a pipe: a server that the hook leaves running keeps its end of a pipe open.
        with tempfile.TemporaryFile() as output:
            try:
                process = _start(command, environment, output)
            except (OSError, ValueError) as exc:
                reason = exc.strerror if isinstance(exc, OSError) else exc
                raise BackendError(f"{self.url}: the hook {name!r} cannot be run: {command[0]}: {reason}") from exc
            status: int | None = None
            try:
                with anyio.move_on_after(seconds):
                    status = await _ended(process)
            finally:
                if process.returncode is None:
                    await _kill(process)
            tail = _tail(output)
        if status is None:
            written = f" It wrote: {tail}" if tail else ""
            raise BackendTimeoutError(
                f"{self.url}: the hook {name!r} took longer than {seconds:.3g} s and was killed.{written}"
            )
        return status, tail


def _start(command: tuple[str, ...], environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 (the user's own command, without a shell)
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status. Asked for again and again: that works on any event loop, in any thread."""
    pause = POLL_FIRST
    while (status := process.poll()) is None:
        await anyio.sleep(pause)
        pause = min(2 * pause, POLL_LONGEST)
    return status


async def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group. Its leader has not been waited for, so its number cannot be another group's by now."""
    with suppress(ProcessLookupError, PermissionError):  # it has ended already, or is another user's (sudo)
        os.killpg(process.pid, signal.SIGKILL)
    with anyio.move_on_after(_KILL_SECONDS, shield=True):
        await _ended(process)


def _describe(status: int, output: str) -> str:
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how}. It wrote: {output}" if output else f"{how}, and it wrote nothing"


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4 * _TAIL_CHARS))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_CHARS:]
