"""`HooksBackend`: real commands, each a small shell script."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import pytest

from llmux_asgi import (
    BackendError,
    BackendState,
    BackendTimeoutError,
    Config,
    FifoPolicy,
    HooksBackend,
    HooksConfig,
    LLMuxApp,
    ModelConfig,
    ModelSwitcher,
    TimeoutsConfig,
)
from llmux_asgi.backends import build_backend
from tests.gateway.scripts import echo
from tests.support.eventually import eventually
from tests.support.serve import EventLoop, serve
from tests.support.upstream import ScriptedServer

pytestmark = pytest.mark.anyio
URL = "http://127.0.0.1:9"
LONG = "sleep 600"
"""Seconds that no test waits for."""


class Scripts:
    """Writes the hooks of one model and makes its backend."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str, *, mode: int = 0o755) -> tuple[str, ...]:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\ncd {self.folder}\n{text}\n")
        path.chmod(mode)
        return (str(path),)

    def backend(
        self, *, wake: str = "", sleep: str = "", alive: str = "exit 1", timeouts: TimeoutsConfig | None = None
    ) -> HooksBackend:
        hooks = HooksConfig(wake=self.write("wake", wake), sleep=self.write("sleep", sleep), alive=self.write("alive", alive))
        return HooksBackend("qwen", URL + "/", hooks, timeouts)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def pid(self, name: str) -> int:
        """The process id that a hook has written to a file, as soon as it is there."""
        eventually(f"{name} is written", lambda: (self.folder / name).exists() and self.read(name).endswith("\n"))
        return int(self.read(name))


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def is_gone(pid: int) -> bool:
    """Say whether a process has ended; an orphan that nobody waits for yet has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def strays() -> Iterator[list[int]]:
    """Processes that a test leaves running on purpose."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_hooks_wake_and_sleep_and_know_what_they_are_asked_for(scripts: Scripts) -> None:
    note = 'echo "$(basename $0) $LLMUX_MODEL $LLMUX_URL ${LLMUX_SLEEP_LEVEL:-none}" >> log'
    backend = scripts.backend(wake=f"{note}; touch up", sleep=f"{note}; rm up", alive=f"{note}; test -e up")
    assert str(backend) == URL
    assert await backend.state() is BackendState.ASLEEP
    await backend.wake()
    await backend.ready()
    assert await backend.state() is BackendState.AWAKE
    await backend.sleep(2)
    assert await backend.state() is BackendState.ASLEEP
    await backend.aclose()
    asked = f"alive qwen {URL} none"
    assert scripts.read("log").splitlines() == [
        asked,
        f"wake qwen {URL} none",
        asked,
        asked,
        f"sleep qwen {URL} 2",
        asked,
        asked,
    ]


async def test_a_hook_has_the_environment_of_the_gateway_and_nothing_to_read(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_GATEWAY", "inherited")
    backend = scripts.backend(wake="cat; echo $OF_THE_GATEWAY; exit 9", timeouts=TimeoutsConfig(wake=10))
    reader, writer = os.pipe()
    stdin = os.dup(0)
    os.dup2(reader, 0)
    os.write(writer, b"for somebody else\n")
    os.close(writer)
    try:
        with pytest.raises(BackendError, match=r"exit status 9\. It wrote: inherited"):
            await backend.wake()
    finally:
        os.dup2(stdin, 0)
        for descriptor in (reader, stdin):
            os.close(descriptor)


@pytest.mark.parametrize("step", ["wake", "sleep"])
async def test_a_hook_that_fails_is_told_with_what_it_wrote(scripts: Scripts, step: str) -> None:
    script = "echo to stdout; echo no such container >&2; exit 3"
    backend = scripts.backend(wake=script) if step == "wake" else scripts.backend(sleep=script)
    with pytest.raises(BackendError) as caught:
        await (backend.wake() if step == "wake" else backend.sleep(1))
    told = f"{URL}: the hook '{step}' failed: exit status 3. It wrote: to stdout\nno such container"
    assert (type(caught.value), str(caught.value)) == (BackendError, told)


async def test_of_a_long_output_the_end_is_told(scripts: Scripts) -> None:
    backend = scripts.backend(wake="i=0; while [ $i -lt 100 ]; do echo line $i; i=$((i+1)); done; exit 1")
    with pytest.raises(BackendError) as caught:
        await backend.wake()
    assert str(caught.value).splitlines()[1:] == [f"line {number}" for number in range(81, 100)]
    backend = scripts.backend(wake="head -c 100000 /dev/zero | tr '\\0' x; exit 1")
    with pytest.raises(BackendError) as caught:
        await backend.wake()
    assert str(caught.value).endswith("x" * 2000)
    assert "x" * 2001 not in str(caught.value)


async def test_a_hook_that_a_signal_ends_is_told(scripts: Scripts) -> None:
    backend = scripts.backend(wake="kill -9 $$")
    with pytest.raises(BackendError, match="killed by signal 9, and it wrote nothing"):
        await backend.wake()


async def test_sleep_is_not_believed_but_confirmed(scripts: Scripts) -> None:
    backend = scripts.backend(alive="exit 0")
    with pytest.raises(BackendError, match="exited with 0 but 'alive' exits with 0 too"):
        await backend.sleep(1)


@pytest.mark.parametrize("status", [2, 7, 127])
async def test_any_other_status_of_alive_is_no_answer(scripts: Scripts, status: int) -> None:
    backend = scripts.backend(alive=f"echo cannot tell; exit {status}")
    with pytest.raises(BackendError, match=rf"no clear answer .*: exit status {status}\. It wrote: cannot tell"):
        await backend.state()
    with pytest.raises(BackendError, match="no clear answer"):
        await backend.sleep(1)


@pytest.mark.parametrize(
    ("command", "reason"),
    [("no-such-command", "No such file or directory"), ("plain", "Permission denied"), ("a\0b", "null byte")],
)
async def test_a_command_that_cannot_be_run_is_told_with_the_reason(scripts: Scripts, command: str, reason: str) -> None:
    if command == "plain":
        (command,) = scripts.write("plain", "exit 0", mode=0o644)
    files = open_files()
    backend = HooksBackend("qwen", URL, HooksConfig(wake=(command,), sleep=("true",), alive=(command,)))
    for step in (backend.wake, backend.state, backend.ready):
        with anyio.fail_after(5), pytest.raises(BackendError, match=f"cannot be run: .*{reason}"):
            await step()
    assert open_files() == files


async def test_ready_asks_until_alive_says_so_and_takes_no_answer_for_not_yet(scripts: Scripts) -> None:
    backend = scripts.backend(alive="echo >> asked; case $(wc -l < asked) in 1) exit 1;; 2) exit 7;; *) exit 0;; esac")
    with anyio.fail_after(10):
        await backend.ready()
    assert len(scripts.read("asked").splitlines()) == 3


@pytest.mark.parametrize(
    ("alive", "told"), [("exit 1", "it says asleep"), ("echo refused; exit 7", "exit status 7. It wrote: refused")]
)
async def test_ready_does_not_ask_for_ever(scripts: Scripts, alive: str, told: str) -> None:
    backend = scripts.backend(alive=alive, timeouts=TimeoutsConfig(wake=0.5))
    with anyio.fail_after(10), pytest.raises(BackendTimeoutError, match=f"did not say awake within 0.5 s.*{told}"):
        await backend.ready()


# Time limits


HANG = f"echo before; echo $$ > hook; {LONG} & echo $! > child; wait"


@pytest.mark.parametrize("step", ["wake", "sleep", "alive"])
async def test_a_hook_that_exceeds_its_limit_is_killed_with_what_it_has_started(scripts: Scripts, step: str) -> None:
    """The limits of the other hooks are far too long."""
    limits = {"wake": 60.0, "sleep": 60.0, "probe": 60.0} | {"probe" if step == "alive" else step: 0.5}
    hooks = HooksConfig(**{name: scripts.write(name, HANG if name == step else "") for name in ("wake", "sleep", "alive")})
    backend = HooksBackend("qwen", URL, hooks, TimeoutsConfig(**limits))
    files = open_files()
    with anyio.fail_after(10), pytest.raises(BackendTimeoutError) as caught:
        await (backend.wake() if step == "wake" else backend.sleep(1) if step == "sleep" else backend.state())
    told = f"{URL}: the hook '{step}' took longer than 0.5 s and was killed. It wrote: before"
    assert str(caught.value) == told
    assert is_gone(scripts.pid("hook"))
    child = scripts.pid("child")
    eventually("the child is gone", lambda: is_gone(child))
    assert open_files() == files


async def test_a_hook_that_is_cancelled_is_killed_with_what_it_has_started(scripts: Scripts) -> None:
    backend = scripts.backend(alive=HANG)
    files = open_files()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.state)
            while not (scripts.folder / "child").exists():  # noqa: ASYNC110 - written by another process
                await anyio.sleep(0.002)
            tasks.cancel_scope.cancel()
    assert is_gone(scripts.pid("hook"))
    child = scripts.pid("child")
    eventually("the child is gone", lambda: is_gone(child))
    assert open_files() == files


@pytest.mark.parametrize("how", ["", "setsid "])
async def test_a_server_that_a_hook_leaves_running_is_not_waited_for(scripts: Scripts, strays: list[int], how: str) -> None:
    """It keeps the hook's output open: reading that to its end would never return."""
    files = open_files()
    backend = scripts.backend(wake=f"{how}sh -c 'echo $$ > server; exec {LONG}' & while ! test -s server; do :; done; echo up")
    with anyio.fail_after(10):
        await backend.wake()
    server = scripts.pid("server")
    strays.append(server)
    assert not is_gone(server)
    assert open_files() == files


# Two models


async def test_the_switcher_switches_between_models_by_their_hooks(tmp_path: Path) -> None:
    """The scripts refuse to share the GPU, which is a file."""
    scripts = Scripts(tmp_path)
    hooks = HooksConfig(
        wake=scripts.write("wake", "set -C; echo $LLMUX_MODEL > gpu && echo wake $LLMUX_MODEL >> log"),
        sleep=scripts.write("sleep", "rm -f gpu; echo sleep $LLMUX_MODEL $LLMUX_SLEEP_LEVEL >> log"),
        alive=scripts.write("alive", 'test "$(cat gpu 2>/dev/null)" = "$LLMUX_MODEL"'),
    )
    config = Config(models={name: ModelConfig(url=f"{URL}{port}", hooks=hooks) for port, name in enumerate("ab")})
    backends = {name: build_backend(name, model, sleep_level=3) for name, model in config.models.items()}
    assert all(isinstance(backend, HooksBackend) for backend in backends.values())
    switcher = ModelSwitcher(backends, FifoPolicy(min_active_duration=0, sleep_level=3))
    with anyio.fail_after(30):
        for model in ("a", "b", "a"):
            async with switcher.lease(model):
                assert scripts.read("gpu") == f"{model}\n"
    await switcher.aclose()
    assert scripts.read("log").splitlines() == ["wake a", "sleep a 3", "wake b", "sleep b 3", "wake a"]


def test_hooks_run_in_a_gateway_whose_event_loop_is_not_in_the_main_thread(tmp_path: Path, anyio_backend: EventLoop) -> None:
    """Where asyncio's own way of waiting for processes depends on the version of Python, and uvloop has another one."""
    scripts = Scripts(tmp_path)
    hooks = {
        "wake": scripts.write("wake", "echo $LLMUX_MODEL > gpu"),
        "sleep": scripts.write("sleep", "rm gpu"),
        "alive": scripts.write("alive", 'test "$(cat gpu 2>/dev/null)" = "$LLMUX_MODEL"'),
    }
    with serve(ScriptedServer(echo)) as a, serve(ScriptedServer(echo)) as b:
        models = {"a": {"url": a, "hooks": hooks}, "b": {"url": b, "hooks": hooks}}
        app = LLMuxApp({"models": models, "policy": {"name": "fifo", "min_active_duration": 0}})
        with serve(app, anyio_backend) as url, httpx.Client(base_url=url, timeout=20) as client:
            for model in ("a", "b", "a"):
                answer = client.post("/v1/chat/completions", json={"model": model, "messages": []})
                assert answer.status_code == 200, answer.text
                assert scripts.read("gpu") == f"{model}\n"


async def test_a_hook_that_fails_fails_the_switch_with_its_output(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path)
    backend = scripts.backend(wake="echo out of memory; exit 5")
    switcher = ModelSwitcher({"a": backend}, FifoPolicy(min_active_duration=0))
    with anyio.fail_after(10), pytest.raises(Exception, match=r"exit status 5\. It wrote: out of memory"):
        async with switcher.lease("a"):
            raise AssertionError("the switch was granted")
    await switcher.aclose()
