"""Inference servers as the switcher sees them: something that sleeps, wakes and says which it is."""

from __future__ import annotations

from ._protocol import Backend, BackendState
from .vllm import VLLMBackend

__all__ = ["Backend", "BackendState", "VLLMBackend"]
