"""The request log: a line for each request, whatever became of it."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from llmux_asgi import FifoPolicy, LLMuxApp, LLMuxMiddleware
from llmux_asgi._request_log import RequestEntry, RequestLog
from tests.support.pool import Pool, until_frozen, until_waiting
from tests.test_middleware import Connection, Inner, call

pytestmark = pytest.mark.anyio


@pytest.fixture
def pool() -> Pool:
    return Pool(awake="a", aliases={"gpt": "a"})


def entries(path: Path) -> list[RequestEntry]:
    return [msgspec.json.decode(line, type=RequestEntry) for line in path.read_bytes().splitlines()]


async def test_a_line_tells_when_it_came_how_long_it_waited_and_was_served(pool: Pool, tmp_path: Path) -> None:
    inner = Inner(pool)
    app = LLMuxMiddleware(inner, pool.switcher, request_log=tmp_path / "log.jsonl")
    await pool.switcher.reconcile()
    before = time.time()
    inner.go_on = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, app, Connection(b'{"model": "gpt", "stream": true}'))
        await inner.answering.wait()
        assert not (tmp_path / "log.jsonl").exists()  # it is not over
        inner.go_on.set()
    await call(app, Connection(b'{"model": "b"}'))
    first, second = entries(tmp_path / "log.jsonl")
    assert before <= first.time <= time.time()
    assert (first.model, first.waited, first.status, first.stream) == ("a", 0.0, 201, True)
    assert first.served is not None
    assert 0 < first.served < 5
    assert (second.model, second.stream) == ("b", False)
    assert second.waited > 0


async def test_a_line_tells_its_priority_class_and_for_how_long_it_was_frozen(tmp_path: Path) -> None:
    policy = FifoPolicy(min_active_duration=0, drain="preempt")
    pool = Pool(policy, awake="a", priorities={"high": 5.0, "low": 0.0}, default_priorities={"b": "low"})
    inner = Inner(pool)
    app = LLMuxMiddleware(inner, pool.switcher, request_log=tmp_path / "log")
    inner.go_on = anyio.Event()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, app, Connection(b'{"model": "a"}', headers={"x-llmux-priority": "high"}))
            await inner.answering.wait()
            async with pool.switcher.lease("b"):
                assert pool.switcher.statistics().frozen["a"] == 1
            await until_frozen(pool, "a", 0)
            inner.go_on.set()
    await call(app, Connection(b'{"model": "b"}'))
    frozen, other = entries(tmp_path / "log")
    assert (frozen.priority, other.priority) == ("high", "low")
    assert frozen.served is not None
    assert 0 < frozen.frozen < frozen.served
    assert other.frozen == 0.0


async def test_what_the_app_does_after_the_last_byte_is_not_time_served(pool: Pool, tmp_path: Path) -> None:
    took: list[float] = []

    async def lingering(scope: Any, receive: Any, send: Any) -> None:
        await Inner(pool)(scope, receive, send)
        begun = time.monotonic()
        while time.monotonic() < begun + 0.02:
            await anyio.lowlevel.checkpoint()
        took.append(time.monotonic() - begun)

    begun = time.monotonic()
    await call(LLMuxMiddleware(lingering, pool.switcher, request_log=tmp_path / "log"), Connection(b'{"model": "a"}'))
    (entry,) = entries(tmp_path / "log")
    assert entry.served is not None
    assert entry.served <= time.monotonic() - begun - took[0]


async def test_a_request_that_was_never_admitted_has_its_line(pool: Pool, tmp_path: Path) -> None:
    pool.switcher._policy.request_timeout = 0.0
    pool.backends["b"].gate("state")
    app = LLMuxMiddleware(Inner(pool), pool.switcher, request_log=tmp_path / "log")
    await call(app, Connection(b'{"model": "b"}'))
    (entry,) = entries(tmp_path / "log")
    assert (entry.model, entry.served, entry.status) == ("b", None, 504)


async def test_a_client_that_left_while_it_waited_has_status_0(pool: Pool, tmp_path: Path) -> None:
    gate = pool.backends["b"].gate("wake")
    app = LLMuxMiddleware(Inner(pool), pool.switcher, request_log=tmp_path / "log")
    connection = Connection(b'{"model": "b"}')
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, app, connection)
            await until_waiting(pool, "b", 1)
            await gate.entered.wait()
            connection.gone.set()
        gate.open.set()
        await pool.switcher.aclose()
    (entry,) = entries(tmp_path / "log")
    assert (entry.model, entry.served, entry.status) == ("b", None, 0)


async def test_unknown_models_and_names_from_the_header(pool: Pool, tmp_path: Path) -> None:
    app = LLMuxMiddleware(Inner(pool), pool.switcher, request_log=tmp_path / "log")
    await call(app, Connection(b'{"model": "none"}'))
    assert not (tmp_path / "log").exists()
    await call(app, Connection(b"{}", headers={"x-llmux-model": "a"}))
    (entry,) = entries(tmp_path / "log")
    assert entry.stream is None


async def test_a_log_that_cannot_be_written_is_one_warning(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "missing"
    app = LLMuxMiddleware(Inner(pool), pool.switcher, request_log=folder / "log")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            connection = Connection(b'{"model": "a"}')
            await call(app, connection)
            assert connection.status == 201
        assert [record.name for record in caplog.records] == ["llmux_asgi._request_log"]
        assert str(folder / "log") in caplog.text
        folder.mkdir()
        await call(app, Connection(b'{"model": "a"}'))
        assert len(entries(folder / "log")) == 1
        (folder / "log").unlink()
        folder.rmdir()
        await call(app, Connection(b'{"model": "a"}'))
        assert len(caplog.records) == 2  # it worked in between


def test_the_app_takes_it_from_the_configuration(tmp_path: Path) -> None:
    config = {"models": {"a": {"url": "http://127.0.0.1:1"}}, "request_log": str(tmp_path / "log")}
    assert isinstance(LLMuxApp(config)._inference.request_log, RequestLog)
    assert LLMuxApp({"models": config["models"]})._inference.request_log is None
