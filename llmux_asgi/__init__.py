"""Serve many vLLM models from one GPU: an ASGI middleware and mountable app that puts models to sleep and wakes them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._estimates import ModelCosts
    from ._journal import Journal, JournalEntry
    from ._lease import Lease
    from ._state import Mode, Phase, SwitcherStatistics
    from ._statistics import ErrorRecord, SwitchStatus
    from .access import Identity
    from .app import LLMuxApp
    from .backends import (
        Backend,
        BackendState,
        FreezingBackend,
        HooksBackend,
        LlamaCppBackend,
        ManagedBackend,
        OllamaBackend,
        ProbedBackend,
        SGLangBackend,
        StoppableBackend,
        VLLMBackend,
    )
    from .config import (
        AccessConfig,
        Config,
        CostsConfig,
        HooksConfig,
        KeyConfig,
        LimitsConfig,
        MemoryConfig,
        ModelConfig,
        ModelParametersConfig,
        ParametersConfig,
        PolicyConfig,
        ReloadReport,
        SecretConfig,
        TimeoutsConfig,
        WarmUpConfig,
        json_schema,
        load_config,
    )
    from .exceptions import (
        AuthenticationError,
        BackendDeadError,
        BackendError,
        BackendStartError,
        BackendTimeoutError,
        BackendUnreachableError,
        BackendUnsupportedError,
        BodyTimeoutError,
        BodyTooLargeError,
        BuffersFullError,
        ConfigError,
        DrainingError,
        EncodedBodyError,
        HeadersTooLargeError,
        InterruptedRequestError,
        InvalidRequestError,
        LLMuxError,
        OperationError,
        PermissionDeniedError,
        PolicyError,
        QueueFullError,
        QueueTimeoutError,
        RateLimitError,
        SwitchError,
        UnknownModelError,
        UpstreamError,
    )
    from .middleware import LLMuxMiddleware
    from .policy import (
        Defer,
        FifoPolicy,
        GatedQuantumPolicy,
        PolicyContext,
        PolicyDecision,
        PressurePolicy,
        Stay,
        SwitchContext,
        SwitchNow,
        SwitchPolicy,
        ThroughputPolicy,
    )
    from .switcher import ModelSwitcher
    from .upstream import Http1Upstream, HttpxUpstream, Origin, Upstream, UpstreamFault, UpstreamResponse

__all__ = [
    "AccessConfig",
    "AuthenticationError",
    "Backend",
    "BackendDeadError",
    "BackendError",
    "BackendStartError",
    "BackendState",
    "BackendTimeoutError",
    "BackendUnreachableError",
    "BackendUnsupportedError",
    "BodyTimeoutError",
    "BodyTooLargeError",
    "BuffersFullError",
    "Config",
    "ConfigError",
    "CostsConfig",
    "Defer",
    "DrainingError",
    "EncodedBodyError",
    "ErrorRecord",
    "FifoPolicy",
    "FreezingBackend",
    "GatedQuantumPolicy",
    "HeadersTooLargeError",
    "HooksBackend",
    "HooksConfig",
    "Http1Upstream",
    "HttpxUpstream",
    "Identity",
    "InterruptedRequestError",
    "InvalidRequestError",
    "Journal",
    "JournalEntry",
    "KeyConfig",
    "LLMuxApp",
    "LLMuxError",
    "LLMuxMiddleware",
    "Lease",
    "LimitsConfig",
    "LlamaCppBackend",
    "ManagedBackend",
    "MemoryConfig",
    "Mode",
    "ModelConfig",
    "ModelCosts",
    "ModelParametersConfig",
    "ModelSwitcher",
    "OllamaBackend",
    "OperationError",
    "Origin",
    "ParametersConfig",
    "PermissionDeniedError",
    "Phase",
    "PolicyConfig",
    "PolicyContext",
    "PolicyDecision",
    "PolicyError",
    "PressurePolicy",
    "ProbedBackend",
    "QueueFullError",
    "QueueTimeoutError",
    "RateLimitError",
    "ReloadReport",
    "SGLangBackend",
    "SecretConfig",
    "Stay",
    "StoppableBackend",
    "SwitchContext",
    "SwitchError",
    "SwitchNow",
    "SwitchPolicy",
    "SwitchStatus",
    "SwitcherStatistics",
    "ThroughputPolicy",
    "TimeoutsConfig",
    "UnknownModelError",
    "Upstream",
    "UpstreamError",
    "UpstreamFault",
    "UpstreamResponse",
    "VLLMBackend",
    "WarmUpConfig",
    "json_schema",
    "load_config",
]

_HOMES = (
    "exceptions",
    "config",
    "policy",
    "_estimates",
    "_state",
    "_statistics",
    "_journal",
    "backends",
    "_lease",
    "switcher",
    "upstream",
    "access",
    "middleware",
    "app",
)


def __getattr__(name: str) -> object:
    # Imported when it is first asked for: a simulated server needs nothing of this, and starts in half the time without it.
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
