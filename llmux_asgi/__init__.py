"""Serve many vLLM models from one GPU: an ASGI middleware and mountable app that puts models to sleep and wakes them."""

from __future__ import annotations

from ._lease import Lease
from ._state import Mode, Phase, SwitcherStatistics
from .app import LLMuxApp
from .backends import (
    Backend,
    BackendState,
    HooksBackend,
    LlamaCppBackend,
    OllamaBackend,
    SGLangBackend,
    VLLMBackend,
)
from .config import Config, HooksConfig, LimitsConfig, ModelConfig, PolicyConfig, TimeoutsConfig, json_schema, load_config
from .exceptions import (
    BackendError,
    BackendTimeoutError,
    BackendUnreachableError,
    BackendUnsupportedError,
    BodyTooLargeError,
    ConfigError,
    InterruptedRequestError,
    InvalidRequestError,
    LLMuxError,
    PolicyError,
    QueueTimeoutError,
    SwitchError,
    UnknownModelError,
    UpstreamError,
)
from .middleware import LLMuxMiddleware
from .policy import Defer, FifoPolicy, PolicyContext, PolicyDecision, SwitchContext, SwitchNow, SwitchPolicy
from .switcher import ModelSwitcher

__all__ = [
    "Backend",
    "BackendError",
    "BackendState",
    "BackendTimeoutError",
    "BackendUnreachableError",
    "BackendUnsupportedError",
    "BodyTooLargeError",
    "Config",
    "ConfigError",
    "Defer",
    "FifoPolicy",
    "HooksBackend",
    "HooksConfig",
    "InterruptedRequestError",
    "InvalidRequestError",
    "LLMuxApp",
    "LLMuxError",
    "LLMuxMiddleware",
    "Lease",
    "LimitsConfig",
    "LlamaCppBackend",
    "Mode",
    "ModelConfig",
    "ModelSwitcher",
    "OllamaBackend",
    "Phase",
    "PolicyConfig",
    "PolicyContext",
    "PolicyDecision",
    "PolicyError",
    "QueueTimeoutError",
    "SGLangBackend",
    "SwitchContext",
    "SwitchError",
    "SwitchNow",
    "SwitchPolicy",
    "SwitcherStatistics",
    "TimeoutsConfig",
    "UnknownModelError",
    "UpstreamError",
    "VLLMBackend",
    "json_schema",
    "load_config",
]
