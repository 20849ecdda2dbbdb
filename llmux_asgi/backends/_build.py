"""From a model's configuration to the object that controls its server, imported where there is one of its kind."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import assert_never
from urllib.parse import urlsplit

import msgspec

from ..config import Config, ModelConfig, read_secret, server_part
from ._protocol import Backend

__all__ = ["api_key_of", "build_backend", "free_port", "with_ports"]


def with_ports(config: Config, before: Config | None = None) -> Config:
    """Return `config` with a free port of 127.0.0.1 for each command that has no URL.

    A command keeps the port that it had `before`, if it is still the same.
    """
    old = before.models if before is not None else {}
    taken = {urlsplit(model.url).port for model in (*config.models.values(), *old.values()) if model.url}

    def with_port(name: str, model: ModelConfig) -> ModelConfig:
        if model.url:
            return model
        if name in old and server_part(name, msgspec.structs.replace(old[name], url=None)) == server_part(name, model):
            return msgspec.structs.replace(model, url=old[name].url)
        while (port := free_port()) in taken:
            pass
        taken.add(port)
        return msgspec.structs.replace(model, url=f"http://127.0.0.1:{port}")

    models = {name: with_port(name, model) for name, model in config.models.items()}
    return msgspec.structs.replace(config, models=models)


def build_backend(name: str, model: ModelConfig, *, sleep_level: int, freezes: bool = False) -> Backend:
    """Return the backend of one model. Its port must be chosen. `freezes`: its requests have to survive its sleep."""
    key = api_key_of(name, model)
    server = _control(name, model, sleep_level, freezes, key)
    if model.probe != "none" or model.warm_up is not None:
        from .probe import ProbedBackend

        inside = model.served_name or name
        server = ProbedBackend(
            server, model.address, inside, model.probe, warm_up=model.warm_up, timeouts=model.timeouts, api_key=key
        )
    if model.command is None:
        return server
    command, env = model.command, model.env
    if model.server == "vllm":
        env = {"VLLM_SERVER_DEV_MODE": "1", **env}
        if [Path(command[0]).name, *command[1:2]] == ["vllm", "serve"] and not any("enable-sleep-mode" in a for a in command):
            command = (*command, "--enable-sleep-mode")
    from .managed import ManagedBackend

    return ManagedBackend(name, server, model.address, command, env=env, cwd=model.cwd, timeouts=model.timeouts)


def api_key_of(name: str, model: ModelConfig) -> str | None:
    """Return the key that a model's server asks for. Raises `ConfigError` if it cannot be read."""
    return read_secret(model.api_key, f"$.models.{name}.api_key") if model.api_key is not None else None


def _control(name: str, model: ModelConfig, sleep_level: int, freezes: bool, key: str | None) -> Backend:
    """What speaks to the server."""
    if model.hooks is not None:
        from .hooks import HooksBackend

        return HooksBackend(name, model.address, model.hooks, model.timeouts)
    inside = model.served_name or name
    match model.server:
        case "vllm":
            from .vllm import VLLMBackend

            return VLLMBackend(model.address, sleep_level=sleep_level, freezes=freezes, timeouts=model.timeouts, api_key=key)
        case "sglang":
            from .sglang import SGLangBackend

            return SGLangBackend(model.address, timeouts=model.timeouts, api_key=key)
        case "llama.cpp":
            from .llamacpp import LlamaCppBackend

            return LlamaCppBackend(model.address, inside, timeouts=model.timeouts, api_key=key)
        case "ollama":
            from .ollama import OllamaBackend

            return OllamaBackend(model.address, inside, timeouts=model.timeouts, api_key=key)
        case _:
            assert_never(model.server)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on.

    It is below those that Linux hands out for outgoing connections: one of these could otherwise take it before the server,
    which may load weights for minutes first, listens.
    """
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
