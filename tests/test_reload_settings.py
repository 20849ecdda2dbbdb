"""What of a configuration may change while the gateway runs, and how it gets to where it is used."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llmux_asgi import Config, ConfigError, ModelConfig, ReloadReport, TimeoutsConfig, load_config
from llmux_asgi.backends import TunableBackend, build_backend, with_ports
from llmux_asgi.config import SERVER_KEYS, changes, server_part, server_place

SETTINGS = {
    # Read by the switcher, the middleware or the relay, each time that they are needed, or passed on by `retune`.
    *("preload", "aliases", "tasks", "parameters", "sleep_level", "retry", "timeouts", "costs", "priority", "max_waiting"),
    "ttl",
}
COMMAND = ["serve", "--port", "{port}"]


def config(**sections: Any) -> Config:
    return load_config({"models": {"qwen": {"url": "http://a"}}, **sections})


def test_each_key_of_a_model_belongs_to_its_server_or_is_a_setting_that_can_change() -> None:
    """A new key fails here: see that a reload takes it over, then name it above, or in `SERVER_KEYS`."""
    keys = {field.encode_name for field in msgspec.structs.fields(ModelConfig)}
    assert keys == {*SERVER_KEYS, *SETTINGS}


def test_each_section_can_change_or_is_refused() -> None:
    """A new section fails here: see that `LLMuxApp.reload` takes it over, or that `changes` refuses it."""
    sections = {field.encode_name for field in msgspec.structs.fields(Config)}
    taken_over = {
        "models",
        "priorities",
        "policy",
        "limits",
        "access",
        "admin",
        "loading_notice",
        "request_log",
        "timing_headers",
    }
    assert sections == {*taken_over, "memory", "metrics"}


def test_the_same_server_may_be_written_in_several_ways() -> None:
    one = ModelConfig(url="http://a/", served_name="qwen", aliases=("gpt-4o",))
    assert server_part("qwen", one) == server_part("qwen", ModelConfig(url="http://a"))
    assert server_part("qwen", one) != server_part("llama", ModelConfig(url="http://a"))
    assert server_place("qwen", one) == ("http://a", "")
    assert server_place("qwen", ModelConfig(url="http://a", server="ollama")) == ("http://a", "qwen")


def test_what_differs_is_told() -> None:
    before = load_config({"models": {"qwen": {"url": "http://a"}, "llama": {"url": "http://b"}, "phi": {"url": "http://c"}}})
    phi = {"url": "http://c", "retry": True}
    after = load_config({"models": {"phi": phi, "llama": {"url": "http://b"}, "gemma": {"url": "http://a"}}})
    assert changes(before, after) == ReloadReport(("gemma",), ("phi",), ("qwen",))
    assert changes(before, before) == ReloadReport()
    assert changes(config(), config(limits={"shutdown": 1}, priorities={"high": 1})).settings == ("priorities", "limits")


@pytest.mark.parametrize(
    ("sections", "where"),
    [
        ({"memory": {"settle": 1}}, "memory"),
        ({"metrics": {}}, "metrics"),
        ({"policy": {"estimates": "estimates.json"}}, "policy.estimates"),
        ({"admin": {"keys": {"ops": {"env": "KEY"}}}}, "admin.prefix"),
    ],
)
def test_what_cannot_change_is_named(sections: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=rf"\$\.{where}: cannot be changed while the gateway runs: restart it"):
        changes(config(), config(**sections))


def test_the_operators_keys_may_change() -> None:
    one, other = ({"keys": {name: {"env": "KEY"}}} for name in ("ops", "dev"))
    assert changes(config(admin=one), config(admin=other)).settings == ("admin",)


def test_a_command_keeps_its_port_as_long_as_it_is_the_same() -> None:
    def models(**more: Any) -> Config:
        return load_config({"models": {"qwen": {"command": COMMAND, **more}, "llama": {"command": COMMAND}}})

    before = with_ports(models())
    same = with_ports(models(aliases=["gpt-4o"], sleep_level=3), before)
    assert {name: model.url for name, model in same.models.items()} == {
        name: model.url for name, model in before.models.items()
    }
    other = with_ports(models(env={"HOME": "/"}), before)
    assert other.models["qwen"].url not in {model.url for model in before.models.values()}
    assert other.models["llama"].url == before.models["llama"].url


@pytest.mark.parametrize(
    "model",
    [
        {"url": "http://a"},
        {"url": "http://a", "server": "sglang"},
        {"url": "http://a", "server": "llama.cpp"},
        {"url": "http://a", "server": "ollama"},
        {"url": "http://a", "probe": "token"},
        {"url": "http://a", "hooks": {"wake": ["true"], "sleep": ["true"], "alive": ["true"]}},
        {"url": "http://127.0.0.1:20000", "command": ["serve"], "probe": "token"},
    ],
)
def test_every_server_goes_by_other_time_limits_from_its_next_step_on(model: dict[str, Any]) -> None:
    backend = build_backend("qwen", msgspec.convert(model, ModelConfig), sleep_level=1)
    assert isinstance(backend, TunableBackend)
    limits = TimeoutsConfig(probe=1.5, stop=2.5)
    backend.retune(limits, freezes=True)
    parts: list[Any] = [backend]
    for part in parts:  # what speaks to the server is wrapped once or twice
        parts += [getattr(part, name) for name in ("_server", "_client") if getattr(part, name, None) is not None]
        if hasattr(part, "_timeouts"):
            assert part._timeouts is limits
        if hasattr(part, "_process"):
            assert part._process.grace == 2.5
        if hasattr(part, "_freezes"):
            assert part._freezes
