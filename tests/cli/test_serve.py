"""`llmux-asgi serve`: one process from its first line to its end; what is refused is refused in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from llmux_asgi import LLMuxApp, cli
from llmux_asgi.access import hash_key
from llmux_asgi.cli import _serve, app
from llmux_asgi.sim import SimProcess, start_sim
from tests.support.eventually import eventually


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


def test_it_serves_below_its_prefix_and_a_signal_gives_running_answers_their_time(sim: SimProcess, tmp_path: Path) -> None:
    config = tmp_path / "llmux.json"
    admin = {"keys": {"ops": {"hash": hash_key("llmux-admin-0123456789")}}}
    config.write_text(json.dumps({"models": {"qwen": {"url": sim.url}}, "limits": {"shutdown": 1.5}, "admin": admin}))
    with served(str(config), "--port", "0", "--prefix", "/llm") as (url, process), httpx.Client(base_url=url) as client:
        assert url.endswith("/llm/v1")
        assert client.get("/models").json()["data"][0]["id"] == "qwen"
        body = {"model": "qwen", "prompt": "one two", "stream": True}
        with (
            client.stream("POST", "/completions", json={**body, "max_tokens": 10}) as short,
            client.stream("POST", "/completions", json={**body, "max_tokens": 4000}) as long,
            client.stream("GET", "../admin/api/events", headers={"x-api-key": "llmux-admin-0123456789"}) as events,
        ):
            assert events.status_code == 200
            process.send_signal(signal.SIGTERM)
            assert list(short.iter_lines())[-2:] == ["data: [DONE]", ""]
            assert "request_interrupted" in list(long.iter_lines())[-2]
            assert "event: status" in list(events.iter_lines())  # it has ended in order
        out, log = process.communicate(timeout=20)
        assert process.returncode == 0, log
        assert out == b""
        assert b"Traceback" not in log
        assert b"/llm/v1" not in log  # no access log unless it is asked for


def test_a_hangup_reads_the_configuration_anew_and_a_bad_one_is_logged(sim: SimProcess, tmp_path: Path) -> None:
    config = tmp_path / "llmux.json"
    config.write_text(json.dumps({"models": {"qwen": {"url": sim.url}}}))

    def models() -> list[str]:
        return [model["id"] for model in client.get("/models").json()["data"]]

    with served(str(config), "--port", "0") as (url, process), httpx.Client(base_url=url) as client:
        body = {"model": "qwen", "prompt": "one two", "max_tokens": 40, "stream": True}
        with client.stream("POST", "/completions", json=body) as running:
            config.write_text(json.dumps({"models": {"llama": {"url": sim.url, "served_name": "qwen"}}}))
            process.send_signal(signal.SIGHUP)
            eventually("it goes by the new one", lambda: models() == ["llama"])
            assert list(running.iter_lines())[-2:] == ["data: [DONE]", ""]
        assert client.post("/completions", json={**body, "model": "llama"}).status_code == 200
        config.write_text("{")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=20)[1].decode()
        assert process.returncode == 0, log
    assert "added ['llama'], changed [], removed ['qwen']" in log
    assert "the configuration was not read anew, that of before stays valid" in log


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
    assert "choose another --port" in error


def test_the_first_signal_ends_it_in_order_and_the_second_one_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(tmp_path / "llmux.json", qwen={"url": "http://127.0.0.1:8001"})
    raised: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    server = _serve.Server(uvicorn.Config(app=lambda: None), LLMuxApp(config), "ready")
    with server.told_to_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        assert server.should_exit
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert raised == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_the_extra_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_missing", ImportError("No module named 'typer'"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("llmux-asgi: No module named 'typer': install it with its extra 'cli'")


def test_a_lifespan_that_fails_is_one_line_and_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(server: uvicorn.Server) -> None:
        """If it should come up after all, it does not stay."""

    monkeypatch.setattr(uvicorn.Server, "main_loop", end)
    with start_sim("old", version="0.10.0") as old:
        path = tmp_path / "llmux.json"
        path.write_text(json.dumps({"models": {"old": {"url": old.url}}, "policy": {"drain": "preempt"}}))
        status, error = refused(str(path), "--port", "0", "--log-level", "error")
    assert status == 1
    assert "Upgrade it to 0.17 or later" in error
