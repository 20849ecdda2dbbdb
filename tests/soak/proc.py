"""Processes seen from outside, in `/proc`: what they use, and which of them a gateway has started."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Marked", "Usage", "identity", "is_listening", "marked_processes", "open_files", "send_signal", "usage"]

_TCP_STATES = {"01": "established", "04": "fin-wait-1", "05": "fin-wait-2", "08": "close-wait", "0A": "listens"}
Identity = tuple[int, str]
"""A process's number and start time: another process may get the same number later."""


@dataclass(frozen=True)
class Usage:
    """What a process uses now."""

    rss_mib: float
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Marked:
    """A process that a gateway has started: the guardian of a model's server, or the server."""

    identity: Identity
    role: Literal["guardian", "server"]
    command: str


def usage(pid: int) -> Usage:
    """Measure a process of this user."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (only their number)
    return Usage(int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"]))


def open_files(pid: int) -> list[str]:
    """What a process has open, connections with their ports and state, for an error message."""
    connections = {}
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(address.partition(":")[2], 16) for address in fields[1:3])
        connections[f"socket:[{fields[9]}]"] = f"{local}->{remote} {_TCP_STATES.get(fields[3], fields[3])}"
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            target = os.readlink(entry)  # noqa: PTH115 (not a path)
            found.append(connections.get(target, target))
    return sorted(found)


def identity(pid: int) -> Identity | None:
    """Return who has the number `pid` now, `None` if nobody has, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else (pid, fields[19])


def marked_processes(gateway: int) -> list[Marked]:
    """The living processes that bear the mark of the gateway with this process number."""
    mark = f"LLMUX_ASGI_GATEWAY={gateway}:"
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(pair.startswith(mark) for pair in (entry / "environ").read_text(errors="replace").split("\0")):
                command = (entry / "cmdline").read_text(errors="replace").replace("\0", " ")
                if (who := identity(int(entry.name))) is not None:
                    found.append(Marked(who, "guardian" if "_guardian.py" in command else "server", command))
    return found


def send_signal(who: Identity, number: signal.Signals) -> bool:
    """Send a signal if the process still is the same one; returns whether it was."""
    if identity(who[0]) != who:
        return False
    with suppress(ProcessLookupError):
        os.kill(who[0], number)
        return True
    return False


def is_listening(port: int) -> bool:
    """Say whether something accepts connections at this port of 127.0.0.1."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
