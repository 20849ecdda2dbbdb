"""A server whose process is the gateway's own: what interleaves with its start."""

from __future__ import annotations

import os
import sys

import anyio
import pytest

from llmux_asgi import BackendStartError, BackendState, LLMuxApp, ManagedBackend, Mode, TimeoutsConfig, VLLMBackend, load_config
from llmux_asgi._process import processes_of
from llmux_asgi.backends import _build, with_ports
from tests.support.fakes import Gate
from tests.support.serve import free_port

pytestmark = pytest.mark.anyio


def managed(timeouts: TimeoutsConfig | None = None) -> ManagedBackend:
    url = f"http://127.0.0.1:{free_port()}"
    command = (sys.executable, "-m", "llmux_asgi.sim", '{"name": "m", "port": {port}, "start_seconds": 0}')
    return ManagedBackend("m", VLLMBackend(url, timeouts=timeouts), url, command, timeouts=timeouts)


async def test_it_is_started_put_to_sleep_woken_and_stopped() -> None:
    backend = managed()
    assert await backend.state() is BackendState.STOPPED
    await backend.wake()
    await backend.ready()
    assert await backend.state() is BackendState.AWAKE
    await backend.sleep(1)
    assert await backend.state() is BackendState.ASLEEP
    await backend.wake()
    await backend.ready()
    await backend.sleep(3)
    assert await backend.state() is BackendState.STOPPED
    assert processes_of(os.getpid()) == []
    await backend.aclose()


async def test_a_stop_that_comes_while_it_is_about_to_be_started_is_not_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, gate = managed(), Gate()

    async def look() -> bool:
        await gate.pass_through()
        return False

    monkeypatch.setattr(backend, "_somebody_listens", look)
    errors: list[BackendStartError] = []

    async def wake() -> None:
        try:
            await backend.wake()
        except BackendStartError as exc:
            errors.append(exc)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wake)
            await gate.entered.wait()
            await backend.stop()
            gate.open.set()
    assert "was stopped before it was started" in str(errors[0])
    assert processes_of(os.getpid()) == []


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    backend = managed()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(backend.wake)
            while not processes_of(os.getpid()):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        await backend.stop()
    assert processes_of(os.getpid()) == []


async def test_a_lifespan_that_is_cancelled_leaves_no_process() -> None:
    command = [sys.executable, "-m", "llmux_asgi.sim", '{"name": "m", "port": {port}, "start_seconds": 0}']
    app = LLMuxApp({"models": {"m": {"command": command}}})
    with anyio.fail_after(20):
        with anyio.CancelScope() as scope:
            async with app.lifespan(), app.switcher.lease("m"):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert processes_of(os.getpid()) == []
        assert app.switcher.statistics().mode is Mode.UNKNOWN
        await app.aclose()


def test_no_two_commands_get_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([20001, 20002, 20002, 20003])
    monkeypatch.setattr(_build, "free_port", lambda: next(drawn))
    models: dict[str, object] = {name: {"command": ["serve", "{port}"]} for name in "ab"}
    models["c"] = {"url": "http://127.0.0.1:20001"}
    config = with_ports(load_config({"models": models}))
    assert [model.address.rpartition(":")[2] for model in config.models.values()] == ["20002", "20003", "20001"]
