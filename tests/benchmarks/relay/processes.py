"""Processes that are pinned to a core, and what Linux says of their time and memory."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.relay.wire import body_of, request

__all__ = ["busy_seconds", "cores", "cpu_seconds", "free_port", "many_files", "memory", "pinned", "started", "wait_ready"]

_ROOT = Path(__file__).resolve().parents[3]
_TICK = os.sysconf("SC_CLK_TCK")
_START_SECONDS = 60.0


def cores() -> tuple[int, int]:
    """The core of upstream and load, and the one of the candidate: two, if this process may use two."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]


def many_files() -> None:
    """Let this process and those that it starts open as many files as the system allows: 1,000 streams need two each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pinned(command: Sequence[str], core: int) -> list[str]:
    """The command on one core."""
    return ["taskset", "-c", str(core), *command]


@contextmanager
def started(command: Sequence[str], core: int, log: Path) -> Iterator[int]:
    """Start a process on one core and yield its id; end it with the block, by SIGKILL if SIGTERM takes 5 s."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            pinned(command, core), cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_ready(port: int, pid: int, log: Path) -> None:
    """Wait until a plain request is answered in full. Raises `RuntimeError` if that takes too long or the process has ended."""
    wanted = body_of("plain", 0)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(request("plain", port))
                seen = b""
                while part := connection.recv(65536):
                    seen += part
                    if wanted in seen:
                        return
                    if b" 200 " not in seen[:20]:
                        break
        except OSError:
            pass
        if _state(pid) in ("Z", ""):
            break
        time.sleep(0.05)
    raise RuntimeError(f"no answer on port {port}: {log.read_text(errors='replace')[-2000:]}")


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU that a process and its living children have used."""
    return sum(sum(map(int, _stat(each)[11:13])) for each in _tree(pid)) / _TICK


def busy_seconds() -> float:
    """Seconds of CPU that all processes of this machine have used, and those that its host has taken away."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)
    user, nice, system, _, _, _, _, stolen = map(int, fields[1:9])
    return (user + nice + system + stolen) / _TICK


def memory(pid: int) -> tuple[float, float]:
    """Memory of a process and its living children in MB (10^6 bytes): resident now, and the sum of their peaks."""
    now = peak = 0
    for each in _tree(pid):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        now += int(status["VmRSS"].split()[0])
        peak += int(status["VmHWM"].split()[0])
    return now * 1024 / 1e6, peak * 1024 / 1e6


def _tree(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _stat(pid: int) -> list[str]:
    """The fields after the command's name: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _state(pid: int) -> str:
    try:
        return _stat(pid)[0]
    except OSError:
        return ""
