"""Inference servers as the switcher sees them: something that sleeps, wakes and says which it is."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ._build import api_key_of, build_backend, with_ports
from ._protocol import STOP_LEVEL, Backend, BackendState, FreezingBackend, StoppableBackend, TunableBackend

if TYPE_CHECKING:
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

_HOMES = {
    "HooksBackend": "hooks",
    "LlamaCppBackend": "llamacpp",
    "ManagedBackend": "managed",
    "OllamaBackend": "ollama",
    "ProbedBackend": "probe",
    "SGLangBackend": "sglang",
    "VLLMBackend": "vllm",
}


def __getattr__(name: str) -> object:
    # Imported when it is first asked for: a gateway has servers of one kind, or two.
    if name in _HOMES:
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{_HOMES[name]}"), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
