"""Start a gateway as a process of its own, so that it can be measured from outside, killed, and outlived."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.serve import EventLoop

__all__ = ["CLOSE", "GatewayProcess", "failed_start", "gateway_process"]

CLOSE = {"connection": "close"}
"""For requests that must leave nothing open: hypercorn on trio keeps a connection that its client has closed for 5 s."""

_START_SECONDS = 30.0
_ROOT = Path(__file__).resolve().parents[2]


class GatewayProcess:
    """A gateway that runs. `url` is the host's root; OpenAI's API is below `url + "/llm/v1"`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.url = self._wait_ready()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has logged so far, from INFO on, and whatever else it wrote to standard error."""
        return self._log.read_text(errors="replace")

    def statistics(self) -> dict[str, Any]:
        """The switcher's statistics as they are now."""
        answer = httpx.get(f"{self.url}/statistics", headers=CLOSE, timeout=10, trust_env=False).raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal. SIGTERM ends it in order."""
        self._process.send_signal(number)

    def poll(self) -> int | None:
        """The exit status, `None` while it runs."""
        return self._process.poll()

    def wait(self, timeout: float = 30.0) -> int:
        """Wait for its end and return the exit status, -N if a signal ended it. Raises `subprocess.TimeoutExpired`."""
        return self._process.wait(timeout)

    def _wait_ready(self) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + _START_SECONDS
        line = b""
        while not line.endswith(b"\n"):
            readable = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            chunk = self._process.stdout.read1(4096) if readable else b""  # type: ignore[attr-defined]
            assert chunk, f"the gateway did not start: {self.log}"
            line += chunk
        return line.decode().split()[1]


@contextmanager
def gateway_process(
    config: Mapping[str, Any],
    loop: EventLoop = "asyncio",
    ledger: str | Path | None = None,
    *,
    host: str = "tests.support.host",
    environment: Mapping[str, str] | None = None,
) -> Iterator[GatewayProcess]:
    """Start a gateway, wait until it listens, and end it with the block: by SIGTERM, by SIGKILL if that takes too long.

    `host` is the module that is run, with the arguments of `tests.support.host`; `environment` is added to this process's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "config.json"), Path(folder, "log")
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", host, str(path), loop, *(["--ledger", str(ledger)] if ledger else [])]
        env = {**os.environ, **(environment or {})}
        with log.open("wb") as stderr:
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            process = subprocess.Popen(command, cwd=_ROOT, env=env, stdin=nothing, stdout=pipe, stderr=stderr)
        try:
            yield GatewayProcess(process, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def failed_start(config: Mapping[str, Any], loop: EventLoop) -> tuple[int, str]:
    """Start a gateway that must not come up. Returns its exit status and its log. Raises `subprocess.TimeoutExpired`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "tests.support.host", str(path), loop]
        done = subprocess.run(command, cwd=_ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=_START_SECONDS)
        return done.returncode, done.stderr.decode(errors="replace")
