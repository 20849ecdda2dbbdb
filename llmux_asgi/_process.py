"""The processes that the gateway owns: started, watched, ended with everything that they have started themselves.

Each command runs under a guardian, `_guardian.py`, which outlives the gateway by as long as it takes to end the command. In
the environment of all that it starts is a mark that names the gateway. By it a later gateway finds what was left over if even
the guardian was killed. (Found in `/proc`: on Linux only.)
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import anyio
import anyio.to_thread

from .exceptions import BackendError, BackendStartError

__all__ = ["ServerProcess", "clear_leftovers", "processes_of"]

output = logging.getLogger("llmux_asgi.vllm")
"""What the servers write, line by line."""
logger = logging.getLogger(__name__)

_GATEWAY_MARK, _PROCESS_MARK = "LLMUX_ASGI_GATEWAY", "LLMUX_ASGI_PROCESS"
_TOKEN = uuid.uuid4().hex
"""Tells this program from one that the same process ran before it."""
_GUARDIAN = Path(__file__).with_name("_guardian.py")
_LAST_LINES = 30
_LONGEST_LINE = 16384
_POLL_FIRST, _POLL_LONGEST = 0.001, 0.05
_MARGIN = 5.0
"""Seconds that a guardian, or the kernel with a killed process, has beyond the grace period."""


class ServerProcess:
    """The process of one model's server. It may be started again after it has ended.

    `grace` is the time in seconds between asking it to end and killing it.
    """

    def __init__(
        self, model: str, command: Sequence[str], *, env: Mapping[str, str], cwd: str | None = None, grace: float = 10.0
    ) -> None:
        self.model = model
        self._command = list(command)
        self._env = dict(env)
        self._cwd = cwd
        self.grace = grace
        self._guardian: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)

    @property
    def running(self) -> bool:
        """Whether it runs, or anything of it is still being ended."""
        return self._guardian is not None and self._guardian.poll() is None

    def start(self) -> None:
        """Start the command, in a process group of its own; returns at once. Raises `BackendStartError`."""
        self._mark = uuid.uuid4().hex
        self._lines = deque(maxlen=_LAST_LINES)
        marks = {_GATEWAY_MARK: f"{_identity(os.getpid())}/{_TOKEN}", _PROCESS_MARK: self._mark}
        try:
            self._guardian = subprocess.Popen(  # noqa: S603 (our own program)
                [sys.executable, "-I", "-S", str(_GUARDIAN), str(self.grace), *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._env, **marks},
                cwd=self._cwd,
                start_new_session=True,  # Ctrl-C in the gateway's terminal is the gateway's business
            )
        except (OSError, ValueError) as exc:
            raise BackendStartError(f"the process of the model {self.model!r} cannot be started: {exc}") from exc
        logger.info("started the process of the model %r, guarded by process %d", self.model, self._guardian.pid)
        threading.Thread(target=self._read, args=(self._guardian,), name=f"output of {self.model}", daemon=True).start()

    async def stop(self) -> None:
        """Ask it to end, kill it after the grace period, and return once all of it is gone. May be called again.

        Raises `BackendError` if the kernel does not let it go.
        """
        await self._end(self.grace)

    async def kill(self) -> None:
        """As `stop`, without a grace period."""
        for pid in await _scan(self._is_mine):
            if self._guardian is None or pid != self._guardian.pid:
                _kill(pid)
        await self._end(0)

    async def _end(self, grace: float) -> None:
        guardian = self._guardian
        if guardian is None:
            return
        if guardian.stdin is not None and not guardian.stdin.closed:
            with suppress(OSError):  # it has ended already
                guardian.stdin.write(b"end")  # closing alone tells it nothing while a fork of the gateway holds the pipe
                guardian.stdin.flush()
            with suppress(OSError):
                guardian.stdin.close()
        deadline = time.monotonic() + grace + _MARGIN
        if not await _until(lambda: guardian.poll() is not None, deadline):
            guardian.kill()
            guardian.wait()
        if guardian.returncode < 0:  # it was killed, and has left the rest of it behind
            rest = await _end_all(lambda pid, environ: self._is_mine(pid, environ) or _session(pid) == guardian.pid, 0)
            if rest:
                raise BackendError(f"the processes {rest} of the model {self.model!r} cannot be killed")
        if self._guardian is guardian:  # two may have waited for its end
            self._guardian = None
            logger.info("the process of the model %r is gone (%s)", self.model, _describe(guardian.returncode))

    def how_it_ended(self) -> str:
        """Its exit status and the last lines that it wrote, for an error message."""
        status = self._guardian.poll() if self._guardian is not None else None
        lines = "\n".join(self._lines) or "(nothing)"
        return f"{'it is running' if status is None else _describe(status)}; its last lines:\n{lines}"

    async def read_to_the_end(self) -> None:
        """Let the reader catch up with what an ended process has written."""
        await _until(lambda: self._guardian is None or getattr(self._guardian.stdout, "closed", True), time.monotonic() + 1.0)

    def _is_mine(self, pid: int, environ: Mapping[str, str]) -> bool:
        return environ.get(_PROCESS_MARK) == self._mark

    def _read(self, guardian: subprocess.Popen[bytes]) -> None:
        if guardian.stdout is None:
            return
        lines = self._lines
        with guardian.stdout as pipe:
            while raw := pipe.readline(_LONGEST_LINE):
                line = raw.decode(errors="replace").rstrip()
                lines.append(line)
                with suppress(Exception):  # a handler of the host's that fails (disk full) must not block the server
                    output.info("[%s] %s", self.model, line, extra={"llmux_model": self.model})
        guardian.wait()


async def clear_leftovers(patience: float) -> None:
    """Wait until nothing is left of gateways that are gone; after `patience` seconds, kill it.

    Normally their guardians are at it, or have done it long since. Raises `BackendError` if something cannot be killed.
    """

    def is_left_over(pid: int, environ: Mapping[str, str]) -> bool:
        mark = environ.get(_GATEWAY_MARK, "")
        gateway, _, token = mark.rpartition("/")
        number, _, rest = gateway.partition("/")
        # In another container the same number is another process, and whether its gateway lives cannot be told from here.
        if not number.isdecimal() or rest.rpartition("/")[2] != _namespace():
            return False
        # This very process may have been another gateway, before it replaced its program (os.execv).
        return _identity(int(number)) != gateway or (int(number) == os.getpid() and token != _TOKEN)

    rest = await _end_all(is_left_over, patience)
    if rest:
        raise BackendError(f"processes that an earlier gateway has left over cannot be killed: {rest}")


def processes_of(gateway: int) -> list[int]:
    """The living processes that the gateway with this process id has started, their guardians included."""
    return _living(lambda pid, environ: environ.get(_GATEWAY_MARK, "").partition("/")[0] == str(gateway))


async def _until(condition: Callable[[], bool], deadline: float) -> bool:
    pause = _POLL_FIRST
    while not condition():
        if time.monotonic() >= deadline:
            return False
        await anyio.sleep(pause)
        pause = min(2 * pause, _POLL_LONGEST)
    return True


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


_Wanted: TypeAlias = Callable[[int, Mapping[str, str]], bool]
"""Says by its number and its marks whether a process is wanted."""


async def _end_all(wanted: _Wanted, patience: float) -> list[int]:
    """Wait until the wanted processes are gone; after `patience` seconds kill them. Returns those that are left even then."""
    deadline = time.monotonic() + patience
    # A process that is ending has no environment any more, while it still gives its memory back.
    seen: dict[int, str] = {}
    pause = _POLL_FIRST
    while True:
        seen |= {pid: _identity(pid) for pid in await _scan(wanted)}
        rest = [pid for pid, identity in seen.items() if not _is_dead(pid) and _identity(pid) == identity]
        if not rest or time.monotonic() >= deadline + _MARGIN:
            return rest
        if time.monotonic() >= deadline:
            logger.warning("killing processes that are left over: %s", rest)
            for pid in rest:
                _kill(pid)
        await anyio.sleep(pause)
        pause = min(2 * pause, _POLL_LONGEST)


async def _scan(wanted: _Wanted) -> list[int]:
    # In a thread: it takes 20 microseconds a process, and machines have thousands.
    return await anyio.to_thread.run_sync(_living, wanted)


def _living(wanted: _Wanted) -> list[int]:
    """The living processes that are wanted."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            raw = (entry / "environ").read_bytes()
        except OSError:
            raw = b""  # it has ended, or is somebody else's
        pairs = (pair.partition("=") for pair in raw.decode(errors="replace").split("\0")) if b"LLMUX_ASGI_" in raw else ()
        environ = {name: value for name, _, value in pairs if name in (_GATEWAY_MARK, _PROCESS_MARK)}
        if wanted(int(entry.name), environ) and not _is_dead(int(entry.name)):
            found.append(int(entry.name))
    return found


def _session(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[3]) if fields else 0


def _stat(pid: int, task: str | None = None) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on, or those of one thread; empty if there is no such process."""
    path = f"/proc/{pid}/stat" if task is None else f"/proc/{pid}/task/{task}/stat"
    try:
        return Path(path).read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _is_dead(pid: int) -> bool:
    """Whether all its threads have ended: the first one may be a zombie while others still hold what it had open."""
    try:
        tasks = [task.name for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return True
    return all(not (fields := _stat(pid, task)) or fields[0] in ("Z", "X") for task in tasks)


def _identity(pid: int) -> str:
    """`PID/START/NAMESPACE`: tells a process from a later one that has got the same number, and from those of containers."""
    fields = _stat(pid)
    return f"{pid}/{fields[19] if fields else ''}/{_namespace()}"


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _describe(status: int) -> str:
    number = status - 128 if status > 128 else -status
    with suppress(ValueError):
        return f"ended by {signal.Signals(number).name}"
    return f"exit status {status}"
