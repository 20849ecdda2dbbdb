"""The configuration: where it may come from, and what each mistake is answered with."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

import llmux_asgi
from llmux_asgi import (
    Config,
    ConfigError,
    LimitsConfig,
    ModelConfig,
    ModelSwitcher,
    PolicyConfig,
    TimeoutsConfig,
    json_schema,
    load_config,
)
from llmux_asgi._routes import ROUTES
from llmux_asgi.config._access import CLIENT_PATHS

URL = "http://127.0.0.1:8001"
MINIMAL = {"models": {"qwen": {"url": URL}}}
FULL: dict[str, Any] = {
    "models": {
        "qwen": {
            "url": URL,
            "served_name": "Qwen/Qwen3-14B",
            "aliases": ["gpt-4o", "best"],
            "sleep_level": 2,
            "ttl": 600,
            "timeouts": {"request": 10, "connect": 1, "probe": 2.5, "sleep": 30, "wake": 60, "read": None},
            "costs": {"sleep": 1.5, "wake": 8},
            "priority": "batch",
            "max_waiting": 7,
            "parameters": {
                "defaults": {"temperature": 0.7, "stop": None},
                "forced": {"chat_template_kwargs": {"enable_thinking": False}},
                "strip": ["seed"],
                "aliases": {"best": {"forced": {"temperature": 0}}},
            },
        },
        "llama": {
            "url": "https://gpu.example:8443/behind",
            "probe": "token",
            "warm_up": {"path": "/v1/embeddings", "body": {"input": "x"}},
            "retry": True,
            "server": "sglang",
        },
        "own": {
            "command": ["vllm", "serve", "own", "--port", "{port}"],
            "env": {"CUDA_VISIBLE_DEVICES": "0"},
            "cwd": "/srv",
            "preload": True,
            "sleep_level": 3,
            "timeouts": {"start": 100, "stop": 1},
        },
        "scripted": {
            "url": "http://127.0.0.1:8003",
            "hooks": {"wake": ["up"], "sleep": ["down"], "alive": ["is-up"]},
            "sleep_level": 3,
        },
    },
    "policy": {
        "name": "pressure",
        "sleep_level": 2,
        "request_timeout": None,
        "min_active_duration": 0,
        "quantum": 3,
        "linger": 0.25,
        "max_wait": 20,
        "drain": True,
        "drain_timeout": 3,
        "max_freezes": None,
        "max_frozen": None,
        "estimates": "/var/lib/llmux.json",
    },
    "limits": {
        "max_body": 1000,
        "max_headers": 2048,
        "max_buffered": 4000,
        "body_timeout": 7,
        "write_timeout": 8,
        "max_message": 2000,
        "websocket_idle": 5.0,
        "backoff_initial": 0.5,
        "backoff_max": 8,
        "health_interval": None,
        "heartbeat": 4,
        "max_waiting": None,
        "shutdown": 3,
    },
    "priorities": {"interactive": 30, "batch": 0},
    "memory": {"check": "nvml", "device": 1, "settle": 2},
    "loading_notice": "events",
    "admin": {"prefix": "/ops/llmux", "keys": {"ops": {"env": "ADMIN_KEY"}, "site": {"file": "admin-keys"}}},
    "timing_headers": True,
    "metrics": {"path": "/own/metrics", "key": {"env": "KEY"}, "backends": True, "timeout": 0.5},
}
YAML = """
models:
  qwen:
    url: http://127.0.0.1:8001
    aliases: [gpt-4o]
policy: {min_active_duration: 2.5}
"""
TOML = """
[models.qwen]
url = "http://127.0.0.1:8001"
aliases = ["gpt-4o"]
[policy]
min_active_duration = 2.5
"""
JSON = '{"models": {"qwen": {"url": "http://127.0.0.1:8001", "aliases": ["gpt-4o"]}}, "policy": {"min_active_duration": 2.5}}'


def test_the_defaults_are_the_documented_ones() -> None:
    config = load_config(MINIMAL)
    assert config.policy == PolicyConfig(
        name="gated_quantum", sleep_level=1, request_timeout=60.0, min_active_duration=None, drain="wait", drain_timeout=None
    )
    assert config.limits == LimitsConfig(max_body=33554432, backoff_initial=1.0, backoff_max=30.0, max_waiting=1000)
    assert config.priorities == {}
    assert config.models["qwen"].timeouts == TimeoutsConfig(connect=5.0, probe=5.0, sleep=120.0, wake=300.0, read=600.0)


def test_everything_can_be_set() -> None:
    config = load_config(FULL)
    assert config.aliases == {"gpt-4o": "qwen", "best": "qwen"}
    assert msgspec.to_builtins(config)["policy"] == FULL["policy"]
    assert msgspec.to_builtins(config)["limits"] == FULL["limits"]
    assert msgspec.to_builtins(config)["memory"] == FULL["memory"]
    assert config.models["own"].command == ("vllm", "serve", "own", "--port", "{port}")
    assert config.models["qwen"].timeouts.read is None
    assert (config.priorities, config.models["qwen"].priority) == ({"interactive": 30.0, "batch": 0.0}, "batch")
    assert msgspec.to_builtins(config.models["qwen"].parameters)["strip"] == ("seed",)
    assert (config.models["qwen"].max_waiting, config.limits.max_waiting) == (7, None)
    switcher = ModelSwitcher.from_config(load_config({**FULL, "policy": {}, "memory": {}}))
    assert [switcher.priority(name) for name in ("best", "llama")] == ["batch", None]


def test_the_admin_api_can_be_set() -> None:
    admin = load_config(FULL).admin
    assert admin is not None
    assert admin.prefix == "/ops/llmux"
    assert (admin.keys["ops"].env, admin.keys["site"].file) == ("ADMIN_KEY", "admin-keys")
    assert load_config({**MINIMAL, "admin": {"keys": {"ops": {"env": "X"}}}}).admin is not None
    assert load_config(MINIMAL).admin is None


@pytest.mark.parametrize(
    ("admin", "where", "words"),
    [
        ({"keys": {}}, "admin.keys", "without a key nobody could use it"),
        ({}, "admin", "missing required field `keys`"),
        ({"keys": {"ops": {"env": "X", "file": "y"}}}, "admin.keys.ops.hash", "name one of hash, env, file"),
        ({"keys": {"ops": {"hash": "swordfish"}}}, "admin.keys.ops.hash", "is not sha256:"),
        ({"keys": {"ops": {"models": ["m"]}}}, "admin.keys.ops", "unknown field `models`"),
        ({"keys": ["x"]}, "admin.keys", "expected `object`"),
        *(
            ({"keys": {"ops": {"env": "X"}}, "prefix": prefix}, "admin.prefix", words)
            for prefix, words in (
                ("admin", "is not a path such as /admin"),
                ("", "is not a path"),
                ("/", "is not a path"),
                ("/admin/", "is not a path"),
                ("//admin", "is not a path"),
                ("/a b", "is not a path"),
                ("/x/../admin", "is not a path"),
                ("/admin%2f", "is not a path"),
                ("/v1", "would hide what clients ask for at /v1"),
                ("/v1/admin", "would hide"),
                ("/models/admin", "would hide"),
            )
        ),
    ],
)
def test_a_wrong_admin_section_is_refused(admin: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({**MINIMAL, "admin": admin})
    assert str(caught.value).startswith(f"$.{where}: ")
    assert words in str(caught.value)
    assert "swordfish" not in str(caught.value)


def test_no_admin_prefix_hides_a_route_of_clients() -> None:
    assert {route.path.split("/")[1] for route in ROUTES} | {"models"} == set(CLIENT_PATHS)


def test_no_admin_prefix_hides_the_metrics() -> None:
    source = {**MINIMAL, "admin": {"keys": {"ops": {"env": "X"}}, "prefix": "/own"}, "metrics": {"path": "/own/metrics"}}
    with pytest.raises(ConfigError, match=r"\$\.admin\.prefix: '/own' would hide the metrics at /own/metrics"):
        load_config(source)
    load_config({**source, "metrics": {"path": "/owner"}})


def test_preemption_can_be_set() -> None:
    policy = {"drain": "preempt", "drain_timeout": 1, "max_freezes": 3, "max_frozen": 40}
    config = load_config({**MINIMAL, "policy": policy})
    assert msgspec.to_builtins(config)["policy"].items() >= policy.items()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"server": "sglang"}, "preempt freezes requests in vLLM's way, and models.m is a server of the kind sglang"),
        (
            {"hooks": {"wake": ["w"], "sleep": ["s"], "alive": ["a"]}},
            "preempt freezes requests in vLLM's way, and models.m is switched by hooks",
        ),
        (
            {"command": ["serve"], "sleep_level": 3},
            "preempt keeps requests in the sleeping server, and the sleep level 3 of models.m ends it",
        ),
    ],
)
def test_preemption_is_refused_for_servers_that_cannot_have_it(model: dict[str, Any], message: str) -> None:
    source = {"models": {"m": {"url": URL, **model}}, "policy": {"drain": "preempt"}}
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert str(caught.value) == f"$.policy.drain: {message}"
    load_config({**source, "policy": {"drain": True}})


@pytest.mark.parametrize(("ending", "text"), [("yaml", YAML), ("yml", YAML), ("toml", TOML), ("json", JSON)])
def test_files_of_every_kind_say_the_same(tmp_path: Path, ending: str, text: str) -> None:
    path = tmp_path / f"llmux.{ending}"
    path.write_text(text)
    expected = Config(models={"qwen": ModelConfig(url=URL, aliases=("gpt-4o",))}, policy=PolicyConfig(min_active_duration=2.5))
    assert load_config(path) == load_config(str(path)) == load_config(expected) == expected


def model(**values: Any) -> dict[str, Any]:
    return {"models": {"qwen": {"url": URL, **values}}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "$: object missing required field `models`"),
        ([], "$: expected a Config, a dict or the path of a file, got list"),
        (None, "$: expected a Config, a dict or the path of a file, got NoneType"),
        ({"models": {}}, "$.models: name at least one model"),
        ({"models": {7: {"url": URL}}}, "$.models.7: a model's name is a text: write it in quotes"),
        ({"models": []}, "$.models: expected `object`, got `array`"),
        ({"models": {"qwen": None}}, "$.models.qwen: expected `object`, got `null`"),
        (
            {"models": {"qwen": {}}},
            "$.models.qwen.url: is missing: say where the server listens, or give a command that starts it",
        ),
        (model(url=7), "$.models.qwen.url: expected `str | null`, got `int` (write it in quotes)"),
        (model(url="nonsense"), "$.models.qwen.url: 'nonsense' is not a URL such as http://127.0.0.1:8001"),
        (model(url="ftp://x"), "$.models.qwen.url: 'ftp://x' is not a URL such as http://127.0.0.1:8001"),
        (model(url="http://x:99999"), "$.models.qwen.url: 'http://x:99999': Port out of range 0-65535"),
        (model(url="http://x/?a=1"), "$.models.qwen.url: 'http://x/?a=1' must be scheme, host, port and path only"),
        (model(url="http://x?"), "$.models.qwen.url: 'http://x?' must be scheme, host, port and path only"),
        (model(url="http://x#a"), "$.models.qwen.url: 'http://x#a' must be scheme, host, port and path only"),
        (model(url="http://me@x"), "$.models.qwen.url: 'http://me@x' must be scheme, host, port and path only"),
        (model(url="http://:pw@x"), "$.models.qwen.url: 'http://:pw@x' must be scheme, host, port and path only"),
        *(
            (model(url=url), f"$.models.qwen.url: {url!r} has blanks, or characters that are not ASCII: percent-encode them")
            for url in ("http://x/ü", " http://x", "http://x\n", "http://x/\x7f")
        ),
        *(
            (
                model(url=URL + path),
                f"$.models.qwen.url: '{URL}{path}' must be the server's root: leave out /v1 and what follows it",
            )
            for path in ("/v1/", "/v1/chat/completions", "/behind/v1")
        ),
        (
            {"models": {"a": {"url": URL}, "b": {"url": URL + "/"}}},
            f"$.models.b.url: '{URL}/' already is the server of the model 'a'",
        ),
        (model(warm_up={"path": "v1/x"}), "$.models.qwen.warm_up.path: 'v1/x' must begin with a slash, such as /v1/embeddings"),
        (
            model(warm_up={"path": "/v1/embeddings"}),
            "$.models.qwen.warm_up.body: is missing: only for /v1/completions the gateway knows what to send",
        ),
        (model(sleep_level=4), "$.models.qwen.sleep_level: invalid enum value 4 (one of: 1, 2, 3)"),
        (
            model(sleep_level=3),
            "$.models.qwen.sleep_level: 3 stops the server's process, which only one with a command has",
        ),
        (
            {**MINIMAL, "policy": {"sleep_level": 3}},
            (
                "$.policy.sleep_level: 3 stops the server's process, which only one with a command has: "
                "give this model its own level (models.qwen.sleep_level)"
            ),
        ),
        (model(server="tgi"), "$.models.qwen.server: invalid enum value 'tgi' (one of: vllm, sglang, llama.cpp, ollama)"),
        (model(priority="high"), "$.models.qwen.priority: 'high' must be none, for there are no priorities"),
        (
            {**model(priority="high"), "priorities": {"interactive": 30, "batch": 0}},
            "$.models.qwen.priority: 'high' must be one of interactive, batch",
        ),
        ({**MINIMAL, "priorities": {"low": -1}}, "$.priorities[...]: expected `float` >= 0.0"),
        (model(max_waiting=0), "$.models.qwen.max_waiting: expected `int` >= 1"),
        (
            model(parameters={"forced": {"model": "x"}}),
            "$.models.qwen.parameters.forced: 'model' cannot be a parameter: the gateway sets it: use served_name",
        ),
        (
            model(parameters={"strip": ["stream"]}),
            (
                "$.models.qwen.parameters.strip: 'stream' cannot be a parameter: "
                "only the client knows in which form it reads its answer"
            ),
        ),
        (
            model(parameters={"defaults": {"seed": 1}, "strip": ["seed"]}),
            "$.models.qwen.parameters.strip: 'seed' is in defaults too: one of them says it all",
        ),
        *(
            (model(parameters={"defaults": {key: 1}}), f"$.models.qwen.parameters.defaults: {key!r} is no name of a parameter")
            for key in ("  ", "a\nb", 'a"', "a\\", "\udc00")
        ),
        *(
            (
                model(parameters={"forced": {"a": {"b": [value]}}}),
                f"$.models.qwen.parameters.forced.a.b[0]: {value!r} is not a value of JSON",
            )
            for value in (float("nan"), datetime.date(2026, 1, 1), "\udc00", {1: 2})
        ),
        (
            model(aliases=["x"], parameters={"aliases": {"y": {}}}),
            "$.models.qwen.parameters.aliases.y: is not one of the model's aliases",
        ),
        ({**MINIMAL, "limits": {"max_headers": 1023}}, "$.limits.max_headers: expected `int` >= 1024"),
        ({**MINIMAL, "limits": {"body_timeout": 0}}, "$.limits.body_timeout: expected `float` > 0.0"),
        (
            {**MINIMAL, "limits": {"max_buffered": 33554431}},
            "$.limits.max_buffered: must not be less than max_body, which is 33554432",
        ),
        ({**MINIMAL, "limits": {"max_waiting": 0}}, "$.limits.max_waiting: expected `int` >= 1"),
        (model(env={"A": "b"}), "$.models.qwen.env: has no effect without a command"),
        (
            {"models": {"qwen": {"command": ["vllm", "serve"]}}},
            "$.models.qwen.command: has no {port}: write it where the port belongs, or say in url where it listens",
        ),
        (
            {"models": {"qwen": {"command": ["vllm"], "url": "http://127.0.0.1"}}},
            "$.models.qwen.url: 'http://127.0.0.1' must name the port that the command listens on",
        ),
        ({"models": {"qwen": {"command": []}}}, "$.models.qwen.command: expected `array` of length >= 1"),
        (
            {"models": {"qwen": {"command": ["a", "{port}"], "hooks": {"wake": ["a"], "sleep": ["a"], "alive": ["a"]}}}},
            "$.models.qwen.hooks: cannot be combined with command: let the hooks start and stop the server",
        ),
        (
            {**MINIMAL, "loading_notice": True},
            "$.loading_notice: expected `str`, got `bool` (write it in quotes)",
        ),
        (
            {**MINIMAL, "loading_notice": "loud"},
            "$.loading_notice: invalid enum value 'loud' (one of: none, comments, events)",
        ),
        (model(aliases="x"), "$.models.qwen.aliases: expected `array`, got `str` (write a list: [one, two])"),
        (model(timeouts={"wake": "5s"}), "$.models.qwen.timeouts.wake: expected `float`, got `str` (a number, in seconds)"),
        (
            model(timeouts={"read": "5s"}),
            "$.models.qwen.timeouts.read: expected `float | null`, got `str` (a number, in seconds, or null)",
        ),
        (
            {**MINIMAL, "policy": {"drain": False, "drain_timeout": 3}},
            "$.policy.drain_timeout: has no effect when nothing is drained: leave one of them out",
        ),
        ({**MINIMAL, "policy": {"max_freezes": 3}}, "$.policy.max_freezes: has no effect without drain: preempt"),
        ({**MINIMAL, "policy": {"drain": False, "max_frozen": 3}}, "$.policy.max_frozen: has no effect without drain: preempt"),
        (
            {**MINIMAL, "policy": {"drain": "later"}},
            "$.policy.drain: invalid enum value 'later' (one of: wait, preempt, abort, true, false)",
        ),
        (
            {**MINIMAL, "limits": {"backoff_initial": 60}},
            "$.limits.backoff_max: must not be less than backoff_initial, which is 60",
        ),
        (
            {**MINIMAL, "policy": {"min_active_duration": float("inf")}},
            "$.policy.min_active_duration: expected `float` <= 31536000.0",
        ),
        (model(timeouts={"wake": 0}), "$.models.qwen.timeouts.wake: expected `float` > 0.0"),
        (model(timeouts={"wale": 1}), "$.models.qwen.timeouts: object contains unknown field `wale`"),
        (model(ulr=URL), "$.models.qwen: object contains unknown field `ulr`"),
        (model(aliases=["qwen"]), "$.models.qwen.aliases[0]: 'qwen' already names the model 'qwen'"),
        (
            {"models": {"a": {"url": URL, "aliases": ["x"]}, "b": {"url": "http://x", "aliases": ["y", "x"]}}},
            "$.models.b.aliases[1]: 'x' already names the model 'a'",
        ),
        ({**MINIMAL, "polic": {}}, "$: object contains unknown field `polic`"),
        (
            {**MINIMAL, "policy": {"name": "magic"}},
            "$.policy.name: invalid enum value 'magic' (one of: fifo, gated_quantum, pressure, throughput)",
        ),
        ({**MINIMAL, "policy": {"min_active_duration": -1}}, "$.policy.min_active_duration: expected `float` >= 0.0"),
        ({**MINIMAL, "limits": {"max_body": 0}}, "$.limits.max_body: expected `int` >= 1"),
    ],
)
def test_every_mistake_is_named_with_its_path_and_cause(source: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert str(caught.value) == message


def test_objects_are_checked_like_everything_else() -> None:
    with pytest.raises(ConfigError, match=r"^\$\.models\.qwen\.sleep_level: "):
        load_config(Config(models={"qwen": ModelConfig(url=URL, sleep_level=7)}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^\$\.url: 'x' is not a URL"):
        ModelConfig(url="x")
    with pytest.raises(ConfigError, match=r"^\$\.models: name at least one model"):
        Config(models={})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "models: [", "not valid YAML"),
        ("c.toml", "models = [", "not valid TOML"),
        ("c.json", '{"models":', "not valid JSON"),
        ("c.json", '"\udce4"', "not valid JSON"),
        ("c.json", "[" * 100_000, "not valid JSON"),
        ("c.yaml", "a: 2001-99-99", "not valid YAML"),
        ("c.yaml", "&a [*a]", "not valid YAML"),
        ("c.yaml", "models:\n  a: {url: 'http://x'}\n  a: {url: 'http://y'}", "$.models.a: is there twice, again in line 3"),
        ("c.yaml", "models: [{a: 1, a: 2}]", "$.models.a: is there twice, again in line 1"),
        ("c.yaml", "", "$: expected `object`, got `null`"),
        ("c.json", "[]", "$: expected `object`, got `array`"),
        ("c.ini", "", "$: the file's ending '.ini' is not one of .yaml, .yml, .toml, .json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: $")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("none.json")
    assert str(caught.value) == f"{tmp_path}/none.json: No such file or directory"


def test_yaml_without_pyyaml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(YAML)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"pip install pyyaml"):
        load_config(path)


def test_the_shipped_schema_is_current_and_fits() -> None:
    shipped = json.loads(Path(llmux_asgi.__file__).with_name("config.schema.json").read_text())
    assert shipped == json.loads(json.dumps(json_schema())), "run: llmux-asgi schema > llmux_asgi/config.schema.json"
    validator = jsonschema.Draft202012Validator(shipped)
    validator.check_schema(shipped)
    validator.validate(FULL)
    validator.validate(MINIMAL)
    for wrong in ({}, {**MINIMAL, "x": 1}, model(sleep_level=4), model(url=1)):
        assert not validator.is_valid(wrong)
