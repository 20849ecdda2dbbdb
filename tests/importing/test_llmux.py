"""What llmux's fields become."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from llmux_asgi.importing import ConfigImportError, Imported, convert

from .samples import LLMUX_0, LLMUX_1, LLMUX_2


def imported(raw: Any) -> Imported:
    return convert(raw, "llmux", environment={})


def text_of(result: Imported, field: str) -> str:
    return next(finding.text for finding in result.findings if finding.field == field)


def test_llmux_0_runs_the_same_vllm_at_the_same_port() -> None:
    small = imported(LLMUX_0).config.models["small"]
    assert small.url == "http://127.0.0.1:9101"
    expected = "serve org/small-1b --port {port} --gpu-memory-utilization 0.8 --tensor-parallel-size 2 --dtype bfloat16"
    assert small.command == ("/opt/vllm/bin/vllm", *expected.split(), "--max-model-len", "2048")
    assert small.served_name == "org/small-1b"
    assert small.sleep_level == 2
    assert imported(LLMUX_0).config.models["org/large-9b"].served_name is None


def test_llmux_0_policy() -> None:
    policy = imported(LLMUX_0).config.policy
    assert (policy.name, policy.request_timeout, policy.min_active_duration, policy.drain) == ("fifo", 90, 3, "abort")


def test_levels_of_all_versions() -> None:
    levels = {name: model.sleep_level for name, model in imported(LLMUX_1).config.models.items()}
    assert levels == {"a": 1, "b": 2, "c": 3, "d": 3, "e": 2}  # e: the policy's
    assert "4 is not known here" in text_of(imported(LLMUX_1), "models.d.sleep_level")
    without = {"models": {"x": {"model_path": "x", "port": 1}}}
    assert imported(without).config.models["x"].sleep_level == 3


def test_what_is_not_called_vllm_gets_the_option_that_llmux_gave_it() -> None:
    command = imported(LLMUX_1).config.models["a"].command
    assert command == ("my-vllm", "serve", "org/a", "--port", "{port}", "--enable-sleep-mode")


def test_a_served_model_name_is_what_vllm_goes_by() -> None:
    model = {"model_path": "org/x", "port": 1, "extra_args": ["--served-model-name", "mine", "x2"]}
    assert imported({"models": {"x": model}}).config.models["x"].served_name == "mine"


@pytest.mark.parametrize(
    ("theirs", "ours", "max_wait"),
    [("cost_aware", "pressure", 20), ("time_slice", "gated_quantum", None), ("new", "fifo", None)],
)
def test_policies(theirs: str, ours: str, max_wait: float | None) -> None:
    result = imported(LLMUX_1 | {"policy": LLMUX_1["policy"] | {"policy_type": theirs}})
    policy = result.config.policy
    assert (policy.name, policy.max_wait, policy.min_active_duration) == (ours, max_wait, 8)
    assert ours in text_of(result, "policy.policy_type")


def test_defaults_that_are_not_ours_are_written_down() -> None:
    old = imported({"models": {"x": {"model_path": "x", "port": 1}}})
    new = imported({"models": LLMUX_2["models"]})
    assert (old.config.policy.request_timeout, new.config.policy.request_timeout) == (60, 300)
    assert old.config.policy.min_active_duration == new.config.policy.min_active_duration == 5
    assert "default, 60 s" in text_of(old, "policy.request_timeout_secs")


def test_llmux_2_scripts_become_hooks() -> None:
    config = imported(LLMUX_2).config
    model = config.models["small"]
    assert model.url == "http://127.0.0.1:9101"
    assert model.hooks is not None
    assert model.hooks.wake == ("sh", "-c", "./wake.sh\n# started\n")
    assert model.hooks.sleep == ("sh", "-c", "./sleep.sh")
    assert (config.policy.request_timeout, config.policy.min_active_duration, config.policy.drain) == (120, 0, "wait")


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 1), ("false # not there", 1), ("true\nfalse", 1), ("no-such-command 2>&1", 1)],
)
def test_alive_says_asleep_however_it_fails(script: str, status: int) -> None:
    raw = {"models": {"x": {"port": 1, "wake": "w", "sleep": "s", "alive": script}}}
    hooks = imported(raw).config.models["x"].hooks
    assert hooks is not None
    assert subprocess.run(hooks.alive, capture_output=True).returncode == status


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_path": "x"}, r"models\.x\.port: expected a port, got None"),
        ({"model_path": "x", "port": 0}, r"models\.x\.port: expected a port, got 0"),
        ({"model_path": "x", "port": 1, "extra_args": "--a"}, r"models\.x\.extra_args: expected a list, got str"),
        ({"model_path": "x", "port": 1, "sleep_level": "L1"}, r"models\.x\.sleep_level: expected a number, got 'L1'"),
        ({"port": 1, "wake": "w", "sleep": "s"}, r"models\.x\.alive: expected a script, got None"),
    ],
)
def test_a_value_that_makes_no_sense_is_named(model: Any, message: str) -> None:
    with pytest.raises(ConfigImportError, match=message):
        imported({"models": {"x": model}})


def test_two_models_at_one_port_cannot_be_had() -> None:
    with pytest.raises(ConfigImportError, match=r"what it says cannot be had here: \$\.models\.b\.url"):
        imported({"models": {name: {"model_path": name, "port": 1} for name in "ab"}})
