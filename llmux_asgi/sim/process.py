"""Start simulated servers as processes of their own, from tests, demos and examples."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.request import Request, urlopen

import msgspec

from .options import SimOptions, SimState

__all__ = ["SimError", "SimProcess", "start_sim", "start_sims"]

_STOP_SECONDS = 5.0


def _search_path() -> list[str]:
    """Where the child finds this package, wherever the parent runs and however it was imported."""
    return [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]


class SimError(Exception):
    """A simulated server did not start; the message has what it wrote."""


class SimProcess:
    """A running simulated server. A context manager that stops it; made by `start_sim`."""

    def __init__(self, options: SimOptions) -> None:
        self.options = msgspec.structs.replace(options, exit_with_stdin=True)
        self.url = ""
        """`http://HOST:PORT`, without a slash at the end; empty until `wait_ready` has returned."""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter and module)
            [sys.executable, "-m", "llmux_asgi.sim", msgspec.json.encode(self.options).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in _search_path() if path)},
        )

    @property
    def name(self) -> str:
        """The served model's name."""
        return self.options.name

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.poll()

    def wait_ready(self, timeout: float = 20.0) -> None:
        """Wait until the server listens, `timeout` seconds at most. Raises `SimError`, the process being gone."""
        assert self._process.stdout is not None  # noqa: S101 (for the type)
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
                self._fail(f"not ready after {timeout} s")
            chunk = os.read(descriptor, 4096)
            if not chunk:
                self._process.wait(_STOP_SECONDS)
                self._fail(f"ended with status {self._process.returncode}")
            line += chunk
        self.url = line.decode().rpartition(" ")[2].strip()

    def _fail(self, what: str) -> None:
        self._errors.seek(0)
        written = self._errors.read().decode(errors="replace").strip()
        self.kill()
        raise SimError(f"simulated server {self.name}: {what}: {written}")

    def wait(self, timeout: float = _STOP_SECONDS) -> int:
        """Wait for the process to end by itself, `timeout` seconds at most; return its status."""
        return self._process.wait(timeout)

    def stop(self) -> None:
        """End it with SIGTERM, after 5 s with SIGKILL. May be called again."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._close()

    def kill(self) -> None:
        """End it with SIGKILL, as an out-of-memory killer does. May be called again."""
        self._process.kill()
        self._close()

    def _close(self) -> None:
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def state(self) -> SimState:
        """Counters and state, read from `/sim/state`."""
        return msgspec.json.decode(self._call("GET", "/sim/state"), type=SimState)

    def add_faults(self, *specs: str) -> None:
        """Add faults (`llmux_asgi.sim.faults`), counted from the next call on."""
        self._call("POST", "/sim/faults", msgspec.json.encode({"faults": specs}))

    def clear_faults(self) -> None:
        """Drop all faults that have not struck yet."""
        self._call("DELETE", "/sim/faults")

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = Request(self.url + path, data=body, method=method)  # noqa: S310 (http only, by construction)
        with urlopen(request, timeout=10) as response:  # noqa: S310
            content: bytes = response.read()
        return content

    def __enter__(self) -> SimProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start_sim(name: str, **options: Any) -> SimProcess:
    """Start a server and wait until it is ready. `options` are those of `SimOptions`.

    Raises `SimError` if it does not start, `msgspec.ValidationError` for a wrong option.
    """
    process = SimProcess(msgspec.convert({"name": name, **options}, SimOptions))
    process.wait_ready()
    return process


@contextmanager
def start_sims(*options: SimOptions) -> Iterator[list[SimProcess]]:
    """Start several servers at once, wait for all, and stop them at the end. Raises `SimError`."""
    with ExitStack() as stack:
        processes = [stack.enter_context(SimProcess(each)) for each in options]
        for process in processes:
            process.wait_ready()
        yield processes
