"""Inference servers as the switcher sees them: something that sleeps, wakes and says which it is."""

from __future__ import annotations

from ._build import api_key_of, build_backend, with_ports
from ._protocol import STOP_LEVEL, Backend, BackendState, FreezingBackend, StoppableBackend, TunableBackend
from .hooks import HooksBackend
from .llamacpp import LlamaCppBackend
from .managed import ManagedBackend
from .ollama import OllamaBackend
from .probe import ProbedBackend
from .sglang import SGLangBackend
from .vllm import VLLMBackend

__all__ = [
    "STOP_LEVEL",
    "Backend",
    "BackendState",
    "FreezingBackend",
    "HooksBackend",
    "LlamaCppBackend",
    "ManagedBackend",
    "OllamaBackend",
    "ProbedBackend",
    "SGLangBackend",
    "StoppableBackend",
    "TunableBackend",
    "VLLMBackend",
    "api_key_of",
    "build_backend",
    "with_ports",
]
