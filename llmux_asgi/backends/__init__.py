"""Inference servers as the switcher sees them: something that sleeps, wakes and says which it is."""

from __future__ import annotations

from ._build import build_backend
from ._protocol import STOP_LEVEL, Backend, BackendState, StoppableBackend
from .hooks import HooksBackend
from .llamacpp import LlamaCppBackend
from .ollama import OllamaBackend
from .sglang import SGLangBackend
from .vllm import VLLMBackend

__all__ = [
    "STOP_LEVEL",
    "Backend",
    "BackendState",
    "HooksBackend",
    "LlamaCppBackend",
    "OllamaBackend",
    "SGLangBackend",
    "StoppableBackend",
    "VLLMBackend",
    "build_backend",
]
