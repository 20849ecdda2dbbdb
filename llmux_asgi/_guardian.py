"""Runs one command and sees to it that nothing of it is left over. A program of its own.

    python -I -S _guardian.py GRACE COMMAND…

The gateway holds the other end of this process's standard input. When something comes from there, or it closes, because
the gateway wants it or because the gateway is gone, however it ended, the command's process group is asked to end, and
killed GRACE seconds later. When the command ends by itself, what it has started is killed at once. This process ends last:
by then everything is gone. Its exit status is the command's, 128 + N if that was ended by the signal N, 127 if it could
not be run.

It needs nothing but the standard library, so that it takes little time and memory.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress

__all__ = ["main"]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_SECONDS = 0.01
_LOOK_SECONDS = 1.0
"""Between two looks whether the gateway still is this process's parent."""


def main() -> int:
    """Run the command of the arguments. After a fault of its own it ends by SIGKILL: the gateway then looks what is left."""
    try:
        return _guard(float(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        os.kill(os.getpid(), signal.SIGKILL)
        raise


def _guard(grace: float, command: list[str]) -> int:
    gateway = os.getppid()
    # These come from a terminal or a service manager, to everybody at once: the gateway decides, by standard input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the command leaves behind becomes a child of this process
    wakeup, ring = os.pipe()
    os.set_blocking(ring, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        # Without threads here, preexec_fn is safe. The command's own process dies with this one; the rest of it is found
        # by its mark at the gateway's next start.
        child = subprocess.Popen(  # noqa: S603 (the command of the gateway's configuration)
            command,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except (OSError, ValueError) as exc:
        sys.stderr.write(f"cannot run {command[0]!r}: {exc}\n")
        return 127
    os.set_blocking(0, False)
    deadline = _wait(child, wakeup, grace, gateway)
    _end_the_rest(child.pid, deadline)
    status = child.returncode
    return 128 - status if status < 0 else status


def _wait(child: subprocess.Popen[bytes], wakeup: int, grace: float, gateway: int) -> float:
    """Wait for the command, and end it when standard input closes. Returns until when the rest of it may go on."""
    deadline = None
    while child.poll() is None:
        _reap_strays(child.pid)
        left = _LOOK_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
        watched = [wakeup] if deadline is not None else [wakeup, 0]
        ready = select.select(watched, [], [], left)[0]
        if wakeup in ready:
            os.read(wakeup, 4096)
        # A process that the gateway has forked may hold the pipe open for longer than the gateway lives, or wants it open.
        if deadline is None and (0 in ready or os.getppid() != gateway):
            deadline = time.monotonic() + grace
            _signal(child.pid, signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline:
            _signal(child.pid, signal.SIGKILL)
            child.wait()
    return deadline if deadline is not None else time.monotonic()


def _reap_strays(child: int) -> None:
    """Collect what has ended of the orphans that became this process's children; not the command itself."""
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != child:
            os.waitpid(ended.si_pid, os.WNOHANG)


def _end_the_rest(group: int, deadline: float) -> None:
    while True:
        if time.monotonic() >= deadline:
            _signal(group, signal.SIGKILL)
            for pid in _children():  # those that have left the group
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            if not _signal(group, 0):
                return
        time.sleep(_POLL_SECONDS)


def _signal(group: int, number: int) -> bool:
    """Send a signal to a process group; returns whether there is one."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs as another user by now: the gateway will say that it cannot be ended
        return True
    return True


def _children() -> Iterator[int]:
    """This process's children, as far as /proc tells."""
    me = str(os.getpid())
    try:
        entries = os.listdir("/proc")  # noqa: PTH208 (pathlib takes long to import)
    except OSError:
        return
    for entry in entries:
        if entry.isdecimal():
            with suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                if file.read().rpartition(b")")[2].split()[1].decode() == me:
                    yield int(entry)


if __name__ == "__main__":
    raise SystemExit(main())
