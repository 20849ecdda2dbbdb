"""From a model's configuration to the object that controls its server."""

from __future__ import annotations

from typing import assert_never

from ..config import ModelConfig
from ._protocol import Backend
from .hooks import HooksBackend
from .llamacpp import LlamaCppBackend
from .ollama import OllamaBackend
from .sglang import SGLangBackend
from .vllm import VLLMBackend

__all__ = ["build_backend"]


def build_backend(name: str, model: ModelConfig, *, sleep_level: int) -> Backend:
    """Return the backend of one model. Its port must be chosen."""
    return _control(name, model, sleep_level)


def _control(name: str, model: ModelConfig, sleep_level: int) -> Backend:
    """What speaks to the server."""
    if model.hooks is not None:
        return HooksBackend(name, model.address, model.hooks, model.timeouts)
    inside = model.served_name or name
    match model.server:
        case "vllm":
            return VLLMBackend(model.address, sleep_level=sleep_level, timeouts=model.timeouts)
        case "sglang":
            return SGLangBackend(model.address, timeouts=model.timeouts)
        case "llama.cpp":
            return LlamaCppBackend(model.address, inside, timeouts=model.timeouts)
        case "ollama":
            return OllamaBackend(model.address, inside, timeouts=model.timeouts)
        case _:
            assert_never(model.server)
