"""Starts and stops real vLLM servers on the CPU.

Linux only: processes are found through `/proc`, as the test suite's environment has no psutil.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["GroupMember", "RealServer", "RealServerError", "free_port", "group_members", "leader_on"]

_HOST = "127.0.0.1"

# On the CPU no memory is freed by /sleep, but the routes and the state machine are the real ones.
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # One thread a server and no pinning: two servers and the tests share a small machine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}

_POLL_SECONDS = 0.1
_ENGINE_NICENESS = 5


class RealServerError(RuntimeError):
    """A server did not start, or did not stop. The message ends with the tail of the server's output."""


@dataclass(frozen=True)
class GroupMember:
    """A living process of a server's process group. `title` is its command line, or what vLLM renamed it to."""

    pid: int
    title: str


class RealServer:
    """A vLLM OpenAI-compatible server in a process group of its own, on a free loopback port.

    `start` returns at once, so that several servers can start side by side; `wait_ready` waits. After `stop`, `start`
    may be called again: the server comes back on the same port. Not safe for use from several threads.

    Args:
        name: the model name that clients must send.
        model: the model's folder.
        interpreter: the vLLM environment's Python.
        log: the file that takes the server's output; a restart appends to it.
        arguments: further command line arguments, for example `("--max-num-seqs", "1")`.
    """

    def __init__(self, name: str, model: Path, interpreter: Path, log: Path, arguments: tuple[str, ...] = ()) -> None:
        self.name = name
        self.model = model
        self.log = log
        self.port = free_port()
        self._interpreter = interpreter
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's base URL, without a trailing slash and without `/v1`."""
        return f"http://{_HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The process that listens; it leads the group, so this is the process group's id too.

        Raises:
            RealServerError: the server was not started, or was stopped.
        """
        if self._process is None:
            raise RealServerError(f"the vLLM server {self.name!r} is not started")
        return self._process.pid

    @property
    def engine_pid(self) -> int:
        """The EngineCore process, a child of `pid` that schedules the requests; tests kill it to see an engine die.

        Raises:
            RealServerError: there is none: not started, not there yet, or dead.
        """
        for member in self.members():
            if "EngineCore" in member.title:
                return member.pid
        raise RealServerError(f"the vLLM server {self.name!r} has no EngineCore process{self._tail()}")

    def members(self) -> list[GroupMember]:
        """The living processes of the server's group: the API server, EngineCore, Worker, a resource tracker."""
        return group_members(self.pid)

    def managed(self, name: str, **env: str) -> dict[str, Any]:
        """What a gateway needs to start another server for the same model by itself, as a part of its configuration.

        `name` is what that server calls the model. The development mode is left to the gateway. `env` is added.
        """
        inherited = {key: value for key, value in _ENVIRONMENT.items() if key != "VLLM_SERVER_DEV_MODE"}
        # An engine that is forked need not import everything anew: a third less time to start.
        quick = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
        return {
            "command": self._command(name, "{port}"),
            "env": {**inherited, **quick, "PYTHONPATH": "", **env},
            "cwd": str(self.log.parent),
        }

    def start(self) -> None:
        """Start the server's processes; returns at once. `wait_ready` tells when it serves.

        Raises:
            RealServerError: it is started already.
        """
        if self._process is not None:
            raise RealServerError(f"the vLLM server {self.name!r} is started already")
        # The tests' own import path must not shadow modules of vLLM's environment.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | _ENVIRONMENT
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(self.name, str(self.port)),
                # `python -m` puts the working directory on the import path: not the repository, but an inert folder.
                cwd=self.log.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # Kills the group when this process's end of the pipe closes: however the tests die (even by SIGKILL), no
        # server outlives them.
        self._guardian = subprocess.Popen(
            ["/bin/sh", "-c", f"read _; kill -s KILL -- -{self._process.pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_ready(self, timeout: float = 240.0) -> None:
        """Wait until `/health` answers 200, at most `timeout` seconds. Blocks the thread.

        Raises:
            RealServerError: the process died, or the time is up. The server is left as it is: call `stop`.
        """
        if self._process is None:
            raise RealServerError(f"the vLLM server {self.name!r} is not started")
        deadline = time.monotonic() + timeout
        while True:
            # Looks without reaping: a reaped leader's id, and with it the group's, could be given to another process.
            exited = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if exited is not None:
                raise RealServerError(
                    f"the vLLM server {self.name!r} died at start-up (status {exited.si_status}){self._tail()}"
                )
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.call("GET", "/health", timeout=2.0)[0] == 200:
                    # On a busy machine the API server falls behind its engine and answers, control calls too, when that is
                    # idle again: too late to catch a stream in its middle.
                    os.setpriority(os.PRIO_PROCESS, self.engine_pid, _ENGINE_NICENESS)
                    return
            if time.monotonic() > deadline:
                raise RealServerError(f"the vLLM server {self.name!r} was not ready in {timeout:g} s{self._tail()}")
            time.sleep(_POLL_SECONDS)

    def call(self, method: str, path: str, body: bytes | None = None, timeout: float = 30.0) -> tuple[int, bytes]:
        """One request straight to the server, past any gateway: its status and body. A body is sent as JSON.

        Raises:
            OSError: nothing listens, or no answer came within `timeout` seconds.
        """
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, {"content-type": "application/json"} if body is not None else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stop(self, grace: float = 20.0) -> None:
        """Stop every process of the server: SIGTERM, after `grace` seconds SIGKILL. Does nothing if not started.

        Raises:
            RealServerError: a process survived even SIGKILL for 10 s.
        """
        if self._process is None:
            return
        try:
            self._signal(signal.SIGTERM)
            if not self._wait_gone(grace):
                self._signal(signal.SIGKILL)
                if not self._wait_gone(10.0):
                    raise RealServerError(
                        f"processes of the vLLM server {self.name!r} survive SIGKILL: {self.members()}{self._tail()}"
                    )
        finally:
            self._dismiss_guardian()
        self._process.wait()
        self._process = None

    def _command(self, name: str, port: str) -> list[str]:
        return [
            str(self._interpreter), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", name, "--host", _HOST, "--port", port,
            "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--max-num-seqs", "16", *self._arguments,
        ]  # fmt: skip

    def _signal(self, number: signal.Signals) -> None:
        # The group's id cannot belong to strangers: its leader is not reaped before the group is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _wait_gone(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _dismiss_guardian(self) -> None:
        if self._guardian is not None:
            # Killed before its pipe is closed, or it would fire at a process group id that may be reused by then.
            self._guardian.kill()
            self._guardian.communicate()
            self._guardian = None

    def _tail(self) -> str:
        try:
            output = self.log.read_bytes()
        except OSError:
            return ""
        return f"\n--- end of {self.log} ---\n{output[-6000:].decode(errors='replace')}"


def group_members(group: int) -> list[GroupMember]:
    """The living processes of a process group."""
    return [member for group_id, member in _processes() if group_id == group]


def leader_on(port: int) -> int | None:
    """The id of the API server, whoever has started it, that was told to listen on `port`; its group has the same id."""
    for group, member in _processes():
        if member.pid == group and member.title.find(f" --port {port} ") > 0 and "_guardian.py" not in member.title:
            return group
    return None


def _processes() -> list[tuple[int, GroupMember]]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # `pid (name) state ppid pgrp …`, where the name may hold spaces and parentheses.
            state, _, pgrp = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state in "ZX":
                continue  # a zombie is dead, it only waits for its parent
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # ended while it was looked at
        found.append((int(pgrp), GroupMember(int(entry.name), title)))
    return sorted(found, key=lambda each: each[1].pid)


def free_port() -> int:
    """A port that nothing listens on."""
    # Below Linux's range for outgoing connections, one of which could otherwise take the port during the many seconds
    # that vLLM needs before it listens.
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            return port
