"""`llmux-asgi serve`: one process from its first line to its end; what is refused is refused in one line."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from llmux_asgi.cli import app
from llmux_asgi.sim import SimProcess, start_sim


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command as a process; yields the URL that it tells. It has ended with the block."""
    command = [sys.executable, "-c", "from llmux_asgi.cli import main; main()", "serve", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line:
            raise AssertionError(process.communicate()[1].decode())
        assert line.startswith("llmux-asgi serves "), line
        yield line.split()[-1], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def refused(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def sim() -> Iterator[SimProcess]:
    with start_sim("qwen", tokens_per_second=40) as started:
        yield started


def written(path: Path, **models: object) -> str:
    path.write_text(json.dumps({"models": models}))
    return str(path)


def test_it_serves_below_its_prefix_and_a_signal_lets_the_running_answer_finish(sim: SimProcess, tmp_path: Path) -> None:
    config = written(tmp_path / "llmux.json", qwen={"url": sim.url})
    with served(config, "--port", "0", "--prefix", "/llm") as (url, process), httpx.Client(base_url=url) as client:
        assert url.endswith("/llm/v1")
        assert client.get("/models").json()["data"][0]["id"] == "qwen"
        body = {"model": "qwen", "prompt": "one two", "max_tokens": 20, "stream": True}
        with client.stream("POST", "/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        out, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        assert out == b""
        assert b"Traceback" not in log
        assert b"/llm/v1" not in log  # no access log unless it is asked for


def test_a_configuration_that_cannot_be_used_is_one_line_and_status_2(tmp_path: Path) -> None:
    status, error = refused(written(tmp_path / "llmux.json", qwen={"url": "http://127.0.0.1:8001/v1"}))
    assert status == 2
    assert "$.models.qwen.url" in error
    assert "leave out /v1" in error
    config = written(tmp_path / "llmux.json", qwen={"url": "http://127.0.0.1:8001"})
    assert refused(config, "--prefix", "llm")[0] == 2


def test_a_port_that_is_taken_is_one_line_and_status_1(tmp_path: Path) -> None:
    config = written(tmp_path / "llmux.json", qwen={"url": "http://127.0.0.1:8001"})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        status, error = refused(config, "--port", port)
    assert status == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in error


def test_a_lifespan_that_fails_is_one_line_and_status_1(tmp_path: Path) -> None:
    with start_sim("old", version="0.10.0") as old:
        path = tmp_path / "llmux.json"
        path.write_text(json.dumps({"models": {"old": {"url": old.url}}, "policy": {"drain": "preempt"}}))
        status, error = refused(str(path), "--port", "0", "--log-level", "error")
    assert status == 1
    assert "Upgrade it to 0.17 or later" in error
