"""llmux's configurations: up to 1.x it ran vLLM itself, since 2.0 scripts wake and sleep its models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ._command import Command
from ._draft import Draft, list_at, mapping_at, number_at
from ._hooks import inline_hooks
from .errors import ConfigImportError

__all__ = ["convert_llmux_0", "convert_llmux_2"]

_POLICIES = {"fifo": "fifo", "cost_aware": "pressure", "time_slice": "gated_quantum"}
_STOP = 3
"""Our level that ends the process. llmux's first form had three levels, later ones five: 3 suspends, 4 writes a checkpoint."""


def convert_llmux_0(raw: Mapping[str, Any]) -> Draft:
    """Convert a configuration of llmux 0.3 to 1.x. Raises `ConfigImportError`."""
    draft = Draft()
    policy = mapping_at(raw, "policy")
    program = str(raw.get("vllm_command", "vllm"))
    for name, model in mapping_at(raw, "models").items():
        where = f"models.{name}."
        command = Command(_vllm_command(program, model, where))
        if PurePosixPath(program).name != "vllm":  # the gateway adds it to `vllm serve` only; llmux always did
            command.words.append("--enable-sleep-mode")
        served = (command.option("--served-model-name") or [str(model["model_path"])])[0]
        draft.config["models"][name] = {
            "command": command.words,
            "url": f"http://127.0.0.1:{_port(model, where)}",
            **({"served_name": served} if served != name else {}),
            "sleep_level": _level(model, policy, where, draft),
        }
    chosen = str(policy.get("policy_type", "fifo"))
    ours = _POLICIES.get(chosen, "fifo")
    if chosen not in _POLICIES:
        draft.say("policy.policy_type", f"{chosen!r} is not known: `fifo`, as llmux does")
    elif chosen != ours:
        draft.say("policy.policy_type", f"`{ours}` is the nearest to {chosen}")
    quantum = (number_at(policy, "min_quantum_ms", "policy.") or 0) / 1000
    draft.config["policy"] = _policy(policy, ours, draft, default_timeout=60, quantum=quantum)
    if (wait := number_at(policy, "max_wait_secs", "policy.")) is not None:
        if ours == "pressure":
            draft.config["policy"]["max_wait"] = wait
        else:
            draft.say("policy.max_wait_secs", f"`{ours}` bounds each wait by itself", status="none")
    return draft


def convert_llmux_2(raw: Mapping[str, Any]) -> Draft:
    """Convert a configuration of llmux 2.x. Raises `ConfigImportError`."""
    draft = Draft()
    for name, model in mapping_at(raw, "models").items():
        where = f"models.{name}."
        scripts = {}
        for key in ("wake", "sleep", "alive"):
            if not isinstance(script := model.get(key), str) or not script.strip():
                raise ConfigImportError(f"{where}{key}: expected a script, got {script!r}")
            scripts[key] = script
        draft.config["models"][name] = {
            "url": f"http://127.0.0.1:{_port(model, where)}",
            "hooks": inline_hooks(scripts["wake"], scripts["sleep"], scripts["alive"]),
        }
    draft.config["policy"] = _policy(mapping_at(raw, "policy"), "fifo", draft, default_timeout=300)
    return draft


def _policy(
    policy: Mapping[str, Any], name: str, draft: Draft, *, default_timeout: float, quantum: float = 0
) -> dict[str, Any]:
    timeout = number_at(policy, "request_timeout_secs", "policy.")
    if timeout is None:
        draft.say("policy.request_timeout_secs", f"not given: llmux's default, {default_timeout:g} s; a start must fit in")
    active = number_at(policy, "min_active_secs", "policy.")
    drain = policy.get("drain_before_switch", True)
    return {
        "name": name,
        "request_timeout": default_timeout if timeout is None else timeout,
        "min_active_duration": max(5 if active is None else active, quantum),
        "drain": "wait" if drain else "abort",
    }


def _vllm_command(program: str, model: Mapping[str, Any], where: str) -> list[str]:
    words = [program, "serve", str(model["model_path"]), "--port", "{port}"]
    for key in ("gpu_memory_utilization", "tensor_parallel_size", "dtype"):
        if (value := model.get(key)) is not None:
            words += [f"--{key.replace('_', '-')}", str(value)]
    return words + [str(each) for each in list_at(model, "extra_args", where)]


def _level(model: Mapping[str, Any], policy: Mapping[str, Any], where: str, draft: Draft) -> int:
    for given, field in ((model, where), (policy, "policy.")):
        if (level := number_at(given, "sleep_level", field)) is not None:
            if level > _STOP:
                draft.say(f"{field}sleep_level", f"{level} is not known here: 3, the process is ended and started again")
            return min(max(int(level), 1), _STOP)
        if eviction := mapping_at(given, "eviction", field):
            if eviction.get("process") != "keep_running":
                return _STOP
            return 2 if eviction.get("weights") == "discard" else 1
    return _STOP


def _port(model: Mapping[str, Any], where: str) -> int:
    port = model.get("port")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise ConfigImportError(f"{where}port: expected a port, got {port!r}")
    return port
