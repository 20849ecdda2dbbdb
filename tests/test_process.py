"""The gateway's own processes and their guardians: real ones, small Python programs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest

from llmux_asgi._process import ServerProcess, clear_leftovers, processes_of
from llmux_asgi.exceptions import BackendStartError
from tests.support.eventually import eventually

pytestmark = pytest.mark.anyio

SLEEP = "import time; time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
CHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEP}'], start_new_session={{new_session}});"
SAY = "print('up', flush=True);"


@asynccontextmanager
async def running(
    code: str, *, grace: float = 5.0, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> AsyncIterator[ServerProcess]:
    """Run a program until it says `up`; afterwards nothing of it is left."""
    process = ServerProcess("m", [sys.executable, "-c", code], env=env or {}, cwd=cwd, grace=grace)
    with anyio.fail_after(20):
        process.start()
        eventually("it is up", lambda: "up" in process.how_it_ended())
        yield process
        await process.stop()
    assert not process.running
    assert processes_of(os.getpid()) == []


def guardian() -> int:
    return next(p for p in processes_of(os.getpid()) if f" {os.getpid()} " in Path(f"/proc/{p}/stat").read_text())


async def test_a_program_is_asked_to_end_and_may_do_it_in_its_own_time() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(7)));"
    async with running(code + SAY + "time.sleep(600)") as process:
        guard = process._guardian
        await process.stop()
        assert guard is not None
        assert guard.returncode == 7
        eventually("the last words are read", lambda: "bye" in process.how_it_ended())


async def test_one_that_does_not_end_is_killed_after_the_grace_period() -> None:
    async with running(STUBBORN + SAY + SLEEP, grace=0.1) as process:
        guard = process._guardian
        await process.stop()
        assert guard is not None
        assert guard.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("new_session", [False, True])
async def test_what_it_has_started_ends_with_it_in_its_group_or_not(new_session: bool) -> None:
    async with running(CHILD.format(new_session=new_session) + SAY + SLEEP, grace=0.2):
        eventually("guardian, program and child", lambda: len(processes_of(os.getpid())) == 3)


async def test_what_it_has_started_ends_when_it_dies_itself() -> None:
    async with running(CHILD.format(new_session=False) + SAY + "raise SystemExit(3)") as process:
        eventually("all of it has ended", lambda: not process.running)
        assert processes_of(os.getpid()) == []
        assert "exit status 3" in process.how_it_ended()


async def test_kill_does_not_wait_for_the_grace_period() -> None:
    async with running(STUBBORN + CHILD.format(new_session=True) + SAY + SLEEP, grace=600) as process:
        await process.kill()
        assert not process.running


async def test_nothing_outlives_a_guardian_that_is_killed() -> None:
    async with running(STUBBORN + CHILD.format(new_session=True) + SAY + SLEEP) as process:
        os.kill(guardian(), signal.SIGKILL)
        eventually("the guardian is gone", lambda: not process.running)


async def test_a_fork_of_the_gateway_that_holds_the_pipe_open_delays_nothing() -> None:
    async with running(SAY + SLEEP, grace=600) as process:
        guard = process._guardian
        assert guard is not None
        assert guard.stdin is not None
        held = os.dup(guard.stdin.fileno())
        await process.stop()
        os.close(held)
        assert guard.returncode == 128 + signal.SIGTERM


async def test_signals_to_the_guardian_are_not_its_business() -> None:
    async with running(SAY + SLEEP) as process:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(guardian(), number)
        os.kill(guardian(), 0)
        assert process.running


async def test_its_environment_and_folder_are_what_was_said_and_its_output_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code = "import os; print(os.environ['COLOUR'], os.getcwd()); print('x' * 40000);" + SAY + SLEEP
    async with running(code, env={"COLOUR": "blue"}, cwd=str(tmp_path)):
        pass
    lines = [record for record in caplog.records if record.name == "llmux_asgi.vllm"]
    assert lines[0].getMessage() == f"[m] blue {tmp_path}"
    assert lines[0].llmux_model == "m"  # type: ignore[attr-defined]
    assert [len(record.getMessage()) for record in lines[1:4]] == [16388, 16388, 7236]  # a long line comes in parts


async def test_it_may_be_started_again() -> None:
    async with running(SAY + SLEEP) as process:
        await process.stop()
        await process.stop()
        process.start()
        assert process.running


async def test_a_folder_that_does_not_exist_is_told() -> None:
    process = ServerProcess("m", ["true"], env={}, cwd="/no/such/folder")
    with pytest.raises(BackendStartError, match=r"process of the model 'm' cannot be started: .*/no/such/folder"):
        process.start()
    assert not process.running


GATEWAY = """
import sys, time
from llmux_asgi._process import ServerProcess
process = ServerProcess("m", [sys.executable, "-c", sys.argv[1]], env={}, grace=float(sys.argv[2]))
process.start()
while "up" not in process.how_it_ended():
    time.sleep(0.005)
print("ready", flush=True)
time.sleep(600)
"""


def killed_gateway(code: str, *, grace: float, guardian_too: bool) -> int:
    """Start a gateway with a process of its own and kill it; returns its process id."""
    gateway = subprocess.Popen([sys.executable, "-c", GATEWAY, code, str(grace)], stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    with gateway.stdout as output:
        assert output.readline() == "ready\n"
    own = processes_of(gateway.pid)
    guards = [pid for pid in own if f" {gateway.pid} " in Path(f"/proc/{pid}/stat").read_text()]
    assert len(guards) == 1
    assert len(own) > 1
    for pid in (gateway.pid, *(guards if guardian_too else [])):
        os.kill(pid, signal.SIGKILL)
    gateway.wait()
    return gateway.pid


async def test_a_gateway_that_is_killed_leaves_nothing_behind() -> None:
    gone = killed_gateway(CHILD.format(new_session=True) + SAY + SLEEP, grace=5, guardian_too=False)
    eventually("everything has ended", lambda: processes_of(gone) == [])


async def test_the_next_gateway_ends_what_is_left_if_the_guardian_was_killed_too() -> None:
    gone = killed_gateway(STUBBORN + CHILD.format(new_session=True) + SAY + SLEEP, grace=600, guardian_too=True)
    assert processes_of(gone)  # the child of the child
    await clear_leftovers(0)
    assert processes_of(gone) == []


async def test_the_next_gateway_waits_for_a_guardian_that_is_at_it() -> None:
    gone = killed_gateway(STUBBORN + SAY + SLEEP, grace=0.3, guardian_too=False)
    await clear_leftovers(20)
    assert processes_of(gone) == []


@contextmanager
def marked(gateway: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says to be of this gateway; `{gone}` stands for a process that has ended."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    mark = gateway.format(gone=gone.pid, me=os.getpid(), start=start, namespace=Path("/proc/self/ns/pid").readlink())
    with subprocess.Popen(["sleep", "600"], env={**os.environ, "LLMUX_ASGI_GATEWAY": mark}) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("gateway", "is_left"),
    [
        ("{gone}/1/{namespace}/x", True),
        ("{me}/1/{namespace}/x", True),  # an earlier process that had this one's number
        ("{gone}/1/pid:[1]/x", False),  # of another container
        ("{me}/{start}/{namespace}/x", True),  # of the program that this process ran before it ran this one
        ("nonsense", False),
        ("", False),
    ],
)
async def test_only_what_a_gateway_of_this_pid_namespace_has_left_is_ended(gateway: str, is_left: bool) -> None:
    with marked(gateway) as process:
        await clear_leftovers(0)
        eventually("it is killed or not", lambda: (process.poll() is None) != is_left)


async def test_the_processes_of_a_living_gateway_are_left_alone() -> None:
    async with running(SAY + SLEEP) as process:
        await clear_leftovers(0)
        assert process.running
