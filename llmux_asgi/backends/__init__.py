"""Inference servers as the switcher sees them: something that sleeps, wakes and says which it is."""

from __future__ import annotations

from ._build import build_backend, with_ports
from ._protocol import STOP_LEVEL, Backend, BackendState, StoppableBackend
from .managed import ManagedBackend
from .probe import ProbedBackend
from .vllm import VLLMBackend

__all__ = [
    "STOP_LEVEL",
    "Backend",
    "BackendState",
    "ManagedBackend",
    "ProbedBackend",
    "StoppableBackend",
    "VLLMBackend",
    "build_backend",
    "with_ports",
]
