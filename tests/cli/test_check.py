"""`llmux-asgi check`: each kind of fault is named, with how to mend it; what is well is left alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from llmux_asgi.cli import app
from llmux_asgi.sim import SimOptions
from llmux_asgi.sim.vllm import SimVLLM
from tests.support.llamacpp import SimulatedRouter
from tests.support.ollama import SimulatedOllama
from tests.support.serve import free_port, serve
from tests.support.sglang import SimulatedSGLang

QUICK = {"probe": 0.7, "connect": 0.7}


def checked(path: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["check", str(path), "--json", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    told: dict[str, Any] = json.loads(result.stdout)
    assert told["status"] == result.exit_code
    return told


def only_finding(told: dict[str, Any]) -> dict[str, str]:
    (finding,) = told["findings"]
    assert finding["mend"]
    found: dict[str, str] = finding
    return found


# The file alone

ALIASES = "models: {a: {url: 'http://h:1'}, b: {url: 'http://h:2', aliases: [a]}}"
FREEZING = "models: {a: {url: 'http://h:1', server: ollama}}\npolicy: {drain: preempt}"
FILES = {
    "syntax": ("models:\n  a:\n   url: x\n  \tb: 1", "$", "line 4, column 3"),
    "unknown-key": ("models: {a: {url: 'http://h:1', alias: [b]}}", "$.models.a", "'aliases'"),
    "unknown-key elsewhere": ("models: {a: {url: 'http://h:1', linger: 1}}", "$.models.a", "below policy"),
    "unknown-key nowhere": ("models: {a.b: {url: 'http://h:1', timeouts: {zzz: 1}}}", "$.models.a.b.timeouts", "Remove it"),
    "unknown-key deep": ("models: {a.b: {url: 'http://h:1', timeouts: {conect: 1}}}", "$.models.a.b.timeouts", "'connect'"),
    "missing-key": ("policy: {}", "$", "models"),
    "wrong-type": ("models: {a: {url: 'http://h:1', timeouts: {wake: long}}}", "$.models.a.timeouts.wake", "float"),
    "wrong-type of a section": ("models: {a: 'http://h:1'}", "$.models.a", "below it"),
    "out-of-range": ("models: {a: {url: 'http://h:1', timeouts: {wake: -1}}}", "$.models.a.timeouts.wake", "> 0"),
    "unknown-value": ("models: {a: {url: 'http://h:1', server: tgi}}", "$.models.a.server", "one of the values"),
    "duplicate-key": ("models:\n  a: {url: 'http://h:1'}\n  a: {url: 'http://h:2'}", "$.models.a", "another name"),
    "url-with-v1": ("models: {a: {url: 'http://h:1/v1'}}", "$.models.a.url", "Write 'http://h:1'"),
    "bad-url": ("models: {a: {url: 'localhost:8001'}}", "$.models.a.url", "http://127.0.0.1:8001"),
    "bad-url, its port": ("models: {a: {url: 'http://h:port'}}", "$.models.a.url", "http://127.0.0.1:8001"),
    "url-without-port": ("models: {a: {url: 'http://h', command: [x]}}", "$.models.a.url", "{port}"),
    "duplicate-server": ("models: {a: {url: 'http://h:1'}, b: {url: 'http://h:1/'}}", "$.models.b.url", "models.a.aliases"),
    "alias-clash": (
        "models: {a: {url: 'http://h:1'}, b: {url: 'http://h:2', aliases: [a]}}",
        "$.models.b.aliases[0]",
        "model a",
    ),
    "command-without-port": ("models: {a: {command: [vllm, serve, x]}}", "$.models.a.command", '"{port}"'),
    "no-server": ("models: {a: {served_name: x}}", "$.models.a.url", "or a command"),
    "unknown-priority": ("models: {a: {url: 'http://h:1', priority: fast}}", "$.models.a.priority", "priorities: {fast: 10}"),
    "preempt-impossible": (
        "models: {a: {url: 'http://h:1', server: ollama}}\npolicy: {drain: preempt}",
        "$.policy.drain",
        "wait",
    ),
    "level-without-command": ("models: {a: {url: 'http://h:1', sleep_level: 3}}", "$.models.a.sleep_level", "1 or 2"),
    "no-effect": ("models: {a: {url: 'http://h:1', cwd: /}}", "$.models.a.cwd", "Leave one"),
    "no-models": ("models: {}", "$.models", "Add a model"),
    "contradiction": ("models: {a: {url: 'http://h:1'}}\nlimits: {backoff_max: 0}", "$.limits.backoff_max", "Raise"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used_is_explained(case: str, tmp_path: Path) -> None:
    text, where, mend = FILES[case]
    path = tmp_path / "llmux.yaml"
    path.write_text(text)
    told = checked(path, "--offline")
    finding = only_finding(told)
    assert told["status"] == 2
    assert (finding["kind"], finding["where"]) == (case.replace(",", " ").split()[0], where), finding
    assert mend in finding["mend"]


def test_a_file_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "llmux.yaml"
    assert only_finding(checked(path))["kind"] == "missing-file"
    path.mkdir()
    assert only_finding(checked(path))["kind"] == "unreadable-file"
    other = tmp_path / "llmux.conf"
    other.write_text("")
    assert only_finding(checked(other))["kind"] == "file-ending"
    broken = tmp_path / "llmux.toml"
    broken.write_text("[models")
    assert only_finding(checked(broken))["kind"] == "syntax"


# This machine


def test_what_the_machine_lacks_is_named(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    hooks = {"wake": ["true"], "sleep": ["no-such-hook"], "alive": ["true"]}
    models = {
        "here": {"command": [sys.executable, "{port}"]},
        "absent": {"command": ["no-such-program", "{port}"]},
        "words": {"command": ["vllm serve x", "{port}"]},
        "text": {"command": [str(plain), "{port}"]},
        "inside": {"command": ["./plain", "{port}"], "cwd": str(tmp_path)},
        "folder": {"command": ["true", "{port}"], "cwd": str(tmp_path / "gone")},
        "hooked": {"url": "http://127.0.0.1:1", "hooks": hooks},
    }
    config = {
        "models": models,
        "policy": {"estimates": str(tmp_path / "gone" / "e.json")},
        "request_log": str(tmp_path),
        "memory": {"check": "nvml"},
    }
    told = checked(written(tmp_path, config))
    found = {(each["where"].removeprefix("$.models."), each["kind"]): each["mend"] for each in told["findings"]}
    assert told["status"] == 1
    assert found.keys() == {
        ("absent.command", "no-program"),
        ("words.command", "no-program"),
        ("text.command", "not-executable"),
        ("inside.command", "not-executable"),
        ("folder.cwd", "no-folder"),
        ("hooked.hooks.sleep", "no-program"),
        ("$.policy.estimates", "unwritable"),
        ("$.request_log", "unwritable"),
        ("$.memory.device", "no-gpu"),
    }
    assert "[vllm, serve, x, …]" in found["words.command", "no-program"]
    assert "chmod +x" in found["text.command", "not-executable"]
    assert "mkdir -p" in found["$.policy.estimates", "unwritable"]
    assert "memory.check: none" in found["$.memory.device", "no-gpu"]


def test_metrics_without_their_extra_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"models": {"a": {"command": [sys.executable, "{port}"]}}, "metrics": {}})
    assert checked(path)["findings"] == []
    for name in [name for name in sys.modules if name.startswith("llmux_asgi.exposition")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.prometheus", None)
    finding = only_finding(checked(path))
    assert (finding["kind"], finding["where"]) == ("no-prometheus", "$.metrics")
    assert "llmux-asgi[prometheus]" in finding["mend"]


# The servers


class Sim:
    """A simulated vLLM in a thread: it has to be made in the event loop that serves it."""

    def __init__(self, **options: Any) -> None:
        self._options = SimOptions(**options)
        self._app: SimVLLM | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self._app = self._app or SimVLLM(self._options)
            await self._app(scope, receive, send)


async def page(scope: Any, receive: Any, send: Any) -> None:
    """A web server that answers everything with a page."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<html>"})


SERVERS: dict[str, Any] = {
    "a": Sim(name="a"),
    "b": Sim(name="b"),
    "asleep": Sim(name="asleep", start_asleep=1),
    "other": Sim(name="org/other", start_asleep=1),
    "no-dev": Sim(name="no-dev", dev_mode=False),
    "leaky": Sim(name="leaky", version="0.15.1"),
    "old": Sim(name="old", version="0.13.0", start_asleep=1),
    "awake-for-good": Sim(name="awake-for-good", sleep_mode=False, start_asleep=0),
    "hanging": Sim(name="hanging", faults=("is_sleeping:*:hang",)),
    "failing": Sim(name="failing", faults=("is_sleeping:*:fail",)),
    "page": page,
    "ollama": SimulatedOllama("a:latest"),
    "sglang": SimulatedSGLang(memory_saver=False),
    "router": SimulatedRouter("a"),
}


async def all_servers(scope: Any, receive: Any, send: Any) -> None:
    """Each server below its name: one thread for all of them."""
    if scope["type"] == "http":
        name, _, path = scope["path"][1:].partition("/")
        await SERVERS[name]({**scope, "path": f"/{path}", "raw_path": f"/{path}".encode()}, receive, send)


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    with serve(all_servers) as url:
        yield {name: f"{url}/{name}" for name in SERVERS}


def written(folder: Path, config: object) -> Path:
    path = folder / "llmux.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def models(urls: dict[str, str], *names: str, **more: dict[str, Any]) -> dict[str, Any]:
    return {**{name: {"url": urls[name]} for name in names}, **more}


def test_servers_that_are_well_give_no_finding(urls: dict[str, str], tmp_path: Path) -> None:
    aliased = {"url": urls["other"], "served_name": "org/other", "probe": "token"}
    told = checked(written(tmp_path, {"models": models(urls, "a", "asleep", other=aliased)}))
    assert (told["status"], told["findings"]) == (0, [])
    assert {each["model"]: each["state"] for each in told["servers"]} == {"a": "awake", "asleep": "asleep", "other": "asleep"}


def test_two_awake_at_once_are_a_warning_and_no_error(urls: dict[str, str], tmp_path: Path) -> None:
    told = checked(written(tmp_path, {"models": models(urls, "a", "asleep", "b")}))
    finding = only_finding(told)
    assert (told["status"], finding["level"], finding["kind"]) == (0, "warning", "several-awake")
    assert finding["fault"].startswith("a, b are awake")
    assert "puts the others to sleep" in finding["mend"]


@contextmanager
def mute() -> Iterator[str]:
    """Something that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def ssh() -> Iterator[str]:
    """Something that speaks first, and not HTTP."""

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_each_fault_of_a_server_is_named_with_its_mend(urls: dict[str, str], tmp_path: Path) -> None:
    """All at once: that is how they are asked, and one does not hide another."""
    false = {"wake": ["true"], "sleep": ["true"], "alive": ["sh", "-c", "exit 7"]}
    free = f"http://127.0.0.1:{free_port()}"
    with mute() as silent, ssh() as secure:
        faulty = models(
            urls,
            *("no-dev", "leaky", "awake-for-good", "failing", "page", "other", "sglang"),
            hanging={"url": urls["hanging"], "timeouts": QUICK},
            refused={"url": free},
            silent={"url": silent, "timeouts": QUICK},
            secure={"url": secure},
            nowhere={"url": "http://no-such-host.invalid:8000"},
            foreign={"url": urls["ollama"]},
            absent={"url": urls["router"], "server": "llama.cpp"},
            hooked={"url": "http://127.0.0.1:1", "hooks": false},
            taken={"url": urls["a"], "command": ["true"]},
        )
        faulty["sglang"]["server"] = "sglang"
        told = checked(written(tmp_path, {"models": faulty}))
    assert told["status"] == 1
    found = {each["where"].split(".")[2]: (each["kind"], each["mend"]) for each in told["findings"]}
    assert found.keys() == set(faulty)
    expected = {
        "no-dev": ("no-dev-mode", "VLLM_SERVER_DEV_MODE=1"),
        "leaky": ("unsafe-version", "Upgrade it to 0.17"),
        "awake-for-good": ("no-sleep-mode", "--enable-sleep-mode"),
        "hanging": ("hangs", "start it again if it hangs"),
        "failing": ("server-error", "log"),
        "page": ("not-vllm", "Correct the port"),
        "other": ("wrong-name", 'models.other.served_name: "org/other"'),
        "sglang": ("server-error", "--enable-memory-saver"),
        "refused": ("unreachable", "Start the server"),
        "silent": ("hangs", "start it again if it hangs"),
        "secure": ("not-http", "no HTTP server"),
        "nowhere": ("no-connection", "Correct the host"),
        "foreign": ("not-vllm", "server: ollama"),
        "absent": ("server-error", "Set served_name to one of these"),
        "hooked": ("hook-failed", "0 or 1"),
        "taken": ("port-taken", "another port"),
    }
    for name, (kind, mend) in expected.items():
        assert found[name][0] == kind, (name, found[name])
        assert mend in found[name][1], (name, found[name])


def test_a_server_that_cannot_freeze_requests_is_named(urls: dict[str, str], tmp_path: Path) -> None:
    config = {"models": models(urls, "asleep", "old"), "policy": {"drain": "preempt"}}
    finding = only_finding(checked(written(tmp_path, config)))
    assert (finding["kind"], finding["where"]) == ("no-preempt", "$.policy.drain")
    assert "vLLM 0.13" in finding["fault"]
    assert "drain: wait" in finding["mend"]


def test_a_name_that_ollama_does_not_have_is_to_be_pulled(urls: dict[str, str], tmp_path: Path) -> None:
    config = {"models": models(urls, mistral={"url": urls["ollama"], "server": "ollama"})}
    finding = only_finding(checked(written(tmp_path, config)))
    assert finding["kind"] == "wrong-name"
    assert finding["mend"] == "Run: ollama pull mistral"


# What is printed


def test_the_command_prints_faults_with_their_mends_and_no_colour_in_a_pipe(tmp_path: Path) -> None:
    path = written(tmp_path, {"models": {"a": {"url": f"http://127.0.0.1:{free_port()}"}}})
    command = [sys.executable, "-c", "from llmux_asgi.cli import main; main()", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, "TERM": "xterm"})
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-3].startswith("error $.models.a.url: nothing listens at http://127.0.0.1:")
    assert lines[-2] == "  mend: Start the server, or correct the address, models.a.url"
    assert lines[-1] == f"{path}: 1 error, 0 warnings"


def test_a_file_that_is_well_says_so(tmp_path: Path) -> None:
    path = written(tmp_path, {"models": {"a": {"url": "http://127.0.0.1:1"}}})
    result = CliRunner().invoke(app, ["check", str(path), "--offline"])
    assert (result.exit_code, result.stdout) == (0, f"{path}: nothing is wrong\n")
