"""What llama-swap's fields become, and what its command lines say."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmux_asgi.access import hash_key
from llmux_asgi.importing import ConfigImportError, Imported, convert

from .samples import LLAMA_SWAP

ENVIRONMENT = {"MODELS": "/srv/models"}


def imported(raw: Any, **top: Any) -> Imported:
    """Import a text, or models that are given as a mapping, or one model that is given by its command."""
    if isinstance(raw, str) and "\nmodels:" not in raw:
        raw = {"m": {"cmd": raw}}
    raw = yaml.safe_load(raw) if isinstance(raw, str) else {"models": raw, **top}
    return convert(raw, "llama-swap", environment=ENVIRONMENT)


def text_of(result: Imported, field: str) -> str:
    return next(finding.text for finding in result.findings if finding.field == field)


def command_of(cmd: str) -> str:
    return " ".join(imported(cmd).config.models["m"].command or ())


def test_the_model_with_everything() -> None:
    model = imported(LLAMA_SWAP).config.models["tuned"]
    words = "/opt/llama/llama-server-b9000 --port {port} --ctx-size 8192 --models-dir /srv/models --no-models-autoload"
    assert " ".join(model.command or ()) == words
    assert model.url == "http://127.0.0.1:9300"
    assert (model.server, model.served_name, model.sleep_level) == ("llama.cpp", "tuned-7b", None)
    assert model.env == {"CUDA_VISIBLE_DEVICES": "0", "NOTE": "a=b"}
    assert model.aliases == ("gpt-small", "gpt-mini", "tuned:high")
    timeouts = model.timeouts
    assert (timeouts.connect, timeouts.read, timeouts.start, timeouts.wake, timeouts.stop) == (7, 45, 400, 400, 5)


def test_a_loading_state_becomes_events() -> None:
    config = imported(LLAMA_SWAP).config
    assert (config.loading_notice, config.limits.heartbeat) == ("events", 1)
    assert imported("vllm serve x").config.loading_notice == "comments"
    one = {"cmd": "vllm serve x", "sendLoadingState": True}
    assert imported({"m": one}).config.loading_notice == "events"
    assert imported({"m": {**one, "sendLoadingState": False}}).config.loading_notice == "comments"


@pytest.mark.parametrize(
    ("ttl", "global_ttl", "ours"),
    [(60, None, 60), (60, 600, 60), (None, 600, 600), (-1, 600, 600), (0, 600, None), (None, 0, None), (None, None, None)],
)
def test_a_time_to_live_is_kept_and_0_is_for_ever(ttl: int | None, global_ttl: int | None, ours: int | None) -> None:
    for command in ("vllm serve m --port ${PORT}", "python serve.py ${PORT}"):
        model = {"cmd": command, **({} if ttl is None else {"ttl": ttl})}
        top = {} if global_ttl is None else {"globalTTL": global_ttl}
        assert imported({"m": model}, **top).config.models["m"].ttl == ours


def test_filters_become_parameters() -> None:
    models = imported(LLAMA_SWAP).config.models
    parameters = models["tuned"].parameters
    assert parameters is not None
    assert parameters.strip == ("temperature", "top_p")
    assert parameters.forced == {"top_k": 4, "heat": 0.5, "stop": ["<8192>", 1, {"a": None}]}
    assert {name: each.forced for name, each in parameters.aliases.items()} == {
        "tuned": {"think": "medium"},
        "tuned:high": {"think": "high"},
    }
    assert models["plain"].parameters is None


def test_a_plain_vllm_and_one_in_a_container() -> None:
    models = imported(LLAMA_SWAP).config.models
    plain, boxed = models["plain"], models["boxed"]
    assert plain.command == ("vllm", "serve", "org/plain-3b", "--port", "{port}", "--max-model-len", "4096")
    assert (plain.url, plain.served_name, plain.sleep_level, plain.preload) == (None, "org/plain-3b", 3, True)
    assert plain.timeouts.stop == 20
    assert boxed.command is not None
    assert boxed.command[:4] == ("docker", "run", "-e", "VLLM_SERVER_DEV_MODE=1")
    assert boxed.command[-1] == "--enable-sleep-mode"
    assert '"device=0,1"' in boxed.command
    assert "{port}:8000" in boxed.command
    assert (boxed.url, boxed.served_name, boxed.server) == (None, None, "vllm")


def test_a_container_has_time_to_end() -> None:
    assert imported("docker run --rm -p ${PORT}:80 vllm/vllm-openai --model m").config.models["m"].timeouts.stop == 60


def test_keys_are_hashed_or_named() -> None:
    access = imported(LLAMA_SWAP).config.access
    assert access is not None
    first, second, third = access.keys.values()
    assert first.hash == hash_key("sk-never-copied")
    assert (second.hash, second.env) == (None, "SWAP_KEY")  # which need not be set where it is imported
    assert third.hash == hash_key("/srv/models-key")
    assert imported("vllm serve a --port ${PORT}").config.access is None


def test_a_key_of_the_server_is_told_of() -> None:
    result = imported("vllm serve a --port ${PORT} --api-key x")
    assert "the server asks for a key" in text_of(result, "models.m.cmd")


def test_priorities_become_head_starts() -> None:
    config = imported(LLAMA_SWAP).config
    assert config.priorities == {"p-1": 0, "p0": 30, "p10": 60}
    assert {name: model.priority for name, model in config.models.items()} == {"tuned": "p0", "plain": "p10", "boxed": "p-1"}


def test_requests_wait_without_a_limit_as_they_do_there() -> None:
    assert imported("vllm serve m --port ${PORT}").config.policy.request_timeout is None


@pytest.mark.parametrize(
    ("cmd", "words"),
    [
        ("vllm serve a --port ${PORT}", "vllm serve a --port {port}"),
        ("vllm serve a \\\n  --port ${PORT} \\\n", "vllm serve a --port {port}"),
        ("# first\nvllm serve a\n  # second\n --port ${PORT}\n", "vllm serve a --port {port}"),
        ("vllm serve '/m/a b' --port=${PORT} --json '{\"x\": 1}'", 'vllm serve /m/a b --port={port} --json {"x": 1}'),
        ("uv run vllm serve a --port ${PORT}", "uv run vllm serve a --port {port} --enable-sleep-mode"),
        (
            "python3 -m vllm.entrypoints.openai.api_server --model a --port ${PORT}",
            "python3 -m vllm.entrypoints.openai.api_server --model a --port {port} --enable-sleep-mode",
        ),
        ('sh -c "exec vllm serve a --port ${PORT}"', "sh -c exec vllm serve a --port {port}"),
        ("python -m sglang.launch_server --port ${PORT}", "python -m sglang.launch_server --port {port} --enable-memory-saver"),
        ("llama-server --port ${PORT} --models-dir /m", "llama-server --port {port} --models-dir /m"),
        ("llama-server -m /m/x.gguf --port ${PORT}", "llama-server --port {port} --models-dir /m --no-models-autoload"),
        ("llama-server --model=x.gguf --port ${PORT}", "llama-server --port {port} --models-dir . --no-models-autoload"),
        (
            "podman run -p ${PORT}:8080 -v /srv/llama.cpp:/m ggml-org/llama.cpp:server -m /m/x.gguf",
            "podman run -p {port}:8080 -v /srv/llama.cpp:/m ggml-org/llama.cpp:server --models-dir /m --no-models-autoload",
        ),
    ],
)
def test_commands(cmd: str, words: str) -> None:
    assert command_of(cmd) == words


@pytest.mark.parametrize(
    ("cmd", "server"),
    [
        ("vllm serve a --port ${PORT}", "vllm"),
        ("/opt/bin/vllm serve a --port ${PORT}", "vllm"),
        ("python -m sglang.launch_server --port ${PORT}", "sglang"),
        ("sglang serve --port ${PORT}", "sglang"),
        ("env OLLAMA_HOST=127.0.0.1:${PORT} ollama serve", "ollama"),
        ("docker run -p ${PORT}:30000 lmsysorg/sglang:latest python3 -m sglang.launch_server", "sglang"),
    ],
)
def test_kinds_of_servers(cmd: str, server: str) -> None:
    assert imported(cmd).config.models["m"].server == server


@pytest.mark.parametrize(
    ("options", "level", "served", "said"),
    [
        ("", 3, "org/a", "the gateway adds --enable-sleep-mode"),
        ("--served-model-name m other", 3, None, "1 keeps the weights in CPU memory"),
        ("--served-model-name other m2", 3, "other", "vLLM calls the model other"),
        ("--enable-sleep-mode", 1, "org/a", "vLLM calls the model org/a"),
    ],
)
def test_what_a_vllm_command_says_matters(options: str, level: int, served: str | None, said: str) -> None:
    result = imported(f"vllm serve org/a --port ${{PORT}} {options}")
    model = result.config.models["m"]
    assert (model.sleep_level, model.served_name) == (level, served)
    assert said in text_of(result, "models.m.cmd")


@pytest.mark.parametrize(
    "cmd",
    [
        "whisper-server --port ${PORT}",
        "llama-server --port ${PORT} -hf org/x:Q4",
        "llama-server --port ${PORT} -m /m/x.gguf --mmproj /m/p.gguf",
        "llama-server --port ${PORT} -m /m/x.gguf -mm=/m/p.gguf",
        "llama-server --port ${PORT} -m /m/x-00001-of-00003.gguf",
        "docker run -p ${PORT}:80 some/image",
    ],
)
def test_what_the_gateway_cannot_switch_gets_hooks(cmd: str) -> None:
    model = imported(cmd).config.models["m"]
    assert model.command is None
    assert model.hooks is not None
    assert model.url == "http://127.0.0.1:5800"
    assert cmd.replace("${PORT}", "5800") in model.hooks.wake[2]


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ({"cmd": "vllm serve m --port ${PORT}"}, None),
        ({"cmd": "vllm serve m --port ${PORT}", "proxy": "http://localhost:${PORT}"}, None),
        ({"cmd": "vllm serve m --port 8999", "proxy": "http://localhost:8999/v1"}, "http://127.0.0.1:8999"),
        ({"cmd": "vllm serve m --port 8999"}, "http://127.0.0.1:8999"),
        ({"cmd": "vllm serve m"}, "http://127.0.0.1:5800"),
        ({"cmd": "vllm serve m --port ${PORT}", "proxy": "http://box:${PORT}"}, "http://box:5800"),
        ({"cmd": "vllm serve m", "proxy": "https://box/sub/v1/"}, "https://box:443/sub"),
    ],
)
def test_where_a_server_listens(model: Any, url: str | None) -> None:
    assert imported({"m": model}).config.models["m"].url == url


def test_servers_that_shared_a_port_get_ports_of_their_own() -> None:
    one = {"proxy": "http://localhost:8999", "cmd": "vllm serve a --port 8999"}
    two = {"proxy": "http://localhost:8999", "cmd": "docker run -p 8999:8000 vllm/vllm-openai --model b"}
    three = {"proxy": "http://localhost:8999", "cmd": "whisper-server --port 8999"}
    models = imported({"one": one, "two": two, "three": three}).config.models
    assert models["one"].url == "http://127.0.0.1:8999"
    assert models["two"].url is None
    assert "{port}:8000" in (models["two"].command or ())
    assert models["three"].url == "http://127.0.0.1:5800"
    assert models["three"].hooks is not None
    assert "whisper-server --port 5800" in models["three"].hooks.wake[2]


def test_a_command_that_says_no_port_is_told_of() -> None:
    for cmd in ("vllm serve a", "some-server"):
        assert "make it listen on 5800" in text_of(imported(cmd), "models.m.proxy")
    assert not any(each.field == "models.m.proxy" for each in imported("some-server --port ${PORT}").findings)


def test_models_that_are_preloaded() -> None:
    models = {"a": {"cmd": "vllm serve a --port ${PORT}"}, "b": {"cmd": "other --port ${PORT}"}}
    result = imported(models, hooks={"on_startup": {"preload": ["a", "b", "c"]}})
    assert [result.config.models[name].preload for name in "ab"] == [True, True]
    assert text_of(result, "hooks.on_startup.preload") == "not c: no model of that name"


def test_zero_has_its_meaning() -> None:
    model = {"cmd": "vllm serve m --port ${PORT}", "unloadTimeout": 0, "timeouts": {"connect": 0, "responseHeader": 0}}
    timeouts = imported({"m": model}, healthCheckTimeout=1, unloadTimeout=9).config.models["m"].timeouts
    assert (timeouts.connect, timeouts.read, timeouts.start, timeouts.stop) == (5, None, 15, 9)


@pytest.mark.parametrize(
    ("model", "top", "message"),
    [
        ({"cmd": "vllm serve 'a"}, {}, r"models\.m\.cmd: not a command line: No closing quotation"),
        ({"cmd": "# nothing"}, {}, r"models\.m\.cmd: the command is empty"),
        ({"cmd": "vllm serve ${size}"}, {}, r"models\.m\.cmd: there is no macro 'size'"),
        ({"cmd": "vllm serve ${env.NOT_SET}"}, {}, r"models\.m\.cmd: the environment variable NOT_SET is not set"),
        ({"cmd": "vllm serve ${a}"}, {"macros": {"a": "${b}", "b": "${a}"}}, r"models\.m\.cmd: a macro refers to itself"),
        ({"cmd": "vllm", "env": ["A"]}, {}, r"models\.m\.env: expected NAME=value, got 'A'"),
        ({"cmd": "vllm serve a", "proxy": "box"}, {}, r"models\.m\.proxy: 'box' is not a URL"),
        ({"cmd": "vllm serve a", "proxy": "http://box:x"}, {}, r"models\.m\.proxy: 'http://box:x' is not a URL"),
        ({"cmd": "vllm serve a", "aliases": "x"}, {}, r"models\.m\.aliases: expected a list, got str"),
        ({"cmd": "vllm serve a", "timeouts": 3}, {}, r"models\.m\.timeouts: expected a mapping, got int"),
        ({"cmd": "vllm serve a"}, {"healthCheckTimeout": "1m"}, r"healthCheckTimeout: expected a number, got '1m'"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(model: Any, top: Any, message: str) -> None:
    with pytest.raises(ConfigImportError, match=message):
        imported({"m": model}, **top)


def test_two_servers_at_a_port_that_their_commands_do_not_say() -> None:
    models = {name: {"cmd": f"vllm serve {name}", "proxy": "http://localhost:8999"} for name in "ab"}
    with pytest.raises(ConfigImportError, match=r"models\.b\.proxy: http://127\.0\.0\.1:8999 is the server of models\.a too"):
        imported(models)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the hooks ask by curl whether a server is ready")
def test_the_hooks_start_a_server_tell_its_state_and_end_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = {
        "cmd": f"{sys.executable} -IS -m http.server --bind 127.0.0.1 ${{PORT}} --directory '{tmp_path}'",
        "checkEndpoint": "/",
        "env": ["NOTE=a b"],
    }
    hooks = imported({"a/b c": model}, startPort=port).config.models["a/b c"].hooks
    assert hooks is not None

    def status_of(command: tuple[str, ...]) -> int:
        environment = {"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, timeout=20).returncode

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    assert status_of(hooks.alive) == 1
    assert status_of(hooks.sleep) == 0
    assert status_of(hooks.wake) == 0
    try:
        assert listens()
        assert status_of(hooks.alive) == 0
        assert status_of(hooks.wake) == 0  # already up
    finally:
        assert status_of(hooks.sleep) == 0
    assert not listens()
    assert status_of(hooks.alive) == 1


def test_servers_run_by_hooks_do_not_share_a_file() -> None:
    models = imported({name: {"cmd": "some-server --port ${PORT}"} for name in ("a/b", "a-b", "a b")}).config.models
    files = {model.hooks.sleep[2].splitlines()[0] for model in models.values() if model.hooks}
    assert len(files) == 3


def test_macros_of_all_types() -> None:
    model = {"cmd": "vllm serve ${a} ${b} ${c} --port ${PORT}", "macros": {"b": "${c}x", "c": 0.5}}
    result = imported({"m": model}, macros={"a": True, "b": "other", "c": 1})
    assert result.config.models["m"].command == ("vllm", "serve", "true", "0.5x", "0.5", "--port", "{port}")


def test_a_stop_command_ends_it_in_the_hooks() -> None:
    model = {
        "cmd": "docker run --name ${MODEL_ID} -p ${PORT}:80 some/image",
        "cmdStop": "docker stop -s 'a b' m${PID} ${MODEL_ID}",
    }
    result = imported({"m": model})
    hooks = result.config.models["m"].hooks
    assert hooks is not None
    assert """\ndocker stop -s 'a b' m"$(cat "$pid")" m\n""" in hooks.sleep[2]
    assert text_of(result, "models.m.cmdStop") == "in `hooks`"


def test_a_server_that_ends_at_once_fails_the_hook(tmp_path: Path) -> None:
    hooks = imported({"m": {"cmd": "sh -c 'exit 3' ${PORT}"}}).config.models["m"].hooks
    assert hooks is not None
    environment = {"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert subprocess.run(hooks.wake, env=environment, capture_output=True, timeout=20).returncode == 1
