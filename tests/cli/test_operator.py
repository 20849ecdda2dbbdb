"""An operator at the command line, with a real gateway and two servers; nothing is made up here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from llmux_asgi.access import hash_key
from llmux_asgi.cli import app
from llmux_asgi.cli._remote import find_gateway
from llmux_asgi.exceptions import ConfigError
from llmux_asgi.sim import SimOptions, start_sims
from tests.cli.test_documentation import plain, shown
from tests.cli.test_serve import served

KEY = "llmux-operator-0123456789"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the options that lead to its admin API."""
    folder = tmp_path_factory.mktemp("operator")
    key, config = folder / "key", folder / "llmux.json"
    key.write_text(KEY + "\n")
    with start_sims(SimOptions(name="qwen"), SimOptions(name="org/llama", start_asleep=1)) as sims:
        models = {"qwen": {"url": sims[0].url, "aliases": ["gpt"]}, "llama": {"url": sims[1].url, "served_name": "org/llama"}}
        admin = {"prefix": "/ops", "keys": {"other": {"hash": hash_key("another-key-0123456789")}, "me": {"file": str(key)}}}
        config.write_text(json.dumps({"models": models, "admin": admin}))
        with served(str(config), "--port", "0") as (url, _):
            yield url, ["--config", str(config), "--url", url.removesuffix("/v1")]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


def told(*arguments: str) -> Any:
    status, output = run(*arguments, "--json")
    assert status == 0, output
    return json.loads(output)


def test_an_operator_sees_and_steers_a_real_gateway(gateway: tuple[str, list[str]]) -> None:
    url, options = gateway
    ask = {"model": "qwen", "prompt": "one", "max_tokens": 1}
    assert httpx.post(f"{url}/completions", json=ask, timeout=30).status_code == 200
    (output,) = (each for command, each in shown() if command == "llmux-asgi status")
    status, text = run("status", *options)
    assert status == 0
    assert plain(text)[:5] == plain(output)[:5]
    assert told("status", *options)["models"] == told("top", *options)["models"]
    assert [each["name"] for each in told("models", *options)["models"]] == ["qwen", "llama"]

    assert told("wake", "llama", *options)["active"] is True
    assert told("status", *options)["active"] == "llama"
    assert told("pin", "gpt", *options)["pinned"] is True
    status, text = run("wake", "llama", *options)
    assert (status, text.count("\n"), "qwen" in text) == (1, 1, True)  # which says who is pinned
    assert told("unpin", *options) == {"unpinned": "qwen"}
    assert told("sleep", "qwen", *options)["state"] == "asleep"
    status, text = run("stop", "qwen", *options)
    assert (status, text.count("\n"), text.startswith("stop: ")) == (1, 1, True)
    status, text = run("wake", "lama", *options)
    assert (status, text) == (2, "wake: there is no model 'lama'. Did you mean llama?\n")

    assert told("drain", "--wait", "20", *options)["drained"] is True
    assert httpx.post(f"{url}/completions", json=ask, timeout=30).status_code == 503
    assert told("resume", *options)["draining"] is False

    config = Path(options[1])
    written = json.loads(config.read_text())
    written["models"]["llama"]["aliases"] = ["small"]
    config.write_text(json.dumps(written))
    assert told("reload", *options)["changed"] == ["llama"]
    assert told("models", *options)["models"][1]["aliases"] == ["small"]
    config.write_text("{")
    status, text = run("reload", "--key-file", str(config.with_name("key")), "--url", f"{options[3]}/ops")
    assert (status, text.count("\n"), "not valid JSON" in text) == (2, 1, True)
    config.write_text(json.dumps(written))

    status, text = run("events", "--no-follow", "--json", *options)
    events = [json.loads(line) for line in text.splitlines()]
    kinds = [each["event"] for each in events]
    assert status == 0
    assert {"switch", "phase", "switched", "model", "pin", "drain", "config"} <= set(kinds)
    before = next(each["id"] for each in events if each["event"] == "drain")
    status, text = run("events", "--no-follow", "--since", before, *options)
    assert text.splitlines()[0].split(" ", 1)[1] == "requests are taken again"
    assert "new configuration: changed llama" in text
    status, text = run("events", "--no-follow", *options)
    assert "qwen → llama begins: " in text
    assert "qwen → llama completed after" in text


def test_events_are_followed_by_a_process_that_a_reader_ends(gateway: tuple[str, list[str]]) -> None:
    _, options = gateway
    command = [sys.executable, "-c", "from llmux_asgi.cli import main; main()", "events", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        last = told("status", *options)["last_event"]
        while last and int(json.loads(process.stdout.readline())["id"].rpartition("-")[2]) < last:
            pass
        told("pin", "qwen", *options)
        while json.loads(process.stdout.readline())["event"] != "pin":
            pass
        process.stdout.close()  # as `head` does
        told("unpin", *options)
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


def test_the_configuration_says_where_and_with_which_key(gateway: tuple[str, list[str]], tmp_path: Path) -> None:
    config = Path(gateway[1][1])
    assert find_gateway(None, None, config) == ("http://127.0.0.1:8000/ops", KEY)
    assert find_gateway("http://h/llm/ops", None, config) == ("http://h/llm/ops", KEY)
    unknown = tmp_path / "unknown.json"
    models = {"qwen": {"url": "http://127.0.0.1:1"}}
    unknown.write_text(json.dumps({"models": models, "admin": {"keys": {"a": {"env": "NOT_SET_HERE"}}}}))
    assert find_gateway(None, None, unknown) == ("http://127.0.0.1:8000/admin", None)
    unknown.write_text(json.dumps({"models": models}))
    with pytest.raises(ConfigError, match="has no admin:"):
        find_gateway(None, None, unknown)
