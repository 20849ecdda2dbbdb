"""From a model's configuration to the object that controls its server."""

from __future__ import annotations

from ..config import ModelConfig
from ._protocol import Backend
from .vllm import VLLMBackend

__all__ = ["build_backend"]


def build_backend(name: str, model: ModelConfig, *, sleep_level: int) -> Backend:
    """Return the backend of one model. Its port must be chosen."""
    return _control(name, model, sleep_level)


def _control(name: str, model: ModelConfig, sleep_level: int) -> Backend:
    """What speaks to the server."""
    return VLLMBackend(model.address, sleep_level=sleep_level, timeouts=model.timeouts)
